"""New keys and values into their pages of the KV cache."""
