"""Models as launches of Triton kernels, captured as CUDA graphs."""
