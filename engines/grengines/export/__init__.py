"""Export of the ranking model for the compiled engines: `grbench export`."""
