"""`grbench tune`: a search for the best strategy under limits. docs/TUNING.md explains it."""
