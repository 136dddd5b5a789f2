"""Token, row, level and position of each token of a step, from its id and its place in the sequence."""
