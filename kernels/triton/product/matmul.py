"""Products with prepared weights: which kernel runs how many tokens.

Up to 4 tokens gemv, from 5 gemm (up to 8 tokens either kernel does; from 5 on the activations that every 16 rows read
again outweigh the codes). A trellis has a kernel of its own (`trellis`) for any number. A weight that
`rounded.with_activations` marked runs gemm_rounded with more than ROUNDED_TOKENS tokens. Weights that are kept apart
from codes are added by a kernel of their own (`outliers`), activations not rounded. A float weight runs
torch.matmul, which is cuBLAS or rocBLAS on a GPU: there is nothing to decode. `describe` says which it is, for `kbit
info`.
"""

from __future__ import annotations

import torch

from kbit.host.errors import UnsupportedError
from kbit.kernels.triton.codecs.layout import TritonWeight
from kbit.kernels.triton.product import gemm_rounded
from kbit.kernels.triton.product.gemm import gemm
from kbit.kernels.triton.product.gemv import GATES, gemv
from kbit.kernels.triton.product.limits import GEMV_TOKENS, ROUNDED_TOKENS
from kbit.kernels.triton.product.outliers import add_outliers
from kbit.kernels.triton.product.rounded import RoundedTokens, tokens_layout
from kbit.kernels.triton.product.trellis import trellis_product


def describe(weight: TritonWeight, tokens: int) -> str:
    """The kernel that multiplies `tokens` rows with a weight: "torch.matmul", "gemv", "gemm", "trellis", "gemm_int8"
    or so."""
    if weight.dense is not None:
        return "torch.matmul"
    if weight.rotation is not None:
        return "trellis"
    if _rounds(weight, tokens):
        return f"gemm_{weight.activations}"
    return "gemv" if tokens <= GEMV_TOKENS else "gemm"


def matmul(
    x: torch.Tensor,
    weight: TritonWeight,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x W^T (+ bias) (+ residual), summed in float32; x is rounded where `describe` names a kernel that does.

    Args:
        x: (M, K), the dtype that the weight was prepared for, contiguous rows.
        weight: (N, K).
        bias: (N,) or None, any float dtype.
        residual: (M, N) or None, any float dtype.
        out_dtype: of the result; x's by default.

    Returns:
        (M, N).

    Raises:
        UnsupportedError: shapes or types do not fit together.
    """
    if weight.dense is not None:
        return _dense(x, weight.dense, bias, residual, out_dtype or x.dtype)
    if x.ndim == 2 and x.shape[0] == 0:
        return x.new_empty((0, weight.shape[0]), dtype=out_dtype or x.dtype)
    if weight.rotation is not None:
        return trellis_product(x, weight, bias, residual, out_dtype)
    if x.ndim == 2 and x.shape[0] <= GEMV_TOKENS:
        out = gemv(x, weight, bias, residual, out_dtype)
    else:
        out = _many(x, weight, bias, residual, out_dtype)
    return out if weight.outliers is None else add_outliers(x, weight, out)


def gated_matmul(
    x: torch.Tensor, gate: TritonWeight, up: TritonWeight, kind: str, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """act(x G^T) * (x U^T): one kernel up to 4 tokens; above, U's product with the activation in its epilogue.

    Args:
        x: (M, K), the dtype that the weights were prepared for, contiguous rows.
        gate: G (N, K).
        up: U (N, K).
        kind: "silu", "gelu", "gelu_tanh" or "relu".
        out_dtype: of the result; x's by default.

    Returns:
        (M, N).

    Raises:
        UnsupportedError: shapes or types do not fit together, or an unknown activation.
    """
    if kind not in GATES:
        raise UnsupportedError(f"activation {kind!r} is not one of {', '.join(GATES)}")
    if gate.shape != up.shape:
        raise UnsupportedError(f"gate is {gate.shape}, up is {up.shape}: not alike")
    if x.ndim == 2 and x.shape[0] == 0:
        return x.new_empty((0, up.shape[0]), dtype=out_dtype or x.dtype)
    if gate.rotation is not None or up.rotation is not None:
        gates = matmul(x, gate, out_dtype=torch.float32)
        if up.rotation is not None:
            return trellis_product(x, up, out_dtype=out_dtype, gate=gates, kind=kind)
        product = _activated(gates, kind) * matmul(x, up, out_dtype=torch.float32)
        return product.to(out_dtype or x.dtype)
    if gate.outliers is not None or up.outliers is not None:  # which come before the activation
        gates = matmul(x, gate, out_dtype=torch.float32)
        product = _activated(gates, kind) * matmul(x, up, out_dtype=torch.float32)
        return product.to(out_dtype or x.dtype)
    alike = (gate.format, gate.kind) == (up.format, up.kind)
    if alike and gate.dense is None and x.ndim == 2 and x.shape[0] <= GEMV_TOKENS:
        return gemv(x, gate, out_dtype=out_dtype, up=up, kind=kind)
    rounded = None
    if x.ndim == 2 and _rounds(gate, x.shape[0]) and _rounds(up, x.shape[0]):
        if tokens_layout(gate) == tokens_layout(up):
            rounded = gemm_rounded.round_tokens(x, gate)  # once for both
        gates = _many(x, gate, out_dtype=torch.float32, rounded=rounded)
    else:
        gates = matmul(x, gate, out_dtype=torch.float32)
    if up.dense is None:
        return _many(x, up, out_dtype=out_dtype, rounded=rounded, gate=gates, kind=kind)
    product = _activated(gates, kind) * _dense(x, up.dense, None, None, torch.float32)
    return product.to(out_dtype or x.dtype)


def _rounds(weight: TritonWeight, tokens: int) -> bool:
    return bool(weight.activations) and weight.dense is None and tokens > ROUNDED_TOKENS


def _many(
    x: torch.Tensor,
    weight: TritonWeight,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    rounded: RoundedTokens | None = None,
    gate: torch.Tensor | None = None,
    kind: str = "",
) -> torch.Tensor:
    """A quantized weight's product with more tokens than gemv takes."""
    if x.ndim != 2 or not _rounds(weight, x.shape[0]):
        return gemm(x, weight, bias, residual, out_dtype, gate=gate, kind=kind)
    return gemm_rounded.gemm_rounded(x, weight, bias, residual, out_dtype, rounded=rounded, gate=gate, kind=kind)


def _dense(
    x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, out: torch.dtype
) -> torch.Tensor:
    if x.ndim != 2 or x.shape[1] != dense.shape[1] or x.dtype != dense.dtype:
        raise UnsupportedError(
            f"x {tuple(x.shape)} {x.dtype} does not match a float weight {tuple(dense.shape)} {dense.dtype}"
        )
    product = torch.matmul(x, dense.t())
    if bias is None and residual is None:
        return product.to(out)
    total = product.float()
    if bias is not None:
        total += bias.float()
    if residual is not None:
        total += residual.float()
    return total.to(out)


def _activated(gate: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "silu":
        return torch.nn.functional.silu(gate)
    if kind == "relu":
        return torch.relu(gate)
    return torch.nn.functional.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none")
