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

from kbit.kernels.triton.codecs.layout import TritonWeight
from kbit.kernels.triton.product.configs import GemmConfig
from kbit.kernels.triton.product.round_fp8 import round_fp8
from kbit.kernels.triton.product.round_int8 import round_int8
from kbit.kernels.triton.product.rounded import RoundedTokens, product


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
    return product(
        x, weight, round_tokens, bias, residual, out_dtype, rounded=rounded, gate=gate, kind=kind, config=config
    )
