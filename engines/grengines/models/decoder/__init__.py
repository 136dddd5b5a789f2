"""Decoder-only Transformers over semantic IDs (Qwen3's layers), to hold HSTU against."""
