"""Engines: each answers the same requests with the same weights, its own way."""
