"""Operators of generative recommenders: a folder for each family, a module for each variant."""
