"""Two engines as one: retrieve, then rank."""
