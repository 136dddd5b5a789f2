"""LayerNorm over the last dimension."""
