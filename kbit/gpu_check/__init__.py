"""Proving a GPU: every kernel against the reference, whole models, times; `kbit check-gpu` and `tools/gpu_day.py`."""
