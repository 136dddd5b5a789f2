"""Split of a jagged stream into two, the inverse of jagged_concat."""
