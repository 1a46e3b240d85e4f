"""x W^T with activations rounded to 8 bits: to int8 or to e4m3, as the weight is marked.

Shapes: x (M, K), W (N, K) from `rounded.with_activations(weight, "int8")` or "fp8", out (M, N). Integer codes are
multiplied as they are by int8, and to 5 bits exactly by e4m3; codebooks of up to 5 bits are rounded to 8 bits, and the
scale of a block multiplies the sum of its products. docs/measurements.md has what that costs.

Roofline: tensor cores at the rate of 8 bits (twice fp16's; int8 four times on the GeForce cards, whose fp16 products
with float32 sums are halved); memory bandwidth for the codes with few tokens. Estimates against gemm:
`configs.rounded_config`.
"""

from __future__ import annotations

import torch
import triton

from kbit.host.errors import UnsupportedError
from kbit.kernels.triton.codecs.codes8 import SIGNS
from kbit.kernels.triton.codecs.layout import ROW_TILE, TritonWeight
from kbit.kernels.triton.product.configs import GemmConfig, rounded_config
from kbit.kernels.triton.product.gemm import tokens_per_launch
from kbit.kernels.triton.product.gemv import check_product, problem_of, weight_tuple
from kbit.kernels.triton.product.round_fp8 import round_fp8
from kbit.kernels.triton.product.round_int8 import round_int8
from kbit.kernels.triton.product.rounded import (
    KINDS,
    RoundedTokens,
    check_arch,
    gemm_rounded_kernel,
    segment_of,
    tokens_layout,
)
from kbit.kernels.triton.target import current_arch


def round_tokens(x: torch.Tensor, weight: TritonWeight) -> RoundedTokens:
    """x (M, K) in 8 bits, for products with this weight and others of its layout."""
    return (round_int8 if weight.activations == "int8" else round_fp8)(x, weight)


def gemm_rounded(
    x: torch.Tensor,
    weight: TritonWeight,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    rounded: RoundedTokens | None = None,
    gate: torch.Tensor | None = None,
    kind: str = "",
    config: GemmConfig | None = None,
) -> torch.Tensor:
    """x W^T (+ bias) (+ residual) with x rounded; or act(gate) * (x W^T) (+ bias) (+ residual).

    Args:
        x: (M, K), M >= 1, the dtype the weight was prepared for, contiguous rows.
        weight: (N, K), marked by `rounded.with_activations`.
        bias: (N,) or None, any float dtype.
        residual: (M, N) or None, any float dtype.
        out_dtype: of the result; x's by default.
        rounded: x from `round_tokens`, where several weights of one layout share it.
        gate: (M, N) or None: the gate's product, before its activation.
        kind: the activation, "silu", "gelu", "gelu_tanh" or "relu".
        config: block sizes (split is ignored); chosen for the GPU by default.

    Returns:
        (M, N).

    Raises:
        UnsupportedError: the arguments do not fit together, a weight that is not marked, or a GPU without e4m3 tensor
            cores for "fp8".
    """
    check_product(x, weight, bias, residual, kind=kind, gate=gate)
    if weight.activations not in KINDS:
        raise UnsupportedError(f"{weight.format} is not marked for products with rounded tokens: use with_activations")
    tokens, rows = x.shape[0], weight.shape[0]
    arch = current_arch()
    check_arch(weight.activations, arch)
    segment = segment_of(weight)
    config = config or rounded_config(arch, problem_of(x, weight), weight.activations, segment)
    padded_rows, padded_columns = weight.padded
    row_tiles = padded_rows // ROW_TILE
    rounded = round_tokens(x, weight) if rounded is None else rounded
    if rounded.layout != tokens_layout(weight) or len(rounded.values) != tokens:
        raise UnsupportedError(f"these tokens were rounded for {rounded.layout}, not for {tokens_layout(weight)}")
    out = torch.empty((tokens, rows), dtype=out_dtype or x.dtype, device=x.device)
    if tokens > (most := tokens_per_launch(config, rounded.values, residual, gate, out)):
        raise UnsupportedError(f"a product of rounded tokens takes at most {most} of them here, not {tokens}")
    planes, scales, factors, *_ = weight_tuple(weight)
    table = weight.planes[0] if weight.table8 is None else weight.table8
    gemm_rounded_kernel[(triton.cdiv(row_tiles, config.tiles) * triton.cdiv(tokens, config.tokens),)](
        rounded.values, rounded.scales, out, out if bias is None else bias, out if residual is None else residual,
        out if gate is None else gate, (*planes, scales, factors, table),
        tokens, rows, row_tiles, rows, 0 if residual is None else residual.stride(0),
        0 if gate is None else gate.stride(0), padded_columns, weight.padded_blocks, weight.blocks,
        padded_columns // config.columns, SIGNS, weight.multiplier8,
        FP8=weight.activations == "fp8", BITS=weight.bits, KIND=weight.kind, BLOCK=weight.block_size,
        DOUBLE=weight.scales_super is not None, TILES=config.tiles, BM=config.tokens, COLUMNS=config.columns,
        SEGMENT=segment, GATE="" if gate is None else kind, BIAS=bias is not None, RESIDUAL=residual is not None,
        STAGES=config.stages, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out
