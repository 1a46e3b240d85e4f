"""The clients of tools/soak.py."""
