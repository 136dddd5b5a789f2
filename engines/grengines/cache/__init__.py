"""Users' keys and values between their visits: pages, the index of who has which, and who goes."""
