"""Semantic IDs: items as short tuples of codes, for models that generate what they retrieve (Rajput et al., TIGER)."""
