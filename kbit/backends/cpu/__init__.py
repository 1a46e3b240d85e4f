"""Models as recorded programs of C++ kernels."""
