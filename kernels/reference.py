"""What each operation means, in plain torch and float32. Every fast kernel is tested against these functions.

Nothing here is tuned except memory: the two places where a straightforward formula would need unbounded scratch
(attention scores, dequantized weights) work in pieces of at most SCRATCH_BYTES. What attention means stands in
`kbit.kernels.reference_attention`, what quantized keys and values do in `kbit.kernels.reference_kv`.

Dimension names: B rows of the batch, T new tokens per row, S cached tokens per row, H query heads, H_kv key/value
heads, D head dimension, K input features, N output features, V vocabulary.

Inputs of other float types are converted to float32 on entry; results are float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from kbit.formats.quant_tensor import QuantTensor
from kbit.host.errors import UnsupportedError
from kbit.kernels.activations import ACTIVATIONS as ACTIVATIONS
from kbit.kernels.reference_attention import attend as attend
from kbit.kernels.reference_attention import cached_keys as cached_keys
from kbit.kernels.reference_attention import of_distances as of_distances
from kbit.kernels.reference_attention import rope as rope
from kbit.kernels.reference_attention import soft_cap as soft_cap
from kbit.kernels.reference_kv import LEVELS_4 as LEVELS_4
from kbit.kernels.reference_kv import SHRINKS_4 as SHRINKS_4
from kbit.kernels.reference_kv import dequantize_kv as dequantize_kv
from kbit.kernels.reference_kv import hadamard as hadamard
from kbit.kernels.reference_kv import kv_group as kv_group
from kbit.kernels.reference_kv import quantize_kv as quantize_kv
from kbit.kernels.reference_kv import quantize_kv_4 as quantize_kv_4

# Upper bound, in bytes, on the dequantized rows of one piece of a linear. A piece is never smaller than one weight row
# (4 K bytes).
SCRATCH_BYTES = 64 << 20


def linear(x: torch.Tensor, weight: torch.Tensor | QuantTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b.

    Args:
        x: (..., K).
        weight: (N, K); a QuantTensor is dequantized piece by piece.
        bias: (N,) or None.

    Returns:
        (..., N) float32.
    """
    x = x.float()
    bias = None if bias is None else bias.float()
    if isinstance(weight, torch.Tensor):
        return F.linear(x, weight.float(), bias)
    rows, columns = weight.shape
    step = max(1, SCRATCH_BYTES // (4 * columns))
    if rows <= step:
        return F.linear(x, weight.dequantize(), bias)
    out = x.new_empty((*x.shape[:-1], rows))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        piece = weight.dequantize_rows(torch.arange(start, stop, device=x.device))
        out[..., start:stop] = F.linear(x, piece, None if bias is None else bias[start:stop])
    return out


def round_int8(x: torch.Tensor, segment: int) -> torch.Tensor:
    """x as int8 activations stand for it: runs of `segment` features (the last may be shorter) have a scale each, the
    largest magnitude over 127.

    Args:
        x: (..., K).
        segment: features that share a scale.

    Returns:
        (..., K) float32.
    """
    columns = x.shape[-1]
    parts = F.pad(x.float(), (0, -columns % segment)).reshape(*x.shape[:-1], -1, segment)
    scales = parts.abs().amax(-1, keepdim=True) / 127.0
    inverse = torch.where(scales > 0, 1.0 / scales, 0.0)
    levels = ((parts * inverse).clamp(-127.0, 127.0) + 0.5).floor()
    return torch.flatten(levels * scales, -2)[..., :columns]


def round_fp8(x: torch.Tensor) -> torch.Tensor:
    """x as e4m3 activations stand for it (OCP 8-bit floating point specification), a scale for all of the K features,
    which brings the largest magnitude to 448: (..., K) -> (..., K) float32."""
    x = x.float()
    scales = x.abs().amax(-1, keepdim=True) / 448.0
    inverse = torch.where(scales > 0, 1.0 / scales, 0.0)
    return (x * inverse).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float() * scales


def embed(weight: torch.Tensor | QuantTensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows of the embedding matrix.

    Args:
        weight: (V, K).
        ids: int64 (B, T), each in [0, V).

    Returns:
        (B, T, K) float32.
    """
    if isinstance(weight, torch.Tensor):
        return weight[ids].float()
    return weight.dequantize_rows(ids.reshape(-1)).reshape(*ids.shape, weight.shape[1])


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root mean square normalisation (Zhang and Sennrich 2019) as Llama applies it: w * x / sqrt(mean(x^2) + eps).

    Args:
        x: (..., K).
        weight: (K,).
        eps: added to the mean square, so a zero vector stays zero.

    Returns:
        (..., K) float32.
    """
    x = x.float()
    return weight.float() * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """LayerNorm (Ba et al. 2016): w * (x - mean(x)) / sqrt(var(x) + eps) + b, the variance over all K features.

    Args:
        x: (..., K).
        weight: (K,).
        bias: (K,) or None.
        eps: added to the variance.

    Returns:
        (..., K) float32.
    """
    return F.layer_norm(x.float(), x.shape[-1:], weight.float(), None if bias is None else bias.float(), eps)


def by_heads(x: torch.Tensor, weight: torch.Tensor, heads: int, first: int, backward: bool) -> torch.Tensor:
    """`kbit.graph.ops.Ops.by_heads`: every head's features times its own rows of a matrix.

    Args:
        x: (..., H (first + K)); backward (..., H (first + N)).
        weight: (H N, K).
        heads: H.
        first: features of a head before those that are multiplied; backward, they stay.
        backward: x_h W_h, and not x_h W_h^T.

    Returns:
        (..., H N); backward (..., H (first + K)), float32.
    """
    of_heads = x.float().view(*x.shape[:-1], heads, -1)
    before, x = of_heads[..., :first], of_heads[..., first:]
    matrices = weight.float().view(heads, -1, weight.shape[-1])
    if not backward:
        return torch.einsum("...hk,hnk->...hn", x, matrices).flatten(-2)
    return torch.cat([before, torch.einsum("...hn,hnk->...hk", x, matrices)], dim=-1).flatten(-2)


def fit_heads(x: torch.Tensor, heads: int, head_dim: int, shared: torch.Tensor | None = None) -> torch.Tensor:
    """Every head as D features: what all share, then its own, cut or followed by zeros.

    Args:
        x: (..., H d).
        heads: H.
        head_dim: D.
        shared: (..., S), S <= D; or None.

    Returns:
        (..., H D).
    """
    own = x.view(*x.shape[:-1], heads, -1)
    first = own[..., :0] if shared is None else shared[..., None, :].expand(*own.shape[:-1], -1)
    together = torch.cat([first, own], dim=-1)
    missing = max(0, head_dim - together.shape[-1])
    return torch.nn.functional.pad(together, (0, missing))[..., :head_dim].flatten(-2)


def activate(gate: torch.Tensor, up: torch.Tensor | None, kind: str) -> torch.Tensor:
    """act(gate) * up, or act(gate) for an MLP without gating.

    Args:
        gate: (..., K).
        up: (..., K) or None.
        kind: "silu" x * sigmoid(x); "gelu" x * Phi(x) with the exact normal distribution function; "gelu_tanh" its
            tanh approximation (Hendrycks and Gimpel 2016); "relu" max(x, 0); "elu" x, or e^x - 1
            where x is negative (Clevert et al., arXiv 1511.07289).

    Returns:
        (..., K) float32.

    Raises:
        UnsupportedError: unknown kind.
    """
    gate = gate.float()
    if kind == "silu":
        out = F.silu(gate)
    elif kind == "gelu":
        out = F.gelu(gate)
    elif kind == "gelu_tanh":
        out = F.gelu(gate, approximate="tanh")
    elif kind == "relu":
        out = F.relu(gate)
    elif kind == "elu":
        out = F.elu(gate)
    else:
        raise UnsupportedError(f"activation {kind!r} is not one of {', '.join(ACTIVATIONS)}")
    return out if up is None else out * up.float()


def logits(x: torch.Tensor, weight: torch.Tensor | QuantTensor) -> torch.Tensor:
    """Scores of every vocabulary entry: x (..., K), weight (V, K) -> (..., V) float32."""
    return linear(x, weight)


def add_low_rank(
    y: torch.Tensor,
    x: torch.Tensor,
    factors: Sequence[tuple[torch.Tensor, torch.Tensor, float] | None],
    adapters: torch.Tensor,
) -> torch.Tensor:
    """Products with what the adapters of their rows add (LoRA, Hu et al. 2021).

    Args:
        y: (T, N).
        x: (T, K).
        factors: of every adapter A (R, K), B (N, R) and s, R being its own; None where it adds nothing.
        adapters: (T,), which one each row has, -1 for none.

    Returns:
        y + s (x A^T) B^T, row by row, (T, N) float32.
    """
    out = y.float().clone()
    for index, each in enumerate(factors):
        if each is not None:
            down, up, scale = each
            rows = adapters == index
            out[rows] += scale * (x[rows].float() @ down.float().T) @ up.float().T
    return out
