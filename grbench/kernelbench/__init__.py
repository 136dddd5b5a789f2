"""`python -m grbench.kernelbench`: operators one by one, gated, timed side by side, held against the roofline."""
