"""How long a conversion will take: the arithmetic of its steps, from shapes alone, at rates measured in a moment.

What is counted are operations of matrix products, elements of everything else (softmax, activations, drawing tokens,
packing factors), and weights whose scales are searched. The counts of elements are weighted with what a step does to
each; those weights were fitted to runs of three small models (docs/methods.md says how far off the sum is).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import inf

from kbit.calibration.request import CalibrationRequest
from kbit.calibration.sizes import HELD_OUT_SHARE, text_shape
from kbit.checkpoint.source import CheckpointSource
from kbit.formats.trellis import FAST_WINDOW, TILE, TrellisFormat
from kbit.models.families import spec_from_config
from kbit.models.parameter import Parameter
from kbit.models.params import parameters
from kbit.models.spec import ModelSpec
from kbit.quantizers.allocate import LINEAR_WIDTHS, OUTSIDE_WIDTHS, TRELLIS_WIDTHS

# Formats that a matrix is tried in: two data types at 3 and at 4 bits.
_TRIED_LINEAR, _TRIED_OUTSIDE = len(LINEAR_WIDTHS) + 2, len(OUTSIDE_WIDTHS) + 1
# What is done to an element, in exponentials: of attention's scores and of activations (forward; forward again and
# backward), of logits and their gradients, of a sampled token's logits, of a factor on its way to the disk or back.
_FORWARD, _BACKWARD, _LOGITS, _DRAW, _PACK = 4.0, 18.0, 30.0, 24.0, 20.0
# How much longer than a large matrix product the same operations take when a token is decoded, and when errors are
# passed on; and than a 4-bit grid's, a search of the wider ones and of codebooks fitted to the weights.
_DECODING, _FEEDBACK, _SEARCH = 1.8, 2.5, 1.6
# Of all but the search of trellises, for what is not counted: Python, memory, waiting for the last of several threads.
_UNCOUNTED = 1.4
# Seconds that loading, starting and writing take whatever the model.
_OVERHEAD = 4.0
# How long each rate is measured, in seconds.
_MEASURED = 0.08


@dataclass(frozen=True)
class Rates:
    """What the threads together do in a second.

    Attributes:
        operations: of a float32 matrix product (a multiplication and an addition are two).
        elements: exponentials.
        weights: rounded with searched scales, errors not passed on.
        windows: of trellises, times weights whose codes are searched for.
    """

    operations: float
    elements: float
    weights: float
    windows: float = inf


@dataclass(frozen=True)
class Work:
    """Counts that `Rates` divides."""

    operations: float = 0.0
    elements: float = 0.0
    weights: float = 0.0
    windows: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.operations + other.operations,
            self.elements + other.elements,
            self.weights + other.weights,
            self.windows + other.windows,
        )

    def seconds(self, rates: Rates) -> float:
        plain = self.operations / rates.operations + self.elements / rates.elements + self.weights / rates.weights
        return plain + self.windows / rates.windows


@dataclass(frozen=True)
class Steps:
    """What a conversion has to do.

    Attributes:
        calibrate: what is still to be measured, if anything.
        searches: scales are searched; else every weight is worked on by itself.
        each: exponentials that this takes as long as, without a search.
        products: of every matrix with its inputs' factor, without a search.
        weigh: try every width.
        judged: what other text the errors of each width are judged by: as much as this asks for, by HELD_OUT_SHARE.
        feedback, two_sided, sweeps: see `kbit.quantizers.settings.Settings`.
        trellis: the format of linear weights, if it is one.
        measured_tokens: on which the result is compared with the original.
    """

    calibrate: CalibrationRequest | None = None
    searches: bool = True
    each: float = 0.0
    products: int = 0
    weigh: bool = False
    judged: CalibrationRequest | None = None
    feedback: bool = True
    two_sided: bool = True
    sweeps: int = 0
    trellis: TrellisFormat | None = None
    measured_tokens: int = 0


def measure_rates(threads: int, *, trellises: bool = False) -> Rates:
    """The rates of so many threads, side by side with whatever else the machine does now: a quarter of a second.

    Args:
        threads: that work.
        trellises: codes of trellises are to be searched for, too.
    """
    import torch

    from kbit.backends.reference.products import product_with_rows
    from kbit.calibration.workers import workers
    from kbit.formats.quant_format import QuantFormat
    from kbit.formats.trellis_code import TileFactors, search
    from kbit.quantizers.ldlq import round_matrix
    from kbit.quantizers.settings import Settings

    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(256, 1024, generator=generator), torch.randn(512, 1024, generator=generator)
    few, format, plain = a[:32].contiguous(), QuantFormat("nf", 4), Settings(feedback=False)
    tiles, trellis = a[:2].reshape(-1, TILE * TILE).contiguous(), TrellisFormat(4, window=FAST_WINDOW)
    within = TileFactors.of(*(torch.eye(TILE).repeat(len(tiles), 1, 1) for _ in range(2)))
    windows = tiles.numel() * 2**FAST_WINDOW
    with workers(threads) as pool:

        def rate(units: int, call: Callable[[], object]) -> float:
            call()
            return units * sum(pool.map(lambda _: _calls_per_second(call), range(threads)))

        return Rates(
            operations=rate(2 * 256 * 1024 * 512, lambda: product_with_rows(a, b)),
            elements=rate(a.numel(), a.exp),
            weights=rate(few.numel(), lambda: round_matrix(few, format, None, plain)),
            windows=rate(windows, lambda: search(trellis, tiles, 1, within)) if trellises else inf,
        )


def estimate(source: CheckpointSource, steps: Steps, rates: Rates) -> float:
    """Seconds that the steps will take.

    Raises:
        CheckpointError, UnsupportedError: a model that kbit does not run.
    """
    spec = spec_from_config(source.config, where=f"config of {source.path}")
    work = Work()
    if steps.calibrate is not None:
        count, length = text_shape(spec, steps.calibrate.tokens)
        if not steps.calibrate.texts:
            work += _sampling(spec, count * length, length)
        work += _calibrating(spec, count * length, length, steps.calibrate.gradients)
    if steps.judged is not None:
        count, length = text_shape(spec, steps.judged.tokens)
        tokens = -(-count // HELD_OUT_SHARE) * length
        work += _sampling(spec, tokens, length) + _calibrating(spec, tokens, length, gradients=True)
    for p in parameters(spec):
        if p.role not in ("linear", "embedding", "head"):
            continue
        rows, columns = p.shape
        linear = p.role == "linear"
        if linear and steps.trellis is not None:
            work += _searching(rows, columns, steps.trellis, steps)
            continue
        tried = (_TRIED_LINEAR if linear else _TRIED_OUTSIDE) if steps.weigh else 0
        # Embedding and head have too many rows for a factor of them.
        work += _rounding(rows, columns, tried + 1, steps, two_sided=steps.two_sided and linear)
    if steps.measured_tokens:
        tokens = steps.measured_tokens
        work += _sampling(spec, tokens, 512)
        work += Work(4.0 * tokens * _weights(spec), 2.0 * _LOGITS * tokens * spec.vocab_size)
    searching, others = Work(windows=work.windows), replace(work, windows=0.0)
    return _OVERHEAD + _UNCOUNTED * others.seconds(rates) + searching.seconds(rates)


def _sampling(spec: ModelSpec, tokens: int, length: int) -> Work:
    """Tokens that the model writes, a step at a time."""
    attended = _FORWARD * spec.layers * spec.heads * length / 2
    return Work(_DECODING * 2.0 * tokens * _weights(spec), tokens * (_DRAW * spec.vocab_size + attended))


def _calibrating(spec: ModelSpec, tokens: int, length: int, gradients: bool) -> Work:
    """The passes, the factors, and their way to the disk."""
    linear = [p for p in parameters(spec) if p.role == "linear"]
    weights = sum(p.active * p.shape[0] * p.shape[1] for p in linear)
    scores = spec.layers * spec.heads * length
    passed = scores + sum(p.active * p.shape[0] for p in linear) + 4 * spec.layers * spec.hidden_size
    attention = 4.0 * sum(spec.heads * spec.shape(layer).head_dim for layer in range(spec.layers)) * length
    inputs, kept = (sum(share * p.shape[1] ** 2 for p, share in _shares(linear, whole)) for whole in (False, True))
    work = Work(tokens * (2.0 * weights + attention + inputs), tokens * _FORWARD * passed + _PACK * kept)
    if gradients:
        # Forward again, gradients of the inputs, and every text's gradient of the weights; attention backward is
        # twice forward.
        outputs, kept = (sum(share * p.shape[0] ** 2 for p, share in _shares(linear, whole)) for whole in (False, True))
        head = 4.0 * spec.hidden_size * spec.vocab_size + spec.hidden_size**2
        work += Work(
            tokens * (6.0 * weights + 3.0 * attention + outputs + head),
            tokens * (_BACKWARD * passed + _LOGITS * spec.vocab_size) + _PACK * kept,
        )
    return work


def _rounding(rows: int, columns: int, times: int, steps: Steps, two_sided: bool) -> Work:
    """A matrix that is rounded so many times; where widths are weighed, with what its error costs."""
    if not steps.searches:
        return Work(2.0 * steps.products * rows * columns**2, steps.each * rows * columns)
    operations, factors = 0.0, float(columns**2)
    if steps.feedback:
        operations += columns**3 / 3 + _FEEDBACK * times * float(rows) * columns**2
    if two_sided:
        operations += rows**3 / 3 + _FEEDBACK * times * float(rows) ** 2 * columns
        factors += rows**2
    # A sweep tells of every change, as feedback does, but to all columns and rows. Of the widths that are weighed one
    # is swept, and the one that is chosen.
    swept = steps.sweeps * (2 if steps.weigh else 1)
    operations += 2 * swept * (float(rows) * columns**2 + (float(rows) ** 2 * columns if two_sided else 0.0))
    if steps.weigh:
        operations += times * (2.0 * rows * columns**2 + (2.0 * rows**2 * columns if two_sided else 0.0))
    return Work(operations, _PACK * factors, _SEARCH * times * rows * columns)


def _searching(rows: int, columns: int, format: TrellisFormat, steps: Steps) -> Work:
    """A matrix whose codes are those of trellises: what passing errors on takes, and the search.

    Widths are weighed in short windows, and so is how much of each row's spread the code is to have.
    """
    from kbit.quantizers.trellis_ldlq import SAMPLED_TILES, SHARES

    formats = [format, *(format.with_bits(bits) for bits in (TRELLIS_WIDTHS if steps.weigh else ()))]
    plain = _rounding(rows, columns, len(formats), replace(steps, sweeps=0, searches=True), two_sided=steps.two_sided)
    tried = len(SHARES) * min(rows, SAMPLED_TILES * TILE) if steps.searches else 0
    windows = 0.0
    for place, each in enumerate(formats):
        if each.code != "int":
            short = 2 ** each.with_short_windows().window
            windows += (rows * (short if place else 2**each.window) + tried * short) * columns
    return Work(plain.operations, plain.elements, 0.0, windows)


def _shares(linear: Iterable[Parameter], whole: bool) -> Iterable[tuple[Parameter, float]]:
    """Matrices with the share of tokens that go through each, or with 1: what is kept of each is the same."""
    return ((p, 1.0 if whole else p.active) for p in linear)


def _weights(spec: ModelSpec) -> int:
    """That a token is multiplied with: of the layers, and the head."""
    read = sum(p.active * p.shape[0] * p.shape[1] for p in parameters(spec) if p.role == "linear")
    return round(read) + spec.vocab_size * spec.hidden_size


def _calls_per_second(call: Callable[[], object]) -> float:
    count, begin = 0, time.perf_counter()
    while (passed := time.perf_counter() - begin) < _MEASURED:
        call()
        count += 1
    return count / passed
