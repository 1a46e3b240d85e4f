"""What the measurements say, in sentences, and no more than they say.

Each finding answers one question that the paper asked (Dettmers and Zettlemoyer, "The case for 4-bit precision", 2023),
with its numbers and intervals, and says whether the paper's answer holds here: "yes", "no", "tied" (the data cannot
tell), "not enough data", or "no claim" where the paper gave none. Names of models, files and methods in the texts come
from outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kbit.scaling.laws.best_width import ANY, BestWidths
from kbit.scaling.laws.bootstrap import Array, interval
from kbit.scaling.laws.curves import make_curves
from kbit.scaling.laws.fit import Laws, SuiteLaws
from kbit.scaling.laws.forms import target_of
from kbit.scaling.laws.heldout import BETWEEN, OUTER, UNKNOWN_LOSS, HeldOut
from kbit.scaling.points import Point

YES, NO, TIED, NOT_ENOUGH, NO_CLAIM = "yes", "no", "tied", "not enough data", "no claim"
# A loss higher by this is 1 % of perplexity: what "near-optimal" is taken to allow.
NEAR = 0.01
# Loss errors of held-out formats that count as predicted.
GOOD_PREDICTION = 0.02
# Block sizes closer than this factor are near each other: the paper compares 64 with 1024, and recommends 64 to 128.
_APART = 4
_AXIS = {"linear": "bits of the linear layers", "total": "all stored bits"}


@dataclass(frozen=True)
class Finding:
    """One answer.

    Attributes:
        topic: what was asked: "best width", "four bits", "data types", "block size", "wide formats", "biased formats",
            "laws", "unmeasured models".
        text: the answer, a sentence or a few. Holds names from outside.
        holds: YES, NO, TIED, NOT_ENOUGH or NO_CLAIM.
        main: whether it belongs into a short account.
        suite: name of the suite.
    """

    topic: str
    text: str
    holds: str
    main: bool
    suite: str


# text, holds, main
_Said = tuple[str, str, bool]


def conclude(laws: Laws) -> list[Finding]:
    """All findings of every suite."""
    return [finding for suite in laws.suites for finding in _conclude(suite)]


def conclusion_text(laws: Laws) -> str:
    """The main findings as plain text: a block for each suite, its name first, then a line for each topic."""
    if not laws.suites:
        return "\n".join(["Nothing was measured that could be compared.", *laws.notes])
    blocks = []
    for suite in laws.suites:
        topics: dict[str, list[str]] = {}
        for finding in _conclude(suite):
            if finding.main:
                topics.setdefault(finding.topic, []).append(finding.text)
        lines = [suite.suite.name]
        lines += [f"{topic.capitalize()}: {' '.join(texts)}" for topic, texts in topics.items()]
        if suite.missing:
            lines.append(f"Not said: {'; '.join(suite.missing)}.")
        blocks.append("\n".join(lines))
    if laws.notes:
        blocks.append("\n".join(laws.notes))
    return "\n\n".join(blocks)


def _conclude(laws: SuiteLaws) -> Iterator[Finding]:
    for method in laws.suite.methods:
        for topic, find in _TOPICS.items():
            for text, holds, main in find(laws, method):
                # With one method, its name would only be repeated.
                named = f"{method}: {text}" if len(laws.suite.methods) > 1 else text[:1].upper() + text[1:]
                yield Finding(topic, named, holds, main, laws.suite.name)


def _best_widths(laws: SuiteLaws, method: str) -> Iterator[_Said]:
    for axis in ("total", "linear"):
        best = best_of(laws.best, method, axis)
        if best is not None:
            text, holds = _best_width(best)
            yield text, holds, best.window is not None or axis == "total"
    for axis, title in _AXIS.items():
        parts = []
        for best in laws.best:
            if (best.method, best.axis) == (method, axis) and best.dtype != ANY and best.k_star:
                first, *others = best.k_star
                tied = [_width(star.bits) for star in others if star.tied]
                parts.append(f"{best.dtype} {_width(first.bits)}" + (f" (tied with {', '.join(tied)})" if tied else ""))
        if len(parts) > 1:
            yield f"best by data type, {title}: {'; '.join(parts)}.", NO_CLAIM, False


def _best_width(best: BestWidths) -> tuple[str, str]:
    if best.window is None:
        return f"which width is best by {_AXIS[best.axis]} cannot be said: {best.why}.", NOT_ENOUGH
    first, *others = best.k_star
    text = f"{_AXIS[best.axis]}, {_size(best.window[0])} to {_size(best.window[1])}: "
    tied = [star for star in others if star.tied]
    text += f"{_width(first.bits)} has the lowest loss, with probability {_chance(first.probability)} over the text"
    for star in tied:
        text += (
            f"; {_width(star.bits)} cannot be told from it ({star.regret:+.4f} nats per token, "
            f"{star.regret_low:+.4f} to {star.regret_high:+.4f})"
        )
    behind = [star for star in others if not star.tied]
    if behind:
        star = behind[0]
        text += (
            f"; {_width(star.bits)} is behind by {star.regret:.3f} ({star.regret_low:.3f} to {star.regret_high:.3f})"
        )
    text += "."
    changed = [(model, bits) for model, bits in best.without if bits is not None and bits != first.bits]
    for model, bits in changed:
        text += f" Without {model} it would be {_width(bits)}."
    bent = best.curved is not None and best.curved != first.bits
    if bent and best.curved is not None:
        text += (
            f" Reading the curves between the models as parabolas instead of lines makes it {_width(best.curved)}: "
            "the models lie too far apart in size to decide."
        )
    edge = [bits for bits in best.widths if bits < 16]
    if edge and first.bits in (edge[0], edge[-1]) and first.bits not in (2, 8):
        text += f" It is the {'narrowest' if first.bits == edge[0] else 'widest'} measured."
    if len(best.without) < 3:
        text += " Two models: no check of how much the choice of models matters."
    return text, TIED if tied or changed or bent else YES


def _four_bits(laws: SuiteLaws, method: str) -> Iterator[_Said]:
    best = best_of(laws.best, method)
    if best is None or 4 not in best.widths:
        return
    head = "the paper finds 4 bits near-optimal at a given number of total bits."
    four = next((star for star in best.k_star if star.bits == 4), None)
    if best.window is None:
        yield f"{head} These models cannot say.", NOT_ENOUGH, False
    elif four is None:
        yield f"{head} Here {_width(best.k_star[0].bits)} is best, and 4 bits does not come near.", NO, True
    elif four is best.k_star[0]:
        yield f"{head} Here it has the lowest loss.", YES, True
    else:
        text = f"{head} Here 4 bits is {four.regret:.4f} nats per token behind {_width(best.k_star[0].bits)} "
        text += f"({four.regret_low:.4f} to {four.regret_high:.4f}; {NEAR} is 1 % of perplexity)."
        yield text, YES if four.regret_high <= NEAR else NO if four.regret_low > NEAR else TIED, True


def _log_kl(laws: SuiteLaws, method: str) -> dict[tuple[str, int, str, int], Array]:
    """ln KL (1 + R,) by (model, bits, data type, block size), where positive."""
    found = {}
    for index, point in enumerate(laws.suite.points):
        if point.method == method and laws.draws.kl[index].min() > 0:
            found[point.model_id, point.bits, point.dtype, point.block_size] = np.log(laws.draws.kl[index])
    return found


def _data_types(laws: SuiteLaws, method: str) -> Iterator[_Said]:
    measured = _log_kl(laws, method)
    asked = False
    for bits in sorted({key[1] for key in measured}):
        cells: dict[tuple[str, int], dict[str, Array]] = {}
        for (model, width, dtype, block), values in measured.items():
            if width == bits:
                cells.setdefault((model, block), {})[dtype] = values
        names = sorted({dtype for cell in cells.values() for dtype in cell})
        if "int" not in names:
            continue
        ratios: dict[str, tuple[float, float, float]] = {}
        for dtype in names:
            pairs = [cell[dtype] - cell["int"] for cell in cells.values() if dtype in cell and "int" in cell]
            if dtype != "int" and pairs:
                mean = np.mean(pairs, axis=0)
                low, high = interval(mean, laws.level)
                ratios[dtype] = math.exp(mean[0]), math.exp(low), math.exp(high)
        if not ratios:
            continue
        parts = [
            f"{dtype} {m:.2f} ({a:.2f} to {b:.2f})" for dtype, (m, a, b) in sorted(ratios.items(), key=lambda r: r[1])
        ]
        text = f"{bits} bits: divergence over that of int at the same block size: {', '.join(parts)}."
        asked = True
        better = [dtype for dtype in ("quantile", "nf", "float") if dtype in ratios]
        claimed = [ratios[dtype] for dtype in better]
        if bits not in (3, 4) or not claimed:  # the paper ranks data types where they matter to the scaling
            yield text, NO_CLAIM, False
        elif all(high < 1 for _, _, high in claimed):
            yield f"{text} As in the paper, integers lose more than {' and '.join(better)}.", YES, True
        elif any(low > 1 for _, low, _ in claimed):
            yield f"{text} Unlike in the paper, integers do not lose more than {' and '.join(better)}.", NO, True
        else:
            yield text, TIED, True
    if not asked:
        yield "no data type was measured beside int at the same width and block size.", NOT_ENOUGH, False


def _block_sizes(laws: SuiteLaws, method: str) -> Iterator[_Said]:
    """Smallest against largest block size at equal total bits."""
    points, nll = laws.suite.points, laws.draws.nll
    curves = {
        (curve.dtype, curve.bits, points[curve.rows[0]].block_size): curve
        for curve in make_curves(points, "total", nll[:, 0])
        if curve.method == method and points[curve.rows[0]].block_size > 0
    }
    for bits in sorted({key[1] for key in curves}):
        sizes = sorted({key[2] for key in curves if key[1] == bits})
        if len(sizes) < 2:
            continue
        small, large = sizes[0], sizes[-1]
        differences = []
        for dtype in sorted({key[0] for key in curves if key[1] == bits}):
            first, second = curves.get((dtype, bits, small)), curves.get((dtype, bits, large))
            if first is None or second is None:
                continue
            low, high = max(first.x[0], second.x[0]), min(first.x[-1], second.x[-1])
            if low < high:
                at = np.linspace(low, high, 21)
                differences.append((first.read(nll, at)[0] - second.read(nll, at)[0]).mean(axis=0))
        if not differences:
            continue
        mean = np.mean(differences, axis=0)
        low, high = interval(mean, laws.level)
        text = (
            f"{bits} bits: blocks of {small} instead of {large} change the loss at equal total bits by "
            f"{mean[0]:+.4f} nats per token ({low:+.4f} to {high:+.4f})"
        )
        helps, hurts = high < 0, low > 0
        text += (
            ": small blocks pay." if helps else ": large blocks are better." if hurts else ": no difference to be seen."
        )
        # The paper: small blocks help at 3 to 5 bits, nothing helps from 6 on; of 64 and 128 it prefers neither.
        claim = helps if bits <= 5 else not helps
        holds = YES if claim else TIED if not (helps or hurts) else NO
        yield text, holds if large >= _APART * small else NO_CLAIM, bits in (3, 4)


def _wide(laws: SuiteLaws, method: str) -> Iterator[_Said]:
    positions = {point.model_id: index for index, point in enumerate(laws.suite.points) if point.is_original}
    for bits in (6, 8):
        rows = [
            index
            for index, point in enumerate(laws.suite.points)
            if point.method == method and point.bits == bits and point.model_id in positions
        ]
        if not rows:
            continue
        nll = laws.draws.nll
        delta = (nll[rows] - nll[[positions[laws.suite.points[row].model_id] for row in rows]]).mean(axis=0)
        low, high = interval(delta, laws.level)
        text = f"{bits} bits: on average the loss changes by {delta[0]:+.4f} nats per token "
        text += f"({low:+.4f} to {high:+.4f}): no format of this width can gain more than that."
        yield text, YES if high < NEAR else TIED if low < NEAR else NO, bits == 6


def _biased(laws: SuiteLaws, method: str) -> Iterator[_Said]:
    own = laws.methods.get(method)
    trained = own.trained.get("format") if own is not None else None
    if trained is None:
        return
    shifted: dict[str, Point] = {}
    for point in laws.suite.points:
        if point.method == method and target_of(point).region == "shifted":
            shifted.setdefault(point.format, point)
    factors = {format: math.exp(trained.factors[format][0]) for format in shifted if format in trained.factors}
    if factors:
        listed = ", ".join(f"{format} {factor:.1f} times" for format, factor in factors.items())
        text = (
            f"the codebook is not symmetric and moves the mean of the weights, an error that adds up along a "
            f"row; against the divergence that the size of the error accounts for: {listed}."
        )
        yield text, NO_CLAIM, True


def _laws(laws: SuiteLaws, method: str) -> Iterator[_Said]:
    judged = [
        held for held in laws.heldout if held.method == method and held.left_out == "a format" and held.near_count
    ]
    nothing = next((held for held in judged if held.form == "nothing"), None)
    judged = [held for held in judged if held.form != "nothing"]
    if not judged or nothing is None:
        yield "too few formats to judge a law by leaving some out.", NOT_ENOUGH, True
        return
    best = min(judged, key=_by_divergence)
    text = (
        f'formats left out, of 3 bits and more: "{best.form}" predicts their loss to '
        f"{_percent(best.near_median)} (median) and {_percent(best.near_worst)} (worst of {best.near_count}); that "
        f"quantizing costs nothing would be off by {_percent(nothing.near_median)} and {_percent(nothing.near_worst)}."
    )
    if best.kl_factor is not None:
        text += f" Half of all divergences are predicted within a factor of {best.kl_factor:.2f}."
    if best.count > best.near_count:
        text += f" With coarser formats the worst is {_percent(best.worst)} ({best.worst_point})."
    good = (best.near_worst or 0.0) <= GOOD_PREDICTION
    yield text, YES if good else NO, True
    fit = next((fit for fit in laws.fits if fit.method == method and fit.name == "error"), None)
    s = next((parameter for parameter in fit.parameters if parameter.name == "s"), None) if fit is not None else None
    if s is not None:
        text = f"the divergence grows as the error of the weights to the power {s.value:.3f} "
        text += f"({s.low:.3f} to {s.high:.3f})"
        near_one = abs(s.value - 1) < 0.05
        text += ": it is proportional to it." if near_one else "; theory expects 1."
        yield text, NO_CLAIM, True


def _unmeasured(laws: SuiteLaws, method: str) -> Iterator[_Said]:
    for left_out in (BETWEEN, OUTER):
        for suffix in ("", UNKNOWN_LOSS):
            judged = [held for held in laws.heldout if (held.method, held.left_out) == (method, left_out + suffix)]
            judged = [held for held in judged if held.near_median is not None and held.form != "interpolation"]
            if not judged:
                continue
            best = min(judged, key=_by_divergence)
            text, holds = _unmeasured_text(left_out + suffix, best)
            yield text, holds, left_out == OUTER


def _by_divergence(held: HeldOut) -> float:
    """What forms are chosen by: errors of the loss are mostly its own noise where quantizing costs little."""
    return held.kl_factor if held.kl_factor is not None else math.inf


def _unmeasured_text(left_out: str, best: HeldOut) -> tuple[str, str]:
    text = (
        f"{left_out}, left out: losses at 3 bits and more predicted to {_percent(best.near_median)} "
        f'(median) and {_percent(best.near_worst)} (worst of {best.near_count}) by "{best.form}"'
        + (f", half of the divergences within a factor of {best.kl_factor:.2f}." if best.kl_factor is not None else ".")
    )
    return text, YES if (best.near_worst or 0.0) <= GOOD_PREDICTION else NO


def _width(bits: int) -> str:
    return f"{bits} bits" if bits < 16 else "the model as it is"


def _chance(probability: float) -> str:
    """A share of draws: of a thousand, none is not never."""
    return "above 99 %" if probability > 0.995 else _percent(probability)


def _percent(share: float | None) -> str:
    if share is None:
        return "?"
    percent = 100 * share
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"


def _size(bits: float) -> str:
    """Bits as bytes, for people."""
    size = bits / 8
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.3g} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


def best_of(bests: Sequence[BestWidths], method: str, axis: str = "total", dtype: str = ANY) -> BestWidths | None:
    """The entry for a method, axis and data type."""
    return next((best for best in bests if (best.method, best.axis, best.dtype) == (method, axis, dtype)), None)


_TOPICS: dict[str, Callable[[SuiteLaws, str], Iterator[_Said]]] = {
    "best width": _best_widths,
    "four bits": _four_bits,
    "data types": _data_types,
    "block size": _block_sizes,
    "wide formats": _wide,
    "biased formats": _biased,
    "laws": _laws,
    "unmeasured models": _unmeasured,
}
