"""kbit from Python: `kbit.load`, `kbit.quantize` and what they return. docs/python.md shows how."""
