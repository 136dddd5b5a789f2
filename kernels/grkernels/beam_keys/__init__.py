"""Keys that each token of a step sees: the first ones of its sequence, and the slots of its own beam."""
