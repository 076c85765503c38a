"""One page for three readers: its parts, its script, and every row in it."""
