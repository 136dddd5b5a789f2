"""Configuration of a run: schemas, composing with Hydra, commands."""
