"""Which kernel takes how many tokens. Imports nothing, so that reports can ask without loading torch."""

# Up to so many rows of x one program decodes a tile of weights for all of them (gemv); above, gemm.
GEMV_TOKENS = 4

# Up to so many new tokens per row, the same for all rows, attention is cut along the cached tokens (attention_decode):
# a drafted continuation, too, is mostly reading the cache. Above, along the new ones (attention_prefill).
DECODE_TOKENS = 8

# Features of an attention's heads are a multiple of the first of these up to the second, which a program holds; above,
# a multiple of the third up to the last, cut into parts.
HEAD_LANES, PART_FEATURES, WIDE_LANES, MOST_HEAD_FEATURES = 16, 256, 64, 576

# A column of a recurrent head's state, as long as a key, stays in a program's registers.
MOST_KEY_FEATURES = 256


def takes_heads(head_dim: int) -> bool:
    """Whether the attention kernels run heads of so many features."""
    lanes = HEAD_LANES if head_dim <= PART_FEATURES else WIDE_LANES
    return 0 < head_dim <= MOST_HEAD_FEATURES and head_dim % lanes == 0


# Where a caller asked for activations in 8 bits, products of more tokens than this round them; fewer read the codes at
# the speed of memory either way, and keep their accuracy. By the model of tools/triton_lint the fp16 kernel takes as
# long as reading the codes up to 64 tokens on most GPUs (configs.rounded_config has the table).
ROUNDED_TOKENS = 64
