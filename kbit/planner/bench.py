"""How fast a model is here: loading, prompts and decoding, each several times and in turns.

As in llama-bench, what tokens say does not matter (they are random), no text is made and nothing is sampled: the times
are the model's alone. A prompt goes through in the pieces that `kbit run` feeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from kbit.engine.generate import PREFILL_CHUNK
from kbit.graph.pages import PAGE
from kbit.host.errors import UsageError
from kbit.host.progress import Progress
from kbit.models.params import parameters

if TYPE_CHECKING:
    from kbit.checkpoint.source import CheckpointSource
    from kbit.engine.loader import LoadedModel
    from kbit.graph.cache import Cache
    from kbit.models.decoder import Decoder
    from kbit.text.tokenizer import Tokenizer

# Loading is timed again until so many seconds have gone.
_LOADING_SECONDS = 3.0
# Steps before the clock starts: the threads may have slept.
_WARM_UP = 2


@dataclass(frozen=True)
class Case:
    """One thing that is timed.

    Attributes:
        kind: "prompt" or "decode".
        tokens: of the prompt, or decoded one by one.
        depth: tokens that are in the cache before.
    """

    kind: str
    tokens: int
    depth: int

    def __str__(self) -> str:
        """As llama-bench writes it: "pp512", "tg64 @ d512"."""
        behind = f" @ d{self.depth}" if self.depth else ""
        return f"{'pp' if self.kind == 'prompt' else 'tg'}{self.tokens}{behind}"


@dataclass
class Timed:
    """A case, and the tokens per second of every run of it, in order."""

    threads: int | None
    case: Case
    rates: list[float] = field(default_factory=list)

    @property
    def middle(self) -> float:
        """The median."""
        return median(self.rates)

    @property
    def quartiles(self) -> tuple[float, float]:
        """What a quarter of the runs is below, and above."""
        low, high = np.percentile(self.rates, (25, 75))
        return float(low), float(high)


@dataclass
class Bench:
    """What was measured.

    Attributes:
        loaded: the model, at the last number of threads.
        loads: seconds of every load, the first of them apart where it prepared the weights.
        prepared_seconds: what loading took with preparing the weights; None where they were prepared before.
        timed: all cases at all numbers of threads.
        read_bytes: of weights, that decoding a token reads.
        kv_bytes: of keys and values, for every token of a text.
    """

    loaded: LoadedModel
    loads: list[float]
    prepared_seconds: float | None
    timed: list[Timed]
    read_bytes: int
    kv_bytes: int


def bench(
    load: Callable[[int | None, Callable[[Tokenizer, CheckpointSource], object]], LoadedModel],
    prepared: Callable[[], bool],
    cases: Sequence[Case],
    threads: Sequence[int | None],
    repeats: int,
    progress: Progress,
) -> Bench:
    """Measures a model.

    Args:
        load: loads it with so many threads, and calls the other argument with tokenizer and checkpoint.
        prepared: whether prepared weights of it are kept.
        cases: what to time.
        threads: numbers of threads.
        repeats: of every case.
        progress: told how far it is.

    Raises:
        UsageError: a case that does not fit the model's context.
        KbitError: the model cannot be loaded.
    """
    unread = 0.0

    def look(tokenizer: Tokenizer, source: CheckpointSource) -> None:
        nonlocal unread
        from kbit.models.families import spec_from_config

        spec = spec_from_config(source.config, where=f"config of {source.path}")
        _refuse_too_long(cases, spec.max_positions)
        unread = sum(
            (1 - p.active) * source.tensors[p.name].nbytes if p.role != "table" else source.tensors[p.name].nbytes
            for p in parameters(spec)
            if p.name in source.tensors
        )

    total, done = len(threads) * len(cases) * repeats, 0
    before = prepared()
    loads: list[float] = []
    timed: list[Timed] = []
    prepared_seconds = None
    for count in threads:
        loaded = load(count, look)
        if not loads and not before and loaded.prepared is not None:
            prepared_seconds = loaded.load_seconds
            del loaded  # two would be held at once
            loaded = load(count, look)
        loads.append(loaded.load_seconds)
        while count == threads[0] and len(loads) < repeats and sum(loads) < _LOADING_SECONDS:
            del loaded
            loaded = load(count, look)
            loads.append(loaded.load_seconds)
        rows = [Timed(count, case) for case in cases]
        caches: dict[int, Cache] = {}
        for repeat in range(repeats + 1):  # the first round is not counted
            for row in rows:
                rate = _run(loaded.decoder, row.case, caches)
                if repeat:
                    row.rates.append(rate)
                    done += 1
                    progress("measuring", done, total)
        timed += rows
    weights = loaded.decoder.weights
    looked_up = 0 if weights.head is weights.embedding else weights.embedding.nbytes
    one, two = (loaded.decoder.new_cache(1, pages * PAGE).nbytes for pages in (1, 2))
    read = round(weights.nbytes - looked_up - unread)
    return Bench(loaded, loads, prepared_seconds, timed, read, (two - one) // PAGE)


def _refuse_too_long(cases: Sequence[Case], context: int) -> None:
    """
    Raises:
        UsageError: a case that does not fit.
    """
    for case in cases:
        needed = case.depth + case.tokens + (_WARM_UP if case.kind == "decode" else 0)
        if needed > context:
            raise UsageError(f"{case}: needs {needed} tokens, and the model's context is {context}: ask for fewer")


def _run(decoder: Decoder, case: Case, caches: dict[int, Cache]) -> float:
    """Tokens per second of one run.

    Args:
        decoder: the model.
        case: what to run.
        caches: filled to a depth, by depth; kept from run to run, but of recurrent models, which cannot go back.
    """
    random = np.random.default_rng(case.depth + case.tokens)
    ids = random.integers(0, decoder.spec.vocab_size, case.depth + case.tokens + _WARM_UP).tolist()
    behind, ids = ids[: case.depth], ids[case.depth :]
    cache = caches.get(case.depth)
    if cache is None or decoder.spec.states:
        cache = decoder.new_cache(1, case.depth + len(ids))
        _feed(decoder, behind, cache)
        caches[case.depth] = cache
    else:
        cache.truncate(case.depth)
        cache.grow(case.depth + len(ids))
    if case.kind == "prompt":
        begin = perf_counter()
        _feed(decoder, ids[: case.tokens], cache)
        return case.tokens / (perf_counter() - begin)
    for token in ids[:_WARM_UP]:
        decoder.extend([token], cache)
    begin = perf_counter()
    for token in ids[_WARM_UP:]:
        decoder.extend([token], cache)
    return case.tokens / (perf_counter() - begin)


def _feed(decoder: Decoder, ids: Sequence[int], cache: Cache) -> None:
    for start in range(0, len(ids), PREFILL_CHUNK):
        decoder.extend(ids[start : start + PREFILL_CHUNK], cache)
