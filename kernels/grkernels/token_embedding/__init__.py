"""Sum of a token's embeddings of item, actions, weight, position and time: HSTU's token encoder."""
