"""Correctness gates: nothing is timed before it agrees with the fp32 reference."""
