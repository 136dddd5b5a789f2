"""One export of the ranking model, for every compiled engine: `python -m grengines.export`."""
