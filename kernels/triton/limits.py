"""Which kernel takes how many tokens. Imports nothing, so that reports can ask without loading torch."""

# Up to so many rows of x one program decodes a tile of weights for all of them (gemv); above, gemm.
GEMV_TOKENS = 4

# Up to so many new tokens per row, the same for all rows, attention is cut along the cached tokens (attention_decode):
# a drafted continuation, too, is mostly reading the cache. Above, along the new ones (attention_prefill).
DECODE_TOKENS = 8
