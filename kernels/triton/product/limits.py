"""Which kernel takes how many tokens. Imports nothing, so that reports can ask without loading torch."""

# Up to so many rows of x one program decodes a tile of weights for all of them (gemv); above, gemm.
GEMV_TOKENS = 4

# Up to so many new tokens per row, the same for all rows, attention is cut along the cached tokens (attention_decode):
# a drafted continuation, too, is mostly reading the cache. Above, along the new ones (attention_prefill).
DECODE_TOKENS = 8

# Features of an attention's heads are a multiple of the first of these, and at most the second.
HEAD_LANES, MOST_HEAD_FEATURES = 16, 256

# Where a caller asked for activations in 8 bits, products of more tokens than this round them; fewer read the codes at
# the speed of memory either way, and keep their accuracy. By the model of tools/triton_lint the fp16 kernel takes as
# long as reading the codes up to 64 tokens on most GPUs (configs.rounded_config has the table).
ROUNDED_TOKENS = 64
