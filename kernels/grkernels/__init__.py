"""Operators of generative recommenders: one folder a family, one module a variant."""
