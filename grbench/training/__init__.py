"""Training of small models with PyTorch. The engines load their weights files."""
