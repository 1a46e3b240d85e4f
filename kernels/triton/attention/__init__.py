"""Attention over paged, possibly k-bit, keys and values."""
