"""Single weights that are kept apart from a matrix's codes, in 16 bits each with their places.

Some weights are hundreds of times their rows' size (arXiv 2411.07191 finds such "super weights" in the down projections
of most models). One makes its block's scale too coarse for the others, and a rotation spreads it over all columns that
it mixes. Dense-and-sparse formats take them out (SpQR, Dettmers et al., arXiv 2306.03078; SqueezeLLM, arXiv
2306.07629); what is left is like normal numbers. In a row of one scale a weight of r times its spread takes
log2(1 + r^2 / K) / 2 bits of each of K weights, 0.72 r^2 in all, and kept apart 48: it pays from r = 8 on, and since
feedback hands errors on, sooner (docs/methods.md has what was measured).

Stored: outliers, fp16 (n,), and outlier_places, int32 (n,), row * K + column, ascending; what is not used is a zero at
place 0. n is part of the format.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from kbit.formats.codec import Array, Codec, Cut, Part, ReadRows
from kbit.host.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    import torch

    from kbit.formats.quant_tensor import QuantTensor

Encoder: TypeAlias = "Callable[[Codec, ReadRows], QuantTensor]"

VALUES, PLACES = "outliers", "outlier_places"
# Squares that are this many times a row's mean square are worth their bits.
WORTH = 40.0
LEAST, MOST = 4, 1 << 16  # of a matrix that has any
_PASSES = 3  # in which rows' spreads are found without their outliers
_ROWS_AT_ONCE = 1 << 22  # weights
_PLACES = 1 << 31  # of a matrix that can have any


def check_count(count: int, format: str) -> None:
    """
    Raises:
        UsageError: no format keeps so many apart.
    """
    if not 0 <= count <= MOST:
        raise UsageError(f"{format}: {count} weights kept apart; {MOST} are the most")


def outlier_parts(count: int) -> dict[str, Part]:
    """What is stored for so many."""
    return {VALUES: Part("F16", (count,)), PLACES: Part("I32", (count,))} if count else {}


def ratios(weight: torch.Tensor) -> torch.Tensor:
    """Squares in units of their row's mean square without outliers: float32 (R, K) -> float32 (R, K); rows of zeros
    have zeros, and a weight alone in its row has infinity."""
    import torch

    rows, _, own = _uneven_rows(weight)
    squares = weight.square()
    spread = squares.mean(dim=1, keepdim=True)
    spread[rows] = own
    return torch.where(squares > 0, squares / spread, 0.0)


def _uneven_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which rows of a weight (R, K) have outliers, int64 (r,), the squares of these (r, K), and their mean squares
    without outliers (r, 1)."""
    import torch

    mean = torch.linalg.vector_norm(weight, dim=1).square() / weight.shape[1]
    rows = (torch.linalg.vector_norm(weight, ord=torch.inf, dim=1).square() > WORTH * mean).nonzero()[:, 0]
    squares = weight[rows].square()
    own = mean[rows, None]
    for _ in range(_PASSES):
        own = torch.where(squares > WORTH * own, 0.0, squares).mean(dim=1, keepdim=True)
    return rows, squares, own


def worthwhile(read_rows: ReadRows, shape: tuple[int, int]) -> int:
    """How many weights of a matrix (N, K) are worth being kept apart: 0, or the power of two next to their number."""
    if shape[0] * shape[1] >= _PLACES:
        return 0
    found = 0
    for _, some in _chunks(read_rows, shape):
        _, squares, own = _uneven_rows(some)
        found += int((squares > WORTH * own).sum())
    return min(max(LEAST, 1 << round(math.log2(found))), MOST) if found else 0


def largest(read_rows: ReadRows, shape: tuple[int, int], count: int) -> dict[str, torch.Tensor]:
    """The weights that are largest beside their rows, as they are stored.

    Args:
        read_rows: of the matrix.
        shape: (N, K).
        count: how many.
    """
    import torch

    found = torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    for start, some in _chunks(read_rows, shape):
        each = ratios(some).flatten()
        at = each.topk(min(count, each.numel())).indices.sort().values
        more = each[at], at + start * shape[1], some.flatten()[at]
        found_ratios, places, values = (torch.cat(pair) for pair in zip(found, more, strict=True))
        # Of equal ones the first, so that it does not matter in what pieces they come.
        best = found_ratios.sort(descending=True, stable=True).indices[:count].sort().values
        found = found_ratios[best], places[best], values[best]
    fits = found[2].abs() <= torch.finfo(torch.float16).max
    stored = {VALUES: torch.zeros(count, dtype=torch.float16), PLACES: torch.zeros(count, dtype=torch.int32)}
    kept = int(fits.sum())
    if kept:
        stored[VALUES][-kept:] = found[2][fits].half()
        stored[PLACES][-kept:] = found[1][fits].int()
    return stored


def add_outliers(
    rows: torch.Tensor, stored: Mapping[str, torch.Tensor], columns: int, index: torch.Tensor, sign: float = 1.0
) -> torch.Tensor:
    """Some rows of a matrix with what is kept apart added to them (or, with sign -1, taken from them), in place.

    Args:
        rows: float32 (R, K or more).
        stored: of the matrix; one without outliers changes nothing.
        columns: K.
        index: which rows these are, int64 (R,).
    """
    import torch

    if VALUES not in stored or not len(stored[VALUES]):
        return rows
    places = stored[PLACES].long()
    values = sign * stored[VALUES].float()
    # (Rows can be asked for twice: where each of the matrix's is among them.)
    order = index.argsort(stable=True)
    begin = torch.searchsorted(index[order], places // columns)
    end = torch.searchsorted(index[order], places // columns, right=True)
    for nth in range(int((end - begin).amax())):
        there = begin + nth < end
        row = order[(begin + nth)[there]]
        rows.index_put_((row, (places % columns)[there]), values[there], accumulate=True)
    return rows


def scaled_outliers(stored: Mapping[str, torch.Tensor], columns: int, factors: torch.Tensor) -> dict[str, torch.Tensor]:
    """Those of a matrix each of whose rows (N, columns) is multiplied with a factor (N,); nothing of one without."""
    if VALUES not in stored:
        return {}
    return {VALUES: (stored[VALUES].float() * factors[stored[PLACES].long() // columns]).half()}


def encode_apart(format: Codec, read_rows: ReadRows, shape: tuple[int, int], encode: Encoder) -> QuantTensor:
    """A matrix whose largest weights are kept apart, the others rounded as if these were zeros.

    Args:
        format: of the whole.
        read_rows: of the matrix.
        shape: (N, K).
        encode: rounds a matrix, given as rows, to the format that keeps none apart.
    """
    import torch

    from kbit.formats.quant_tensor import QuantTensor

    apart = largest(read_rows, shape, format.outliers)

    def others(start: int, stop: int) -> torch.Tensor:
        return add_outliers(read_rows(start, stop).float().clone(), apart, shape[1], torch.arange(start, stop), -1)

    made = encode(format.keeping(0), others)
    return QuantTensor(format, shape, {**made.stored, **apart}, made.codebook)


def check_places(name: str, stored: Mapping[str, Any], shape: tuple[int, int]) -> None:
    """
    Args:
        stored: arrays of torch or numpy, from a file.

    Raises:
        CheckpointError: a weight is kept apart that the matrix does not have, or one twice.
    """
    places = stored.get(PLACES)
    if places is None or not len(places):
        return
    back, twice = places[1:] < places[:-1], (places[1:] == places[:-1]) & (places[1:] != 0)
    if int(places[0]) < 0 or int(places[-1]) >= shape[0] * shape[1] or bool((back | twice).any()):
        raise CheckpointError(
            f"{name}.{PLACES}: not places of a {shape[0]} x {shape[1]} matrix, each once and in their order: the file "
            "is damaged; convert again"
        )


def cut_outliers(stored: Mapping[str, Array], shape: tuple[int, int], cut: Cut) -> dict[str, Any]:
    """Those of a part of a matrix (N, K): as many, those elsewhere zeros at place 0. Arrays of numpy or torch."""
    arrays: dict[str, Any] = dict(stored)
    places, values = arrays[PLACES], arrays[VALUES]
    at = (places // shape[1], places % shape[1])
    inside = (at[cut.dim] >= cut.start) & (at[cut.dim] < cut.stop)
    moved = [each - (cut.start if dim == cut.dim else 0) for dim, each in enumerate(at)]
    columns = cut.shape(shape)[1]
    kept = (moved[0] * columns + moved[1]) * inside, values * inside
    order = kept[0].argsort(stable=True) if hasattr(places, "numel") else kept[0].argsort(kind="stable")
    return {PLACES: kept[0][order], VALUES: kept[1][order]}


def join_outliers(
    parts: Sequence[Mapping[str, torch.Tensor]], shapes: Sequence[tuple[int, int]]
) -> dict[str, torch.Tensor]:
    """Those of matrices (N_i, K) one below the other."""
    import torch

    places, values, start = [], [], 0
    for stored, (rows, columns) in zip(parts, shapes, strict=True):
        if PLACES in stored:
            places.append(torch.where(stored[VALUES] != 0, stored[PLACES] + start * columns, 0))
            values.append(stored[VALUES])
        start += rows
    if not places:
        return {}
    order = torch.cat(places).argsort(stable=True)
    return {VALUES: torch.cat(values)[order], PLACES: torch.cat(places)[order]}


def _chunks(read_rows: ReadRows, shape: tuple[int, int]) -> Iterator[tuple[int, torch.Tensor]]:
    step = max(1, _ROWS_AT_ONCE // shape[1])
    for start in range(0, shape[0], step):
        yield start, read_rows(start, min(start + step, shape[0])).float()
