"""The native engine: HSTU in PyTorch with the project's kernels."""
