"""What recurrent layers mean, in plain torch and float32, token by token: part of kernels/reference.py."""

from __future__ import annotations

import torch

# Added to a sum of squares before its root: a vector of zeros stays zero.
UNIT_EPS = 1e-6
# Tokens that `gated_delta_in_chunks` takes together.
CHUNK = 64


def unit(x: torch.Tensor) -> torch.Tensor:
    """x / sqrt(sum(x^2) + eps) over the last dimension: (..., D) float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + UNIT_EPS)


def log_decay(decay: torch.Tensor, log_rates: torch.Tensor) -> torch.Tensor:
    """-exp(log_rates) softplus(decay), the logarithm of how much of a state stays: (..., H) and (H,) -> (..., H)."""
    return -log_rates.float().exp() * torch.nn.functional.softplus(decay.float())


def gated_delta(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    write: torch.Tensor,
    log_rates: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gated delta rule (Yang et al. 2025, "Gated Delta Networks") over the tokens of one sequence.

    Per head, with q and k of unit length, q times D_k^-0.5, a = exp(-exp(log_rate) softplus(decay)) and
    b = sigmoid(write):

        S <- a S,   S <- S + b k (v - S^T k)^T,   o = S^T q

    Args:
        q: (T, G, D_k). Each of G heads of keys is that of H / G heads of values, one after another.
        k: (T, G, D_k).
        v: (T, H, D_v).
        decay: (T, H).
        write: (T, H).
        log_rates: (H,).
        state: (H, D_k, D_v), S before the first token; it is not changed.

    Returns:
        o (T, H, D_v), and S after the last token.
    """
    group = v.shape[1] // k.shape[1]
    q, k = (unit(x).repeat_interleave(group, dim=1) for x in (q, k))
    q, v = q * q.shape[-1] ** -0.5, v.float()
    keep, share = log_decay(decay, log_rates).exp(), write.float().sigmoid()
    state, out = state.float(), torch.empty_like(v)
    for t in range(len(q)):
        state = state * keep[t, :, None, None]
        known = torch.einsum("hkv,hk->hv", state, k[t])
        state = state + torch.einsum("hk,hv->hkv", k[t], share[t, :, None] * (v[t] - known))
        out[t] = torch.einsum("hkv,hk->hv", state, q[t])
    return out, state


def gated_delta_in_chunks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    write: torch.Tensor,
    log_rates: torch.Tensor,
) -> torch.Tensor:
    """`gated_delta` of texts from their start, some tokens at a time, with gradients: o (B, T, H, D_v).

    Of a chunk, with L_t the sum of log decays up to token t and S the state before it, what tokens write,
    u_t = b_t (v_t - (a_t S_(t-1))^T k_t), solves the unit lower triangular system

        u_t + sum over s < t of b_t exp(L_t - L_s) (k_s . k_t) u_s = b_t (v_t - exp(L_t) S^T k_t)

    and o_t = exp(L_t) S^T q_t + sum over s <= t of exp(L_t - L_s) (k_s . q_t) u_s; likewise the next S. Only the states
    between chunks are kept for the way back.

    Args:
        q, k, v, decay, write, log_rates: as for `gated_delta`, with a batch (B, ...) before the tokens.
    """
    group = v.shape[2] // k.shape[2]
    q, k = (unit(x).repeat_interleave(group, dim=2).transpose(1, 2) for x in (q, k))  # (B, H, T, D_k)
    q, v = q * q.shape[-1] ** -0.5, v.float().transpose(1, 2)
    fades, share = log_decay(decay, log_rates).transpose(1, 2), write.float().sigmoid().transpose(1, 2)[..., None]
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    outs = []
    for start in range(0, q.shape[2], CHUNK):
        part = slice(start, start + CHUNK)
        queries, keys, b = q[:, :, part], k[:, :, part], share[:, :, part]
        total = fades[:, :, part].cumsum(-1)  # L, (B, H, C)
        between = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
        since = total[..., None].exp()
        system = (b * between * (keys @ keys.transpose(-1, -2))).tril(-1)
        wanted = b * (v[:, :, part] - since * (keys @ state))
        written = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
        outs.append(since * (queries @ state) + (between * (queries @ keys.transpose(-1, -2))) @ written)
        left = (total[..., -1:] - total).exp()[..., None]
        state = total[..., -1:, None].exp() * state + (left * keys).transpose(-1, -2) @ written
    return torch.cat(outs, dim=2).transpose(1, 2)


def state_space(
    x: torch.Tensor,
    k: torch.Tensor,
    q: torch.Tensor,
    steps: torch.Tensor,
    log_rates: torch.Tensor,
    skips: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A state space (Mamba-2; Dao and Gu 2024, "Transformers are SSMs") over the tokens of one sequence.

    Per head, with d = softplus(step):

        S <- exp(-exp(log_rate) d) S + k (d x)^T,   o = S^T q + skip x

    Args:
        x: values (T, H, D_v).
        k: (T, G, D_k), B of the paper. Each of G groups is that of H / G heads, one after another.
        q: (T, G, D_k), C of the paper.
        steps: (T, H).
        log_rates: (H,).
        skips: (H,).
        state: (H, D_k, D_v), S before the first token; it is not changed.

    Returns:
        o (T, H, D_v), and S after the last token.
    """
    group = x.shape[1] // k.shape[1]
    k, q = (part.float().repeat_interleave(group, dim=1) for part in (k, q))
    x, share, keep = x.float(), torch.nn.functional.softplus(steps.float()), log_decay(steps, log_rates).exp()
    state, out = state.float(), torch.empty_like(x)
    for t in range(len(x)):
        state = state * keep[t, :, None, None] + torch.einsum("hk,hv->hkv", k[t], share[t, :, None] * x[t])
        out[t] = torch.einsum("hkv,hk->hv", state, q[t])
    return out + skips.float()[:, None] * x, state


def state_space_in_chunks(
    x: torch.Tensor,
    k: torch.Tensor,
    q: torch.Tensor,
    steps: torch.Tensor,
    log_rates: torch.Tensor,
    skips: torch.Tensor,
) -> torch.Tensor:
    """`state_space` of texts from their start, some tokens at a time, with gradients: o (B, T, H, D_v).

    Of a chunk, with L_t the sum of log decays up to token t and S the state before it, o_t is exp(L_t) S^T q_t plus the
    sum over s <= t of exp(L_t - L_s) (k_s . q_t) d_s x_s; likewise the next S.

    Args:
        x, k, q, steps, log_rates, skips: as for `state_space`, with a batch (B, ...) before the tokens.
    """
    group = x.shape[2] // k.shape[2]
    k, q = (part.float().repeat_interleave(group, dim=2).transpose(1, 2) for part in (k, q))  # (B, H, T, D_k)
    values = x.float().transpose(1, 2)
    fades = log_decay(steps, log_rates).transpose(1, 2)
    written = torch.nn.functional.softplus(steps.float()).transpose(1, 2)[..., None] * values
    state = k.new_zeros(*k.shape[:2], k.shape[-1], values.shape[-1])
    outs = []
    for start in range(0, k.shape[2], CHUNK):
        part = slice(start, start + CHUNK)
        total = fades[:, :, part].cumsum(-1)  # L, (B, H, C)
        between = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
        since = total[..., None].exp()
        scores = between * (q[:, :, part] @ k[:, :, part].transpose(-1, -2))
        outs.append(since * (q[:, :, part] @ state) + scores @ written[:, :, part])
        left = (total[..., -1:] - total).exp()[..., None]
        state = total[..., -1:, None].exp() * state + (left * k[:, :, part]).transpose(-1, -2) @ written[:, :, part]
    out = torch.cat(outs, dim=2) + skips.float()[:, None, None] * values
    return out.transpose(1, 2)


def short_convolution(x: torch.Tensor, weight: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A causal convolution of every feature by itself: out[t] = sum over i of weight[i] x[t - (W - 1) + i].

    Args:
        x: (..., T, C).
        weight: (W, C).
        state: (..., W - 1, C), the inputs before x, zeros at the start of a sequence; it is not changed.

    Returns:
        (..., T, C), and the last W - 1 inputs.
    """
    count = x.shape[-2]
    inputs = torch.cat([state.float(), x.float()], dim=-2)
    out = torch.zeros_like(x).float()
    for i in range(len(weight)):
        out = out + weight[i].float() * inputs[..., i : i + count, :]
    return out, inputs[..., count:, :].clone()
