"""Parts of tools/fuzz.py: targets, mutations, who judges an input, and the loops that run them."""
