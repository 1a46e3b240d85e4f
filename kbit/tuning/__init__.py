"""Timing the GPU kernels' configurations on a user's GPU, and keeping the best."""
