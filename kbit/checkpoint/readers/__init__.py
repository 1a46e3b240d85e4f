"""Readers of folders: Hugging Face's, and kbit's own."""
