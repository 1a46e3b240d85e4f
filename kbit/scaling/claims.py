"""Does what Dettmers and Zettlemoyer (arXiv 2212.09720) found hold on the models at hand?

Each claim of the paper that measured points can speak to is cut into comparisons: two formats of one model on the same
text, or two pairs of them. What is compared is the logarithm of the mean KL divergence from the original: it falls by
about the same amount with every bit (ln 4 if the error of the weights were all), so what a bit is worth is its slope.
(The paper had perplexity; KL is far less noisy, since it does not depend on which of the likely tokens the text happens
to contain.) Clusters of text are drawn again for all formats at once (paired bootstrap), and a comparison counts only
where its 95 % interval lies on one side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kbit.evaluate.statistics import DRAWS, SEED
from kbit.scaling.points import Point

# "No difference" from 6 bits on: this many nats per token, one percent of perplexity.
_NEGLIGIBLE = 0.01
# Formats whose KL is within 5 % are level: the difference is real where it is certain, and moves nobody.
_LEVEL = 0.05


@dataclass(frozen=True)
class Comparison:
    """One test of a claim.

    Attributes:
        model: the model.
        what: what was compared.
        holds: whether it went as the paper says; None where the text is too short to tell.
        evidence: the numbers.
    """

    model: str
    what: str
    holds: bool | None
    evidence: str


@dataclass(frozen=True)
class Claim:
    """A claim and how it fared.

    Attributes:
        name: short, for tables.
        statement: what the paper says.
        comparisons: all that the points allow.
        needs: what to measure where they allow none.
    """

    name: str
    statement: str
    comparisons: tuple[Comparison, ...]
    needs: str

    @property
    def counts(self) -> tuple[int, int, int]:
        """Comparisons in which it holds, does not, and that are too close to tell."""
        holds = [comparison.holds for comparison in self.comparisons]
        return holds.count(True), holds.count(False), holds.count(None)

    @property
    def verdict(self) -> str:
        """One of: "holds", "mostly holds", "mixed", "does not hold", "too close to tell", "not measured".

        "Mostly": at least three quarters of what could be told.
        """
        yes, no, _ = self.counts
        if not self.comparisons:
            return "not measured"
        if yes + no == 0:
            return "too close to tell"
        if no == 0:
            return "holds"
        if yes == 0:
            return "does not hold"
        return "mostly holds" if yes >= 3 * no else "mixed"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        yes, no, unclear = self.counts
        return {**asdict(self), "verdict": self.verdict, "holds": yes, "fails": no, "unclear": unclear}


def check_claims(points: Iterable[Point]) -> list[Claim]:
    """Every claim with what the points say. Points of a model on another text count as another model's."""
    models = _by_model(points)

    def claim(name: str, statement: str, needs: str, test: Callable[[_Model], Iterator[Comparison]]) -> Claim:
        return Claim(name, statement, tuple(found for model in models for found in test(model)), needs)

    return [
        claim(
            "data type",
            "at 3 and 4 bits the data type matters: quantile and normal-float types lose less than float, float less "
            "than int",
            "--dtypes nf,float,int --bits 3,4",
            _data_types,
        ),
        claim(
            "block size",
            "at 3 and 4 bits small blocks are worth their scales: a bit spent on going from the largest block to 64 "
            "buys more than one spent on the next width",
            "--block-sizes 64,row --bits 3..5",
            _block_size,
        ),
        claim(
            "6 to 8 bits",
            "from 6 bits on neither data type nor block size makes a difference (one percent of perplexity)",
            "--bits 6..8 with several data types or block sizes",
            _wide,
        ),
        claim(
            "3 bits break down",
            "curves of different widths are parallel but for 3 bits: the step from 4 to 3 costs more than the one from "
            "5 to 4",
            "--bits 3..5",
            _three_bits,
        ),
        claim(
            "exponent bits",
            "floats want half of their bits, rounded up, as exponent",
            "--dtypes float-e2,float-e3 --bits 4..6",
            _exponent,
        ),
        claim(
            "outliers at 3 bits",
            "2 % of the input features kept in 16 bits, those that vary most, are worth their bits at 3 bits",
            "--methods rtn,outliers --bits 3,4",
            lambda model: _outliers(model, 3),
        ),
        claim(
            "outliers at 4 bits",
            "at 4 bits they are not",
            "--methods rtn,outliers --bits 4,5",
            lambda model: _outliers(model, 4, pays=False),
        ),
    ]


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float

    def above(self, limit: float = 0.0) -> bool | None:
        """Whether it is above `limit`; None where the interval holds it."""
        return True if self.low > limit else False if self.high < limit else None

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


def kl_draws(point: Point) -> NDArray[np.float64]:
    """Mean KL of a point over all of its text, then over bootstrap draws of the clusters: (1 + DRAWS,).

    Points with the same clusters are drawn alike, so their draws pair.
    """
    tokens, _, kl = point.clusters()
    count = len(tokens)
    times = np.random.default_rng(SEED).multinomial(count, np.full(count, 1.0 / count), size=DRAWS)
    drawn = (times @ kl) / (times @ tokens)
    # Below any real divergence; rounding leaves formats that lose nothing at -1e-16.
    floor = 1e-12
    whole: NDArray[np.float64] = np.maximum(np.concatenate(([kl.sum() / tokens.sum()], drawn)), floor)
    return whole


def _interval(draws: NDArray[np.float64]) -> Interval:
    low, high = np.percentile(draws[1:], [2.5, 97.5])
    return Interval(float(draws[0]), float(low), float(high))


class _Model:
    """The points of one model on one text."""

    def __init__(self, name: str, points: Sequence[Point]) -> None:
        self.name = name
        self.points = points
        self._draws: dict[str, NDArray[np.float64]] = {}

    def get(self, dtype: str, bits: int, block: int, method: str = "rtn") -> Point | None:
        wanted = (method, dtype, bits, block)
        return next((p for p in self.points if (p.method, p.dtype, p.bits, p.block_size) == wanted), None)

    def dtypes(self, bits: int) -> list[str]:
        return sorted({p.dtype for p in self.points if p.bits == bits})

    def blocks(self, dtype: str, bits: int) -> list[int]:
        """Block sizes measured, ascending; one scale per row (0) is the largest."""
        found = {p.block_size for p in self.points if (p.method, p.dtype, p.bits) == ("rtn", dtype, bits)}
        return sorted(found, key=lambda size: size or 1 << 30)

    def kl(self, point: Point) -> NDArray[np.float64]:
        if point.key not in self._draws:
            self._draws[point.key] = kl_draws(point)
        return self._draws[point.key]

    def ratio(self, first: Point, second: Point) -> Interval:
        """KL of the first as a multiple of the second's."""
        return _interval(self.kl(first) / self.kl(second))

    def rate(self, coarse: Point, fine: Point) -> NDArray[np.float64]:
        """How fast ln KL falls per bit of weight spent on going from one format to the other, (1 + DRAWS,)."""
        spent = fine.bits_per_weight - coarse.bits_per_weight
        rate: NDArray[np.float64] = np.log(self.kl(coarse) / self.kl(fine)) / spent
        return rate

    def says(self, what: str, holds: bool | None, evidence: str) -> Comparison:
        return Comparison(self.name, what, holds, evidence)


def _by_model(points: Iterable[Point]) -> list[_Model]:
    groups: dict[tuple[object, ...], list[Point]] = {}
    for p in points:
        identity = (p.model_id, p.data_sha256, p.convention, p.context, p.cluster_tokens, p.backend)
        groups.setdefault(identity, []).append(p)
    models = [_Model(group[0].model, [p for p in group if not p.is_original]) for group in groups.values()]
    return [model for model in models if model.points]


def _named(size: int) -> str:
    return f"blocks of {size}" if size else "one scale per row"


def _data_types(model: _Model) -> Iterator[Comparison]:
    for bits in (3, 4):
        for block in (64, 128):
            ranking = [p for name in ("quantile", "nf", "float", "int") if (p := model.get(name, bits, block))]
            # quantile and nf are one rank: the paper's quantile type became nf.
            if [p.dtype for p in ranking[:2]] == ["quantile", "nf"]:
                ranking = ranking[1:]
            for better, worse in pairwise(ranking):
                ratio = model.ratio(worse, better)
                what = f"{better.dtype} before {worse.dtype}, {bits} bits, {_named(block)}"
                level = ratio.low > 1 - _LEVEL and ratio.high < 1 + _LEVEL
                holds = None if level else ratio.above(1.0)
                yield model.says(what, holds, f"KL of {worse.dtype} / {better.dtype}: {ratio}")


def _block_size(model: _Model) -> Iterator[Comparison]:
    for bits in (3, 4):
        for dtype in model.dtypes(bits):
            blocks = model.blocks(dtype, bits)
            if 64 not in blocks or blocks[-1] == 64:
                continue
            large, small = model.get(dtype, bits, blocks[-1]), model.get(dtype, bits, 64)
            wider = model.get(dtype, bits + 1, blocks[-1])
            if large is None or small is None or wider is None or small.linear_bits <= large.linear_bits:
                continue
            blocking, width = model.rate(large, small), model.rate(large, wider)
            yield model.says(
                f"{dtype}, {bits} bits, {_named(blocks[-1])} to 64",
                _interval(blocking - width).above(),
                f"ln KL falls by {_interval(blocking)} per bit spent on scales, {_interval(width)} per bit of width",
            )


def _wide(model: _Model) -> Iterator[Comparison]:
    for bits in (6, 7, 8):
        rivals = [p for p in model.points if p.bits == bits and p.method == "rtn"]
        if len(rivals) < 2:
            continue
        best, worst = min(rivals, key=lambda p: p.kl), max(rivals, key=lambda p: p.kl)
        gap = _interval(model.kl(worst) - model.kl(best))
        below = gap.above(_NEGLIGIBLE)
        evidence = f"{worst.format} loses {gap} nats more than {best.format}"
        yield model.says(f"{len(rivals)} formats of {bits} bits", None if below is None else not below, evidence)


def _three_bits(model: _Model) -> Iterator[Comparison]:
    for dtype in model.dtypes(3):
        for block in model.blocks(dtype, 3):
            three, four, five = (model.get(dtype, bits, block) for bits in (3, 4, 5))
            if three is None or four is None or five is None:
                continue
            step, other = model.rate(three, four), model.rate(four, five)
            yield model.says(
                f"{dtype}, {_named(block)}",
                _interval(step - other).above(),
                f"ln KL rises by {_interval(step)} from 4 to 3 bits, by {_interval(other)} from 5 to 4",
            )


def _exponent(model: _Model) -> Iterator[Comparison]:
    for bits in range(3, 9):
        floats = [p for p in model.points if p.bits == bits and p.method == "rtn" and _exponent_bits(p) is not None]
        for block in sorted({p.block_size for p in floats}):
            rivals = {_exponent_bits(p): p for p in floats if p.block_size == block}
            ours = rivals.get(-(-bits // 2))
            if ours is None or len(rivals) < 2:
                continue
            others = [p for p in rivals.values() if p is not ours]
            rival = min(others, key=lambda p: p.kl)
            ratio = model.ratio(rival, ours)
            yield model.says(
                f"{bits} bits, {_named(block)}",
                ratio.above(1.0),
                f"best other: {rival.format}, KL {ratio} times that of {ours.format}",
            )


def _exponent_bits(point: Point) -> int | None:
    """Of a float on OCP's grid, whose exponents differ in nothing else."""
    from kbit.formats.quant_format import QuantFormat

    if not point.dtype.startswith("float"):
        return None
    format = QuantFormat.parse(point.format)
    return format.exponent_bits if format.dtype == "float" and format.grid == "ocp" else None


def _outliers(model: _Model, bits: int, *, pays: bool = True) -> Iterator[Comparison]:
    for point in model.points:
        if point.method != "outliers" or point.bits != bits:
            continue
        plain = model.get(point.dtype, bits, point.block_size)
        wider = model.get(point.dtype, bits + 1, point.block_size)
        if plain is None or wider is None:
            continue
        outliers, width = model.rate(plain, point), model.rate(plain, wider)
        better = _interval(outliers - width).above()
        yield model.says(
            point.format,
            None if better is None else better is pays,
            f"ln KL falls by {_interval(outliers)} per bit spent on outliers, {_interval(width)} per bit of width",
        )
