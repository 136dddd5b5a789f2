"""Concatenation of two jagged streams, sequence by sequence."""
