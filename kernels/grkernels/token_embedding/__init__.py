"""HSTU's token encoder: the sum of a token's embeddings of item, actions, weight, position and time."""
