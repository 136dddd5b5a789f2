"""One export of the ranking model, for every compiled engine: `grbench export`."""
