"""What mixtures of experts mean, in plain torch and float32: `kbit.graph.experts` describes them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kbit.host.errors import UnsupportedError


def route(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    chosen: int,
    score: str,
    normalise: bool,
    scale: float,
    groups: int = 1,
    chosen_groups: int = 1,
    group_score: str = "two best",
    jitter: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which experts every token goes to, and what their results weigh.

    "softmax" and "softmax_of_chosen" choose by logits, "sigmoid" by scores, as "softmax" with a bias does (Shazeer et
    al. 2017; groups and the bias: DeepSeek-V3, arXiv 2412.19437). Of equals the one of lower index is chosen.

    Args:
        logits: (R, E).
        bias: (E,), added where experts are chosen; or None.
        chosen, score, normalise, scale, groups, chosen_groups, group_score, jitter: see `kbit.graph.experts.Routing`.

    Returns:
        int64 (R, chosen), experts in ascending order, and float32 (R, chosen), their weights.

    Raises:
        UnsupportedError: a score of an unknown name.
    """
    logits = logits.float()
    if score == "sparsemixer":
        experts, weights = _sparsely(logits, jitter)
        return experts, weights * scale
    if score == "sigmoid":
        scores = torch.sigmoid(logits)
    elif score == "softmax":
        scores = torch.softmax(logits, dim=-1)
    elif score == "softmax_of_chosen":
        scores = logits
    else:
        raise UnsupportedError(f"score {score!r} is not one of softmax, sigmoid, softmax_of_chosen, sparsemixer")
    with torch.no_grad():
        ranked = scores if score == "sigmoid" or (score == "softmax" and bias is not None) else logits
        ranked = ranked if bias is None else ranked + bias.float()
        if groups > 1:
            parts = ranked.view(len(ranked), groups, -1)
            best = _top(
                parts.topk(1 if group_score == "best" else 2, dim=-1).values.sum(-1), chosen_groups
            )  # (R, chosen_groups)
            out = torch.ones(len(ranked), groups, dtype=torch.bool, device=ranked.device).scatter_(1, best, False)
            ranked = parts.masked_fill(out[..., None], -torch.inf).flatten(1)
        experts = _top(ranked, chosen).sort(dim=-1).values
    weights = scores.gather(1, experts)
    if score == "softmax_of_chosen":
        weights = torch.softmax(weights, dim=-1)
    if normalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return experts, weights * scale


def _sparsely(logits: torch.Tensor, jitter: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Two experts of each row, one after the other, and their shares of those near them: (R, E) -> (R, 2) each."""
    left, found = logits, []
    for _ in range(2):
        most, best = left.max(dim=-1, keepdim=True)
        far = (most - logits) / torch.maximum(logits.abs(), most) > 2 * jitter
        shares = torch.softmax(left.masked_fill(far, -torch.inf), dim=-1)
        found.append((best, shares.gather(1, best)))
        left = left.scatter(1, best, -torch.inf)
    experts, order = torch.cat([best for best, _ in found], dim=1).sort(dim=1)
    return experts, torch.cat([share for _, share in found], dim=1).gather(1, order)


def clamped_gate(gate: torch.Tensor, up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """gpt-oss's gated activation, float32: see `kbit.graph.experts.Clamp`. All are (..., I)."""
    gate, up = gate.float().clamp(max=limit), up.float().clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def mix(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    compute: Callable[[int, torch.Tensor], torch.Tensor],
    scales_input: bool = False,
) -> torch.Tensor:
    """The weighted sums of what the chosen experts make of their tokens, added up in the order of experts.

    Args:
        x: (R, K).
        experts: int64 (R, chosen).
        weights: float32 (R, chosen).
        compute: (expert, its tokens' rows of x (r, K)) -> (r, K).
        scales_input: weights multiply these rows, and the sums are of the results as they are.

    Returns:
        (R, K) float32.
    """
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in torch.unique(experts).tolist():
        rows, places = (experts == expert).nonzero(as_tuple=True)
        weighed = weights[rows, places, None]
        made = compute(expert, x[rows] * weighed) if scales_input else compute(expert, x[rows]).float() * weighed
        out = out.index_add(0, rows, made.float())
    return out


def _top(values: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the largest values of each row, the lower index first among equals: (R, n) -> (R, count)."""
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :count]
