"""How notebooks are executed in batches, and what holds the committed ones in shape."""
