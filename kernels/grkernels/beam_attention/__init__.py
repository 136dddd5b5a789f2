"""Softmax attention of rows of beams and of prompts, over keys in pages."""
