"""Rounding a matrix to a trellis code, tile by tile, so that later tiles make good the errors of earlier ones.

The same sums as in kbit.quantizers.ldlq, with blocks of 16 columns in place of single ones (QTIP, Tseng et al., arXiv
2406.11235; QuIP#, arXiv 2402.04396), in rotated columns: of a matrix W R, whose inputs are rotated too, the cost of an
error E is tr(H_O E R' H_I R E'). With R' H_I R = L D L', L unit lower triangular in blocks, and H_O = M G M' likewise,
the tile in row i and column j is searched for

    W_ij + sum over j' > j of E_ij' L_j'j  +  sum over i' > i of M_i'i' (E L)_i'j

from the last row and column to the first. Tiles on one anti-diagonal do not know of each other: they are searched
together. Where M is the identity (one-sided), all tiles of a column are.

Within a tile an error E costs tr(G_i E D_j E'), G_i and D_j the blocks of 16 x 16 in G and D. With D_j = C S C', C
upper triangular with ones on its diagonal and S diagonal, and G_i = R T R' likewise, that is a weighted sum of the
squares of R' E C. Where `Settings.within_tiles` says so, the search goes by these, all alike, in place of those of E
(kernels/cpu/rounding/trellis.h).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kbit.backends.reference.products import product_with_rows
from kbit.calibration.factors import Factors
from kbit.formats.blockwise import check_finite
from kbit.formats.quant_tensor import QuantTensor
from kbit.formats.rotation import new_signs, rotate, rotate_factor
from kbit.formats.trellis import FAST_WINDOW, TILE, TrellisFormat, least_window
from kbit.formats.trellis_code import TileFactors, search, tile_levels
from kbit.quantizers.ldlq import damped, unit_in_blocks
from kbit.quantizers.row_scales import solve_for_rows
from kbit.quantizers.settings import Settings

# How much of a row's spread the code's is to be, tried on some tiles: feedback widens what is to be coded, and a code
# with thin tails (sum2) is better off with less of it.
SHARES = (0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1)
SAMPLED_TILES = 4  # rows of tiles that they are tried on
# Rows whose scales are fitted together, by a Cholesky factor of as many rows; of more, each by itself.
_MOST_REFITTED = 4096
# Tiles whose errors are told to all others at once: what is formed in between has 16 rows of the matrix for each.
_TOGETHER = 32


@dataclass(frozen=True, eq=False)
class TileFeedback:
    """How errors are passed on from tile to tile, in rotated columns.

    Attributes:
        signs: of the rotation, uint8.
        columns: L in whole tiles, float32 (K, K); None: errors are not passed on.
        inputs: H_I in rotated columns with its damping, float32 (K, K); None: the identity.
        rows: M in whole tiles, float32 (N, N); None for the identity.
        outputs: H_O in whole tiles with its damping, float32 (N, N); None for the identity.
        within: C of every column of tiles and R of every row of tiles, float32 (K / 16, 16, 16) and (N / 16, 16, 16);
            None: errors are not passed on within tiles.
    """

    signs: torch.Tensor
    columns: torch.Tensor | None
    inputs: torch.Tensor | None
    rows: torch.Tensor | None
    outputs: torch.Tensor | None = None
    within: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def of(cls, factors: Factors | None, settings: Settings, columns: int, format: TrellisFormat) -> TileFeedback:
        """What a matrix of so many columns gets from its factors, or from none."""
        signs = new_signs(columns)
        if factors is None or not settings.feedback:
            return cls(signs, None, None, None)
        rotated = rotate_factor(factors.inputs, signs, format.columns_mixed(columns))
        inputs, lower = damped(rotated, settings.input_damping)
        in_columns = _unit_upper(lower)
        unit_in_blocks(lower, TILE)
        rows = outputs = within = None
        if settings.two_sided and factors.outputs is not None and factors.outputs.dim() == 2:
            known, found = damped(factors.outputs, settings.output_damping)
            size = -(-len(found) // TILE) * TILE
            rows, outputs = torch.eye(size), torch.eye(size)
            rows[: len(found), : len(found)] = found
            outputs[: len(found), : len(found)] = known
            within = (in_columns, _unit_upper(rows)) if settings.within_tiles else None
            unit_in_blocks(rows, TILE)
        return cls(signs, lower, inputs, rows, outputs, within)


def round_trellis(
    weight: torch.Tensor,
    format: TrellisFormat,
    feedback: TileFeedback,
    settings: Settings,
    *,
    threads: int = 1,
    name: str = "tensor",
) -> QuantTensor:
    """A matrix in a trellis format. The result does not depend on the number of threads.

    Args:
        weight: float32 (N, K).
        format: of it, without weights kept apart.
        feedback: of its factors.
        settings: see there; those of blocks of scales do not apply.
        threads: for the search.
        name: what to call the matrix in errors.

    Raises:
        KbitError: the matrix holds NaN or infinity, or rows whose scales do not fit fp16.
    """
    rows, columns = weight.shape
    check_finite(weight, 0, rows, name)
    rotated = rotate(weight, feedback.signs, format.columns_mixed(columns))
    rotated = torch.nn.functional.pad(rotated, (0, 0, 0, -rows % TILE))
    spread = rotated.square().mean(dim=1, keepdim=True).sqrt()
    share = _best_share(rotated, spread, format, feedback, threads) if settings.search else format.share
    scales = format.stored_scales(spread / share, name)
    if feedback.rows is None:
        strings, _ = _round_by_columns(rotated, scales.float(), format, feedback.columns, threads)
    else:
        assert feedback.columns is not None
        strings = _round_by_diagonals(rotated, scales.float(), format, feedback, threads)
    if feedback.inputs is not None:
        scales = format.stored_scales(_refitted(rotated, scales.float(), strings, format, feedback), name)
    stored = {"codes": strings, "scales": scales[:rows].contiguous(), "signs": feedback.signs}
    return QuantTensor(format, (rows, columns), stored, torch.zeros(0))


def _unit_upper(lower: torch.Tensor) -> torch.Tensor:
    """Of each block B of 16 x 16 on the diagonal of L (N, N), lower triangular: U, upper triangular with ones on its
    diagonal, where B B' = U S U' and S is diagonal. float32 (N / 16, 16, 16)."""
    count = len(lower) // TILE
    corners = lower.view(count, TILE, count, TILE).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    blocks = corners @ corners.transpose(1, 2)
    upper: torch.Tensor = torch.linalg.cholesky(blocks.flip(1, 2)).flip(1, 2)
    return upper / upper.diagonal(dim1=1, dim2=2)[:, None]


def _best_share(
    rotated: torch.Tensor, spread: torch.Tensor, format: TrellisFormat, feedback: TileFeedback, threads: int
) -> float:
    """The share of a row's spread that costs least on some of the tiles, coded with a short window."""
    fast = format if format.code == "int" else replace(format, window=max(FAST_WINDOW, least_window(format.width)))
    count = len(rotated) // TILE
    chosen = torch.linspace(0, count - 1, min(count, SAMPLED_TILES)).long()
    tiles = rotated.view(count, TILE, -1)[chosen].flatten(0, 1)
    scale = spread.view(count, TILE, 1)[chosen].flatten(0, 1)
    scales = torch.cat([scale / share for share in SHARES])
    weights = tiles.repeat(len(SHARES), 1)
    _, error = _round_by_columns(weights, scales, fast, feedback.columns, threads)
    heard = error if feedback.inputs is None else error @ feedback.inputs
    cost = (heard * error).view(len(SHARES), -1).sum(dim=1, dtype=torch.float64)
    return SHARES[int(cost.argmin())]


def _round_by_columns(
    weights: torch.Tensor, scales: torch.Tensor, format: TrellisFormat, lower: torch.Tensor | None, threads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that do not know of each other: strings (N / 16, K / 16, bytes of a ring), and errors (N, K)."""
    rows, columns = weights.shape
    strings = torch.empty(rows // TILE, columns // TILE, format.tile_bytes, dtype=torch.uint8)
    errors = torch.zeros_like(weights)
    if lower is None:
        unit = _in_units(weights, scales).view(rows // TILE, TILE, columns // TILE, TILE)
        flat = search(format, unit.transpose(1, 2).reshape(-1, TILE * TILE), threads)
        strings = flat.view(strings.shape)
        levels = tile_levels(format, flat).view(rows // TILE, columns // TILE, TILE, TILE)
        return strings, weights - _values(levels.transpose(1, 2).reshape(rows, columns), scales, format)
    heard = torch.zeros_like(weights)  # E L of the finished columns
    for start in reversed(range(0, columns, TILE)):
        block = slice(start, start + TILE)
        target = weights[:, block] + heard[:, block]
        found = search(format, _in_units(target, scales).view(-1, TILE * TILE), threads)
        strings[:, start // TILE] = found
        error = weights[:, block] - _values(tile_levels(format, found).view(rows, TILE), scales, format)
        errors[:, block] = error
        heard[:, : block.stop] += error @ lower[block, : block.stop]
    return strings, errors


def _round_by_diagonals(
    weights: torch.Tensor,
    scales: torch.Tensor,
    format: TrellisFormat,
    feedback: TileFeedback,
    threads: int,
) -> torch.Tensor:
    """Rows that hear of those below: strings (N / 16, K / 16, bytes of a ring)."""
    lower, rows_lower = feedback.columns, feedback.rows
    assert lower is not None
    assert rows_lower is not None
    size, columns = weights.shape
    high, wide = size // TILE, columns // TILE
    within = None if feedback.within is None else _in_units_of_rows(*feedback.within, scales)
    tiles = weights.view(high, TILE, wide, TILE)
    by_columns = lower.view(wide, TILE, columns)
    by_rows = rows_lower.view(high, TILE, size)
    heard = torch.zeros_like(weights)  # E L
    heard_tiles = heard.view(high, TILE, wide, TILE)
    below = torch.zeros(wide, size, TILE)  # M' E L of the rows below, without their own
    strings = torch.empty(high, wide, format.tile_bytes, dtype=torch.uint8)
    for diagonal in reversed(range(high + wide - 1)):
        i = torch.arange(max(0, diagonal - wide + 1), min(high, diagonal + 1))
        j = diagonal - i
        scale = scales.view(high, TILE, 1)[i]
        target = tiles[i, :, j] + heard_tiles[i, :, j] + below.view(wide, high, TILE, TILE)[j, i]
        factors = None if within is None else TileFactors(within.columns[j], within.rows[i])
        found = search(format, _in_units(target, scale).view(-1, TILE * TILE), threads, factors)
        strings[i, j] = found
        error = tiles[i, :, j] - _values(tile_levels(format, found), scale, format)
        for start in range(0, len(i), _TOGETHER):
            some = slice(start, start + _TOGETHER)
            up, left = i[some], j[some]
            first, last = int(up[0]), int(up[-1]) + 1
            stop = (int(left[0]) + 1) * TILE  # the rightmost of these tiles ends here
            told = torch.bmm(error[some], by_columns[left, :, :stop])
            heard.view(high, TILE, columns)[first:last, :, :stop] += told
            own = heard_tiles[up, :, left]  # (n, 16, 16): E L of these tiles is complete now
            below[left, : last * TILE] += torch.bmm(by_rows[up, :, : last * TILE].transpose(1, 2), own)
    return strings


def _refitted(
    rotated: torch.Tensor, scales: torch.Tensor, strings: torch.Tensor, format: TrellisFormat, feedback: TileFeedback
) -> torch.Tensor:
    """The scales of rows (N, 1) that cost least with these codes, before they are rounded.

    With values V, errors E and scales times 1 + d, the cost is quadratic in d: its matrix is H_O * (V H_I V'), entry by
    entry, and its falling slope the diagonal of H_O E H_I V'.
    """
    high, wide = strings.shape[:2]
    levels = tile_levels(format, strings.flatten(0, 1)).view(high, wide, TILE, TILE).transpose(1, 2)
    values = _values(levels.reshape(rotated.shape), scales, format)
    assert feedback.inputs is not None
    heard = product_with_rows(values, feedback.inputs)  # V H_I, symmetric
    error = rotated - values
    if feedback.outputs is None or len(rotated) > _MOST_REFITTED:
        slope, curve = (error * heard).sum(dim=1), (values * heard).sum(dim=1)
        change = torch.where(curve > 0, slope / curve, 0.0)
    else:
        curves = feedback.outputs * product_with_rows(heard, values)
        slopes = (feedback.outputs * product_with_rows(error, heard)).sum(dim=0)
        found = solve_for_rows(curves, slopes)
        if found is None:
            return scales
        change = found
    return scales * (1 + change.clamp(-0.5, 0.5))[:, None]


def _in_units_of_rows(columns: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor) -> TileFactors:
    """Factors of columns and rows of tiles (`TileFeedback.within`) where errors are in units of their rows' scales."""
    own = scales.view(-1, TILE, 1)
    # (What a row of zeros is off by is no error in these units.)
    return TileFactors.of(
        columns, torch.where(own > 0, rows * own, 0.0) / torch.where(own > 0, own, 1.0).transpose(1, 2)
    )


def _in_units(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return values / torch.where(scales > 0, scales, torch.ones(()))


def _values(levels: torch.Tensor, scales: torch.Tensor, format: TrellisFormat) -> torch.Tensor:
    return levels.float() * (format.step * scales)
