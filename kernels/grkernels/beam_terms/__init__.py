"""Terms of HSTU attention for the earlier codes of a beam, read from pages."""
