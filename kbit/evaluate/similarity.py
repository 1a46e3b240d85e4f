"""How well a model's vectors say how alike texts are: Spearman's correlation of cosines with people's judgement.

The STS benchmark (Cer et al. 2017, arXiv:1708.00055), as sentence-transformers and MTEB score it: ranks of the cosines
of pairs beside those of the scores that people gave. Errors and intervals are over bootstrap draws of the pairs; of a
difference between two models, over the same draws of both, so that what is common to them does not blur it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kbit.engine.embed import Embedder, similarities
from kbit.engine.loader import open_prepared
from kbit.evaluate.paired import LEVEL
from kbit.evaluate.request import EngineRequest
from kbit.evaluate.statistics import SEED
from kbit.graph.backend import Backend
from kbit.host.errors import UsageError
from kbit.host.process import peak_rss_bytes
from kbit.host.utf8 import decode

TASK = "stsb"
# As many as a standard error needs to be known to a fiftieth (Efron and Tibshirani).
DRAWS = 1000
# Where the benchmark's test set may be below a folder of data.
_FILES = ("stsb/sts-test.csv", "sts-test.csv", "stsb/sts-test.tsv", "sts-test.tsv")
_MAX_BYTES = 64 << 20

Numbers = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TextPairs:
    """Texts two by two, and how alike they are to people: (N,) each.

    Attributes:
        origin: the file.
    """

    one: Sequence[str]
    other: Sequence[str]
    scores: Numbers
    origin: str

    def first(self, count: int | None) -> TextPairs:
        """The first so many; None: all."""
        return TextPairs(self.one[:count], self.other[:count], self.scores[:count], self.origin)


@dataclass(frozen=True, eq=False)
class Vectors:
    """What a model makes of pairs.

    Attributes:
        vectors: of all first texts, then of all second ones, (2 N, D).
        cosines: of the pairs, (N,).
        cut: texts of which only the beginning was read.
    """

    vectors: NDArray[np.float32]
    cosines: Numbers
    cut: int


@dataclass(frozen=True)
class Estimate:
    """A correlation, or a difference of two.

    Attributes:
        value: of all pairs.
        stderr: its standard error.
        interval: at `kbit.evaluate.paired.LEVEL`, from percentiles.
    """

    value: float
    stderr: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class SimilarityRequest(EngineRequest):
    """What to measure, and who computes (EngineRequest).

    Attributes:
        model, reference: a folder, a .gguf file, a hub id or a name `kbit pull` lists.
        data: a file of pairs, or a folder with the benchmark's; None: the folder KBIT_DATA names.
        limit: the first so many pairs; None: all.
        prompt_name: the model's prompt that goes before every text; None: its default.
    """

    model: str
    reference: str | None = None
    data: str | None = None
    limit: int | None = None
    prompt_name: str | None = None


@dataclass(frozen=True)
class SimilarityEvaluation:
    """What was measured.

    Attributes:
        request: what was asked.
        data: the file of the pairs.
        pairs: how many.
        spearman: of the model.
        reference: of the reference.
        difference: the model's less the reference's, on the same draws.
        alike: mean cosine between the model's vectors and the reference's.
        cut: texts of which only the beginning was read.
        backend, reference_backend: one line each about what ran.
        seconds: for all texts, the reference's included.
    """

    request: SimilarityRequest
    data: str
    pairs: int
    spearman: Estimate
    reference: Estimate | None
    difference: Estimate | None
    alike: float | None
    cut: int
    backend: str
    reference_backend: str | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Numbers and strings for JSON."""
        shown: dict[str, Any] = {
            "model": self.request.model,
            "task": TASK,
            "data": self.data,
            "pairs": self.pairs,
            **_shown("spearman", self.spearman),
            "texts_cut": self.cut,
            "backend": self.backend,
            "seconds": self.seconds,
            "peak_rss_bytes": peak_rss_bytes(),
        }
        if self.reference is not None and self.difference is not None:
            shown |= {
                "reference": self.request.reference,
                "reference_backend": self.reference_backend,
                **_shown("reference_spearman", self.reference),
                **_shown("difference", self.difference),
                "cosine_with_reference": self.alike,
            }
        return shown


def _shown(name: str, estimate: Estimate) -> dict[str, Any]:
    return {name: estimate.value, f"{name}_stderr": estimate.stderr, f"{name}_interval": list(estimate.interval)}


def evaluate_similarity(
    request: SimilarityRequest, say: Callable[[str], object] = lambda text: None
) -> SimilarityEvaluation:
    """Reads the pairs, and lets the models embed them.

    Raises:
        UsageError: no pairs, or no such prompt; a flag's value that does not exist.
        CheckpointError, UnsupportedError: a model cannot be read or run.
    """
    pairs = find_pairs(request.data, request.limit)
    backend, exact = request.backends()
    start = perf_counter()
    say(f"{request.model}: {2 * len(pairs.scores)} texts")
    found = embedded(request.model, backend, pairs, request.prompt_name, request.bits)
    other = None
    if request.reference is not None:
        say(f"{request.reference}: {2 * len(pairs.scores)} texts")
        other = embedded(request.reference, exact, pairs, request.prompt_name)
    return SimilarityEvaluation(
        request,
        pairs.origin,
        len(pairs.scores),
        correlation(found.cosines, pairs.scores),
        None if other is None else correlation(other.cosines, pairs.scores),
        None if other is None else correlation(found.cosines, pairs.scores, other.cosines),
        None if other is None else alike(found, other),
        found.cut,
        backend.describe(),
        None if other is None else exact.describe(),
        perf_counter() - start,
    )


def embedded(
    model: str, backend: Backend, pairs: TextPairs, prompt_name: str | None = None, bits: float | None = None
) -> Vectors:
    """A model's vectors of both texts of every pair.

    Raises:
        UsageError: it has no such prompt.
        CheckpointError, UnsupportedError: it cannot be read or run.
    """
    with open_prepared(model, backend, bits=bits) as source:
        made = Embedder(source, backend)
    found = made.embed([*pairs.one, *pairs.other], made.prompt(prompt_name))
    count = len(pairs.one)
    cosines = similarities(found.vectors[:count], found.vectors[count:])
    return Vectors(found.vectors, cosines.astype(np.float64), len(found.cut))


def alike(one: Vectors, other: Vectors) -> float | None:
    """Mean cosine between two models' vectors of the same texts; None where these have different lengths."""
    if one.vectors.shape != other.vectors.shape:
        return None
    return float(similarities(one.vectors, other.vectors).mean())


def find_pairs(data: str | None, limit: int | None = None) -> TextPairs:
    """The pairs of a file, or of the benchmark's in a folder.

    Raises:
        UsageError: there are none, or a line is no pair.
    """
    if limit is not None and limit < 3:
        raise UsageError(f"--limit {limit}: a correlation needs at least 3 pairs")
    named = data if data is not None else os.environ.get("KBIT_DATA")
    if not named:
        raise UsageError(
            f"there are no pairs of texts: name a file with --task-data, or with KBIT_DATA a folder with {_FILES[0]}"
        )
    path = Path(os.path.expanduser(named))
    if path.is_dir():
        file = next((path / name for name in _FILES if (path / name).is_file()), None)
        if file is None:
            what = "KBIT_DATA" if data is None else "--task-data"
            raise UsageError(f"{what} {named} has no {_FILES[0]}: name a file of pairs with --task-data")
        path = file
    return read_pairs(path).first(limit)


def read_pairs(file: Path) -> TextPairs:
    """The pairs of a file: a line each, between tabs a score and two texts, or STS-B's columns (genre, file, year,
    number, score, two texts, and what else there is).

    Raises:
        UsageError: it cannot be read, a line is no pair, or all scores are equal.
    """
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise UsageError(f"{file} is larger than {_MAX_BYTES >> 20} MiB: split it")
        lines = decode(file.read_bytes(), str(file)).split("\n")
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror}); give a file of pairs of texts") from None
    one, other, scores = [], [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        columns = line.rstrip("\r").split("\t")
        place = 0 if len(columns) == 3 else 4
        try:
            score, *texts = float(columns[place]), *columns[place + 1 : place + 3]
            if len(texts) != 2 or not all(text.strip() for text in texts) or not np.isfinite(score):
                raise ValueError
        except (IndexError, ValueError):
            raise UsageError(
                f"{file}: line {number} is no score and two texts with tabs between (or STS-B's seven columns): "
                "correct it"
            ) from None
        scores.append(score)
        one.append(texts[0])
        other.append(texts[1])
    if len(set(scores)) < 2:
        raise UsageError(f"{file} has no two pairs with different scores, so nothing correlates with these: add some")
    return TextPairs(one, other, np.array(scores), str(file))


def ranks(values: Numbers) -> Numbers:
    """Ranks from 0, equal values sharing the mean of theirs: (N,)."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    means: Numbers = np.cumsum(counts) - (counts + 1) / 2
    return means[inverse]


def spearman(x: Numbers, y: Numbers) -> float:
    """The correlation of ranks; 0 where all values of one are equal."""
    a, b = (ranks(values) - (len(values) - 1) / 2 for values in (x, y))
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm else 0.0


def correlation(cosines: Numbers, scores: Numbers, less: Numbers | None = None) -> Estimate:
    """Spearman's correlation with scores, with its error.

    Args:
        cosines, scores: (N,).
        less: those of another model, whose correlation is taken off.
    """

    def value(at: NDArray[np.int64] | slice) -> float:
        found = spearman(cosines[at], scores[at])
        return found if less is None else found - spearman(less[at], scores[at])

    drawn = np.random.default_rng(SEED).integers(0, len(scores), (DRAWS, len(scores)))
    values = np.array([value(indices) for indices in drawn])
    low, high = np.percentile(values, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Estimate(value(slice(None)), float(values.std()), (float(low), float(high)))
