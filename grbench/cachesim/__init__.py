"""`grbench cachesim`: cache policies on traces of millions of requests, beside the offline optimum."""
