"""Two jagged streams to one: each sequence's rows of the first, then its rows of the second."""
