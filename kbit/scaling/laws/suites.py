"""Suites: measured points that may be compared with each other.

A loss per token means something only beside losses on the same text, cut into the same windows, by the same tokenizer
and the same arithmetic. Points that share all of that, and the clusters their losses are summed over, form a suite: the
text's difficulty cancels in every difference, and one draw of clusters serves all of them. Formats are compared where
embeddings and head are kept alike: a suite for 16 bits, another for 8. Laws are fitted to one suite at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePath

from kbit.scaling.points import Point

# Below this many clusters of text, intervals are rough and the notes say so (kbit.evaluate.statistics: from n clusters
# a spread is known to about 1/sqrt(2n - 2), 24 % at ten).
FEW_CLUSTERS = 10

_COMPUTE = re.compile(r"(\w+) compute")


@dataclass(frozen=True)
class Model:
    """A model of a suite.

    Attributes:
        id: its fingerprint.
        name: as the user gave it: text from outside.
        linear_parameters, parameters: N without and with embeddings and head.
        training_tokens: D, or None.
        original: its row as it is, or None if that was not measured.
    """

    id: str
    name: str
    linear_parameters: int
    parameters: int
    training_tokens: int | None
    original: Point | None


@dataclass(frozen=True)
class Suite:
    """Points of one text, tokenizer, cutting and arithmetic.

    Attributes:
        name: for people; holds a file's name, which is text from outside.
        points: in the order of their models, then as given. One for each model, method and format.
        models: by linear parameters, smallest first.
    """

    name: str
    points: tuple[Point, ...]
    models: tuple[Model, ...]

    @property
    def tokenizer(self) -> str:
        """Digest of the tokenizer that all points share."""
        return self.points[0].tokenizer

    @property
    def clusters(self) -> int:
        """Clusters of text in every point."""
        return len(self.points[0].cluster_tokens)

    @property
    def tokens_per_byte(self) -> float:
        """Times a loss per token: loss per byte, which compares between tokenizers."""
        return self.points[0].tokens / self.points[0].text_bytes

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods measured, in order of appearance, the original left aside."""
        return tuple(dict.fromkeys(point.method for point in self.points if not point.is_original))

    def model(self, name: str) -> Model | None:
        """The model of this fingerprint, or the one model of this name; None if there is none, or several."""
        by_id = [model for model in self.models if model.id == name]
        found = by_id or [model for model in self.models if model.name == name]
        return found[0] if len(found) == 1 else None


def make_suites(points: Iterable[Point]) -> tuple[list[Suite], list[str]]:
    """Sort points into suites.

    Of several rows of the same model, method and format in one suite the one measured last counts.

    Returns:
        The suites, the one with most models and points first, and notes on rows that were left out.
    """
    groups: dict[tuple[object, ...], list[Point]] = {}
    bad: list[str] = []
    for point in points:
        reason = _unusable(point)
        if reason:
            bad.append(f"{point.model}, {point.format}: {reason}")
            continue
        groups.setdefault(_suite_key(point), []).append(point)
    notes = [f"left out: {text}" for text in bad[:5]]
    if len(bad) > 5:
        notes.append(f"left out: {len(bad) - 5} more rows for reasons of the same kind")
    suites = []
    for rows, kept in _by_embedding(groups.values()):
        suite = _make_suite(rows, kept)
        if suite.clusters < 2:
            notes.append(
                f"left out: {suite.name}: one cluster of text says nothing about the noise; measure more tokens"
            )
            continue
        suites.append(suite)
    suites.sort(key=lambda suite: (-len(suite.models), -len(suite.points), suite.name))
    return suites, notes


def _by_embedding(groups: Iterable[list[Point]]) -> Iterator[tuple[list[Point], str]]:
    """Groups parted by how embeddings and head are stored, each with all originals; and what to call that."""
    for rows in groups:
        originals = [point for point in rows if point.is_original]
        kept: dict[int, list[Point]] = {}
        for point in rows:
            if not point.is_original:
                others = point.parameters - point.linear_parameters
                # Scales make it 8.25 bits, say, and norms a little more in small models: whole bits tell kinds apart.
                bits = (point.total_bits - point.linear_bits) // others if others > 0 else 0
                kept.setdefault(bits, []).append(point)
        if len(kept) < 2:
            yield rows, ""
        else:
            for bits, own in kept.items():
                yield [*originals, *own], f", embeddings at {bits} bits"


def _make_suite(rows: list[Point], kept: str) -> Suite:
    latest: dict[tuple[str, str, str], Point] = {}
    for point in rows:
        key = (point.model_id, point.method, point.format)
        if key not in latest or point.created >= latest[key].created:
            latest[key] = point
    by_model: dict[str, list[Point]] = {}
    for point in latest.values():
        by_model.setdefault(point.model_id, []).append(point)
    models = []
    for identity, own in by_model.items():
        first = own[0]
        original = next((point for point in own if point.is_original), None)
        tokens = next((point.training_tokens for point in own if point.training_tokens), None)
        models.append(Model(identity, first.model, first.linear_parameters, first.parameters, tokens, original))
    models.sort(key=lambda model: (model.linear_parameters, model.name, model.id))
    points = tuple(point for model in models for point in by_model[model.id])
    first = points[0]
    count = f"{len(models)} model{'s' if len(models) > 1 else ''}"
    windows = f"{first.convention} windows of {first.context}, {first.tokens} tokens"
    name = f"{PurePath(first.data).name}, {windows}, {count}{kept}"
    return Suite(name, points, tuple(models))


def _suite_key(point: Point) -> tuple[object, ...]:
    compute = _COMPUTE.search(point.backend)
    return (
        point.data_sha256,
        point.tokenizer,
        point.convention,
        point.context,
        point.cluster_tokens,
        compute.group(1) if compute else "fp32",  # the reference backend has no other
    )


def _unusable(point: Point) -> str | None:
    counts = {len(point.cluster_tokens), len(point.cluster_nll), len(point.cluster_kl)}
    if counts == {0} or len(counts) > 1:
        return "its clusters do not match"
    numbers = (point.nll, point.kl, point.weight_error, *point.cluster_tokens, *point.cluster_nll, *point.cluster_kl)
    numbers += tuple(number for number in (point.weight_gain, point.expected_kl) if number is not None)
    if not all(math.isfinite(number) for number in numbers):
        return "a loss or an error is not a number"
    if min(point.cluster_tokens) <= 0 or point.nll <= 0 or point.tokens <= 0 or point.text_bytes <= 0:
        return "its counts or losses are not positive"
    if min(point.linear_parameters, point.linear_bits, point.total_bits) <= 0:
        return "it has no weights"
    total = sum(point.cluster_tokens)
    if abs(sum(point.cluster_nll) / total - point.nll) > 1e-6 * point.nll:
        return "the losses of its clusters do not add up to its loss"
    return None
