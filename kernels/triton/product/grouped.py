"""Products of a mixture of experts: every token with the weights of the experts it was sent to.

Shapes: x (T, K), E expert matrices (N, K) of one format, expert ids (T, TOP); out (T TOP, N): row t TOP + i is token t
with its i-th expert. The kernel is gemm's: experts lie one after the other along the row tiles (`stack_experts`),
tokens are sorted by expert into tiles of one expert each (`group_tokens`), and a program looks up whose tile it has.
Experts of trellis codes go through the trellis's kernel in the same way, once the tokens are rotated: those of a stack
have one rotation. How many tiles an expert needs is known on the GPU only: the grid has room for the worst case, one
tile per expert more than the entries fill, and surplus programs end at once, so nothing waits for the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from kbit.host.errors import UnsupportedError
from kbit.kernels.triton.codecs.joined import joined
from kbit.kernels.triton.codecs.layout import ROW_TILE, TritonWeight
from kbit.kernels.triton.product.configs import GemmConfig, Problem, gemm_config
from kbit.kernels.triton.product.gemm import launch, tokens_per_launch
from kbit.kernels.triton.product.gemv import GATES, check_product
from kbit.kernels.triton.product.outliers import add_outliers
from kbit.kernels.triton.product.trellis import launch_trellis
from kbit.kernels.triton.target import current_arch


@dataclass(frozen=True, eq=False)
class Groups:
    """Tokens sorted by expert, in tiles of one expert each.

    Attributes:
        order: int32 (tiles * tile): entries t TOP + i, sorted by expert; T TOP where a tile is not full.
        experts: int32 (tiles,): each tile's expert, -1 for a tile without entries.
        tile: entries of a tile.
        top: TOP.
        entries: T TOP.
    """

    order: torch.Tensor
    experts: torch.Tensor
    tile: int
    top: int
    entries: int


def same_format(one: TritonWeight, other: TritonWeight) -> bool:
    """Whether two weights differ in their codes and scales alone. (Quantile formats have a table for each tensor,
    trellises may have signs of their own.)"""
    for name in ("format", "shape", "dtype", "kind", "zero", "multiplier"):
        if getattr(one, name) != getattr(other, name):
            return False
    return _same(one.table, other.table) and _same(one.rotation, other.rotation)


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def stack_experts(weights: Sequence[TritonWeight]) -> TritonWeight:
    """Several prepared weights of one format and shape, one after the other, for grouped_matmul.

    The result's shape is one expert's.

    Raises:
        UnsupportedError: the weights differ in more than their values.
    """
    if not weights:
        raise UnsupportedError("there are no experts to stack")
    first = weights[0]
    for weight in weights:
        if weight.dense is not None or not same_format(first, weight):
            raise UnsupportedError(f"experts {first.format} {first.shape} and {weight.format} {weight.shape} differ")

    def join(name: str, *, stack: bool = False) -> torch.Tensor | None:
        parts = [getattr(weight, name) for weight in weights]
        if parts[0] is None:
            return None
        return torch.stack(parts) if stack else joined(parts)

    return TritonWeight(
        first.format,
        first.shape,
        first.padded,
        first.dtype,
        planes=tuple(joined(planes) for planes in zip(*(weight.planes for weight in weights), strict=True)),
        scales=join("scales"),
        scales_super=join("scales_super", stack=True),
        offsets=join("offsets"),
        offsets_super=join("offsets_super", stack=True),
        kind=first.kind,
        table=first.table,
        zero=first.zero,
        multiplier=first.multiplier,
        lift=min(weight.lift for weight in weights),
        bits=first.bits,
        block_size=first.block_size,
        rotation=first.rotation,
        mixed=first.mixed,
        window=first.window,
        half=first.half,
        **_joined_outliers(weights),
    )


def _joined_outliers(weights: Sequence[TritonWeight]) -> dict[str, Any]:
    """The weights that trellises keep apart, one matrix's after the other's; nothing where none keeps any."""
    if all(weight.outliers is None for weight in weights):
        return {}
    spans, places, values, count = [], [], [], 0
    for weight in weights:
        if weight.outliers is None:
            spans.append(torch.zeros(weight.planes[0].shape[0], 2, dtype=torch.int32, device=weight.device))
            continue
        assert weight.outlier_spans is not None
        assert weight.outlier_places is not None
        spans.append(weight.outlier_spans + count)
        places.append(weight.outlier_places)
        values.append(weight.outliers)
        count += len(weight.outliers)
    return {"outlier_spans": torch.cat(spans), "outlier_places": torch.cat(places), "outliers": torch.cat(values)}


def group_tokens(experts: torch.Tensor, count: int, tile: int) -> Groups:
    """Sort the entries of a routing by expert, without waiting for the host.

    Args:
        experts: int (T, TOP), each in [0, count), or negative: an entry that is left out.
        count: E.
        tile: entries of a tile.
    """
    top = experts.shape[1]
    flat = experts.reshape(-1).long()
    flat = torch.where(flat < 0, count, flat)  # an expert more, which has no tiles
    entries = flat.numel()
    sizes = torch.zeros(count + 1, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))
    tiles = (sizes + tile - 1) // tile
    tiles[count] = 0
    ends = tiles.cumsum(0)
    most = min(entries, entries // tile + count)  # full tiles, and one that is not full for each expert
    sorted_entries = torch.argsort(flat, stable=True)
    owner = flat[sorted_entries]
    rank = torch.arange(entries, device=flat.device) - (sizes.cumsum(0) - sizes)[owner]  # within its expert
    order = torch.full((most * tile + 1,), entries, dtype=torch.int32, device=flat.device)
    place = (ends - tiles)[owner] * tile + rank
    order[torch.where(owner == count, most * tile, place)] = sorted_entries.int()  # the last is for those left out
    index = torch.arange(most, device=flat.device)
    owners = torch.searchsorted(ends[:-1], index, right=True)
    return Groups(order[:-1], torch.where(index < ends[-1], owners, -1).int(), tile, top, entries)


def grouped_config(weight: TritonWeight, entries: int, count: int) -> GemmConfig:
    """Block sizes for a routing: tiles hold what an expert gets on average, at most 64 entries. (Of a trellis, whose
    kernel has its own otherwise, only the tile counts.)"""
    average = max(5, min(64, -(-entries // count)))
    if weight.rotation is not None:
        return GemmConfig(1, max(16, triton.next_power_of_2(average)), ROW_TILE, 1, 4, 1)
    format = weight.format if weight.nested else ""
    problem = Problem(average, *weight.padded, weight.bits, weight.block_size, format=format)
    config = gemm_config(current_arch(), problem)
    return GemmConfig(config.tiles, config.tokens, config.columns, 1, config.warps, config.stages)


def grouped_matmul(
    x: torch.Tensor,
    weight: TritonWeight,
    groups: Groups,
    out_dtype: torch.dtype | None = None,
    *,
    per_entry: bool = False,
    gate: torch.Tensor | None = None,
    kind: str = "",
    out: torch.Tensor | None = None,
    config: GemmConfig | None = None,
) -> torch.Tensor:
    """Each entry's row of x times its expert's matrix; with `gate`, act(gate) times that.

    Args:
        x: (T, K), a row per token; or (T TOP, K), a row per entry, with per_entry (a second product).
        weight: E matrices (N, K) from stack_experts.
        groups: from group_tokens, with the configuration's tokens as tile.
        out_dtype: of the result; x's by default.
        per_entry: see x.
        gate: (T TOP, N) or None: the gate's product, before its activation.
        kind: the activation.
        out: contiguous (T TOP, N), where the result goes; entries that are left out keep what is there.
        config: block sizes; chosen for the GPU by default, but with tiles of groups.tile entries.

    Returns:
        (T TOP, N).

    Raises:
        UnsupportedError: the arguments do not fit together.
    """
    check_product(x, weight, None, None)
    rows = weight.shape[0]
    expected = groups.entries if per_entry else groups.entries // groups.top
    if x.shape[0] != expected:
        raise UnsupportedError(f"x has {x.shape[0]} rows, the routing needs {expected}")
    if gate is not None and (gate.shape != (groups.entries, rows) or gate.stride(1) != 1 or kind not in GATES):
        raise UnsupportedError(f"gate must be ({groups.entries}, {rows}) with contiguous rows, activation in {GATES}")
    if config is None:
        count = weight.planes[0].shape[0] * 16 // weight.padded[0]
        chosen = grouped_config(weight, groups.entries, count)
        config = GemmConfig(chosen.tiles, groups.tile, chosen.columns, 1, chosen.warps, chosen.stages)
    if config.split != 1 or config.tokens != groups.tile:
        raise UnsupportedError(f"{config} does not fit tiles of {groups.tile} entries: one split, as many tokens")
    if out is None:
        out = torch.empty((groups.entries, rows), dtype=out_dtype or x.dtype, device=x.device)
    elif out.shape != (groups.entries, rows) or not out.is_contiguous():
        raise UnsupportedError(f"out: contiguous ({groups.entries}, {rows}) wanted, not {tuple(out.shape)}")
    if groups.entries > (most := tokens_per_launch(config, x, gate, out)):
        raise UnsupportedError(f"grouped_matmul takes at most {most} entries of such a product, not {groups.entries}")
    token_tiles = triton.cdiv(len(groups.order), groups.tile)
    top = 1 if per_entry else groups.top
    if weight.rotation is not None:
        launch_trellis(
            x, weight, out, groups.tile, token_tiles,
            gate=gate, kind=kind, order=groups.order, experts=groups.experts, top=top,
        )  # fmt: skip
        return out
    apart = weight.outliers is not None
    launch(
        x, weight, out, config, token_tiles, groups.entries, rows,
        gate=None if apart else gate, kind=kind, order=groups.order, experts=groups.experts, top=top,
    )  # fmt: skip
    if apart:
        add_outliers(
            x, weight, out,
            gate=gate, kind=kind, order=groups.order, experts=groups.experts, tile=groups.tile, top=top,
        )  # fmt: skip
    return out
