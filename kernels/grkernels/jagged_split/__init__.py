"""One jagged stream to two: the inverse of jagged_concat."""
