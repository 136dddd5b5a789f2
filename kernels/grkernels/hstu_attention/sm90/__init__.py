"""HSTU attention for Hopper in CuTe DSL."""
