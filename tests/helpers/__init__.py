"""What several test files use: oracles, requests, checks."""
