"""Who runs a model: the reference (torch), the CPU (C++) and GPUs (Triton)."""
