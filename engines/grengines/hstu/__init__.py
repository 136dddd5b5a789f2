"""HSTU: configuration, model, weights and the native engine."""
