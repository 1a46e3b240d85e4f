"""What recurrent layers mean, in plain torch and float32, token by token: part of kernels/reference.py."""

from __future__ import annotations

import torch

# Added to a sum of squares before its root: a vector of zeros stays zero.
UNIT_EPS = 1e-6


def unit(x: torch.Tensor) -> torch.Tensor:
    """x / sqrt(sum(x^2) + eps) over the last dimension: (..., D) float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + UNIT_EPS)


def gated_delta(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    write: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gated delta rule (Yang et al. 2025, "Gated Delta Networks") over the tokens of one sequence.

    Per head, with q and k of unit length, q times D_k^-0.5, a = sigmoid(decay) and b = sigmoid(write):

        S <- a S,   S <- S + b k (v - S^T k)^T,   o = S^T q

    Args:
        q: (T, H, D_k).
        k: (T, H, D_k).
        v: (T, H, D_v).
        decay: (T, H).
        write: (T, H).
        state: (H, D_k, D_v), S before the first token; it is not changed.

    Returns:
        o (T, H, D_v), and S after the last token.
    """
    q, k, v = unit(q) * q.shape[-1] ** -0.5, unit(k), v.float()
    keep, share = decay.float().sigmoid(), write.float().sigmoid()
    state, out = state.float(), torch.empty_like(v)
    for t in range(len(q)):
        state = state * keep[t, :, None, None]
        known = torch.einsum("hkv,hk->hv", state, k[t])
        state = state + torch.einsum("hk,hv->hkv", k[t], share[t, :, None] * (v[t] - known))
        out[t] = torch.einsum("hkv,hk->hv", state, q[t])
    return out, state


def short_convolution(x: torch.Tensor, weight: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A causal convolution of every feature by itself: out[t] = sum over i of weight[i] x[t - (W - 1) + i].

    Args:
        x: (T, C).
        weight: (W, C).
        state: (W - 1, C), the inputs before x, zeros at the start of a sequence; it is not changed.

    Returns:
        (T, C), and the last W - 1 inputs.
    """
    inputs = torch.cat([state.float(), x.float()])
    out = sum((weight[i].float() * inputs[i : i + len(x)] for i in range(len(weight))), torch.zeros_like(x).float())
    return out, inputs[len(x) :].clone()
