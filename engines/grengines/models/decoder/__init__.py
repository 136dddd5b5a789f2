"""Decoder-only Transformers over semantic IDs with Qwen3's layers, for comparison with HSTU."""
