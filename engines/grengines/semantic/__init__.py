"""Semantic IDs: items as short tuples of codes, for generative retrieval (Rajput et al., TIGER)."""
