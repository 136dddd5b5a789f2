"""`python -m grbench kernels`: operators one by one, gated, timed side by side, held against the roofline."""
