"""What the pictures show, worked out before anything is drawn: which points compare, frontiers, intervals, ratios.

No matplotlib here. Intervals come from the cluster bootstrap (kbit.evaluate.statistics): clusters of text are drawn
with replacement, the same draw for every point that is compared, so that what the text does to both cancels.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import PurePath

import numpy as np
from numpy.typing import NDArray

from kbit.evaluate.statistics import SEED
from kbit.scaling.points import Point

# As many as put the ends of a 95 % interval within a few percent of its length: enough for a whisker in a picture.
DRAWS = 1000
# Below this a KL divergence is rounding: log axes and ratios leave it out.
KL_FLOOR = 1e-9

_COMPUTE = re.compile(r"(\w+) compute")


@dataclass(frozen=True)
class Model:
    """A model on one text, cut and tokenised in one way.

    Attributes:
        label: its name without folders, made unique by what else tells it apart.
        points: its rows, one of each method and format.
        family: which models it may be joined with by a line: same tokenizer, windows and text.
    """

    label: str
    points: tuple[Point, ...]
    family: tuple[str, ...]

    @property
    def size(self) -> int:
        """Weights of the linear layers."""
        return self.points[0].linear_parameters

    @property
    def original(self) -> Point | None:
        """Its row without quantization, where there is one."""
        return next((point for point in self.points if point.is_original), None)

    @property
    def quantized(self) -> tuple[Point, ...]:
        """Its other rows, those with a finite loss and divergence."""
        return tuple(point for point in self.points if not point.is_original and _is_finite(point))


@dataclass(frozen=True)
class View:
    """All points on one text: what one set of pictures shows.

    Attributes:
        name: the text's name.
        models: by size.
    """

    name: str
    models: tuple[Model, ...]

    @cached_property
    def points(self) -> tuple[Point, ...]:
        """All rows with a finite loss."""
        return tuple(point for model in self.models for point in model.points if _is_finite(point))

    @cached_property
    def quantized(self) -> tuple[Point, ...]:
        """Those that are not originals."""
        return tuple(point for point in self.points if not point.is_original)

    @property
    def widths(self) -> list[int]:
        """Widths measured."""
        return sorted({point.bits for point in self.quantized})

    @property
    def families(self) -> list[list[Model]]:
        """Models that lines may join, by size; the family with the most models first."""
        found: dict[tuple[str, ...], list[Model]] = defaultdict(list)
        for model in self.models:
            found[model.family].append(model)
        return sorted(found.values(), key=len, reverse=True)

    @property
    def per_byte(self) -> bool:
        """Whether losses are per byte of text: where tokenizers differ, losses per token mean nothing together."""
        return len({point.tokenizer for point in self.points}) > 1

    @property
    def unit(self) -> str:
        """Of `loss`, for an axis."""
        return "nats per byte" if self.per_byte else "nats per token"

    def loss(self, point: Point) -> float:
        """A row's loss in `unit`."""
        return point.nll_per_byte if self.per_byte else point.nll

    def without(self, keep: Callable[[Point], bool]) -> View:
        """The view with only those quantized rows that `keep` accepts; originals stay."""
        models = (
            Model(model.label, tuple(p for p in model.points if p.is_original or keep(p)), model.family)
            for model in self.models
        )
        return View(self.name, tuple(model for model in models if model.points))

    def best(self, model: Model, bits: int) -> Point | None:
        """A model's row of least loss at a width, whatever data type, block size and method."""
        return min((p for p in model.quantized if p.bits == bits), key=lambda p: p.nll, default=None)


def make_views(points: Iterable[Point]) -> list[View]:
    """Points by text, the text with most points first. Of a row measured twice, the latest counts."""
    latest: dict[tuple[object, ...], Point] = {}
    for point in points:
        key = (point.data_sha256, *_family(point), point.model_id, point.method, point.format)
        if key not in latest or latest[key].created <= point.created:
            latest[key] = point
    texts: dict[str, list[Point]] = defaultdict(list)
    for point in latest.values():
        texts[point.data_sha256].append(point)
    return [_view(found) for found in sorted(texts.values(), key=len, reverse=True)]


def frontier(view: View, bits: Callable[[Point], float]) -> list[Point]:
    """The points that no other beats: every other one has more bits, or a higher loss. By bits, rising."""
    found: list[Point] = []
    for point in sorted(view.points, key=lambda point: (bits(point), view.loss(point))):
        if not found or view.loss(point) < view.loss(found[-1]):
            found.append(point)
    return found


def kl_draws(points: Sequence[Point], draws: int = DRAWS) -> list[NDArray[np.float64]]:
    """Mean KL of each point on texts redrawn by cluster, float64 (draws,) each: the same draws for all points.

    Points with a single cluster have no spread: their arrays are empty.
    """
    times: dict[int, NDArray[np.int64]] = {}
    found = []
    for point in points:
        sizes, _, sums = point.clusters()
        count = len(sizes)
        if count < 2 or len(sums) != count or sizes.sum() <= 0:
            found.append(np.empty(0))
            continue
        if count not in times:
            generator = np.random.default_rng(SEED)
            times[count] = generator.multinomial(count, np.full(count, 1.0 / count), size=draws)
        found.append((times[count] @ sums) / (times[count] @ sizes))
    return found


def interval(draws: NDArray[np.float64], level: float = 0.95) -> tuple[float, float] | None:
    """Percentile interval of draws; None where there are none."""
    if draws.size == 0:
        return None
    low, high = np.percentile(draws, [50 * (1 - level), 100 - 50 * (1 - level)])
    return float(low), float(high)


@dataclass(frozen=True)
class Ratio:
    """How a point's KL compares with another's: value and 95 % interval (None where the clusters say nothing)."""

    value: float
    low: float | None
    high: float | None

    @property
    def differs(self) -> bool:
        """Whether the interval leaves 1 out."""
        return self.low is not None and self.high is not None and not self.low <= 1 <= self.high


def kl_ratio(point: Point, base: Point) -> Ratio | None:
    """KL(point) / KL(base) of one model on one text; None where either is too small for a ratio."""
    if min(point.kl, base.kl) < KL_FLOOR:
        return None
    ours, theirs = kl_draws([point, base])
    return _ratio(point.kl / base.kl, ours, theirs)


def kl_ratio_at_equal_bits(point: Point, base: Sequence[Point]) -> Ratio | None:
    """KL(point) over the KL that `base` would have at the point's bits per weight.

    `base` is a curve over widths; between two of its points ln KL is linear in bits per weight. None outside it.
    """
    curve = sorted((p for p in base if p.kl >= KL_FLOOR), key=lambda p: p.bits_per_weight)
    pair = next(
        (
            (a, b)
            for a, b in pairwise(curve)
            if a.bits_per_weight <= point.bits_per_weight <= b.bits_per_weight and a.bits_per_weight < b.bits_per_weight
        ),
        None,
    )
    if pair is None or point.kl < KL_FLOOR:
        return None
    left, right = pair
    share = (point.bits_per_weight - left.bits_per_weight) / (right.bits_per_weight - left.bits_per_weight)
    value = point.kl / (left.kl ** (1 - share) * right.kl**share)
    ours, low, high = kl_draws([point, left, right])
    if not (ours.size == low.size == high.size):
        return Ratio(value, None, None)
    return _ratio(value, ours, np.maximum(low, KL_FLOOR) ** (1 - share) * np.maximum(high, KL_FLOOR) ** share)


def most_common(values: Iterable[object]) -> object:
    """The value seen most often; of several, the first in order of appearance."""
    return Counter(values).most_common(1)[0][0]


def block_label(block_size: int) -> str:
    """A block size for people."""
    return f"blocks of {block_size}" if block_size else "a scale per row"


def short_name(model: str) -> str:
    """A model's name without folders."""
    return PurePath(model.rstrip("/\\")).name or model


def _ratio(value: float, ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> Ratio:
    if ours.size == 0 or ours.size != theirs.size:
        return Ratio(value, None, None)
    found = interval(ours / np.maximum(theirs, KL_FLOOR))
    return Ratio(value, None, None) if found is None else Ratio(value, *found)


def _is_finite(point: Point) -> bool:
    return bool(np.isfinite(point.nll) and np.isfinite(point.kl) and point.linear_bits > 0 and point.total_bits > 0)


def _family(point: Point) -> tuple[str, ...]:
    compute = _COMPUTE.search(point.backend)
    arithmetic = compute[1] if compute else ""
    return (point.tokenizer, point.convention, str(point.context), str(point.tokens), arithmetic)


def _view(points: list[Point]) -> View:
    rows: dict[tuple[str, ...], list[Point]] = defaultdict(list)
    for point in points:
        key = (point.model_id, *_family(point))
        rows[key].append(point)
    for found in rows.values():  # one order whatever the table's: equal tables draw equal pictures
        found.sort(key=lambda point: (not point.is_original, point.bits, point.dtype, point.block_size, point.format))
    models = sorted(rows.values(), key=lambda found: (found[0].linear_parameters, found[0].model, found[0].context))
    names = [short_name(found[0].model) for found in models]
    labels = []
    for found, name in zip(models, names, strict=True):
        twins = [other[0] for other, label in zip(models, names, strict=True) if label == name and other is not found]
        first = found[0]
        if any(twin.model_id != first.model_id for twin in twins):
            name += f" ({first.model_id[:6]})"
        if any(twin.context != first.context for twin in twins):
            name += f", context {first.context}"
        elif any(twin.tokens != first.tokens for twin in twins):
            name += f", {first.tokens} tokens"
        if any(_family(twin)[-1] != _family(first)[-1] for twin in twins):
            name += f", {_family(first)[-1] or 'other arithmetic'}"
        labels.append(name)
    found_models = (Model(label, tuple(found), _family(found[0])) for label, found in zip(labels, models, strict=True))
    return View(short_name(points[0].data), tuple(found_models))
