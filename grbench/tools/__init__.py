"""Commands other than the benchmark: doctor, sizing, overhead."""
