"""Products with k-bit weights."""
