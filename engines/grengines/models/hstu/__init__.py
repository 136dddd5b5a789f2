"""HSTU: options, weights, ranking model and generator."""
