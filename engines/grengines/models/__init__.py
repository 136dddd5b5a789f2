"""Models: options, weights and PyTorch modules, without an engine."""
