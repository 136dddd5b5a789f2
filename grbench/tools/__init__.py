"""Commands beside the benchmark: doctor, sizing, overhead."""
