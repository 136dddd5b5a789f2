"""The naive baseline: generation as a plain loop over a Transformers-style model does it."""
