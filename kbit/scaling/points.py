"""A measured point: one model in one format on one text. One JSON object a line, in `points.jsonl`.

The table is what the laboratory produces and everything else reads: plots, laws, the planner, a notebook
(`pandas.read_json("points.jsonl", lines=True)`). A row says what was measured, what it weighs and what it loses; and it
keeps the losses by cluster of text, since a difference between two rows is only as certain as the same text makes it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kbit.host.errors import KbitError
from kbit.host.files import fsync_folder
from kbit.host.json_values import finite

# Raised when what a row means changes: rows of another number are not read.
SCHEMA = 1
# What stands for the format of a model as it is.
ORIGINAL = "original"


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        key: digest of everything that determines the figures (model, format, method, text, windows, arithmetic).
        model: the model's name, as the user gave it.
        model_id: its fingerprint.
        tokenizer: digest of its tokenizer: losses per token compare between models that share it.
        method: how codes and scales were found ("rtn": rounding to nearest); ORIGINAL for the model as it is.
        format: a format string ("nf4-b64"), or ORIGINAL.
        dtype, bits, block_size: of the format; for ORIGINAL "original", the bits it is stored in, 0. `dtype` is
            "int-asym" where blocks have offsets, and names the grid of a float ("float-paper") unless it is OCP's.
        linear_parameters: weights of the linear layers, N.
        parameters: all weights, embeddings and head included (a tied head once).
        linear_bits: bits that the linear layers take, scales and codebooks included.
        total_bits: bits that all tensors take as stored.
        training_tokens: tokens the model was trained on, D, or None where its folder does not say.
        data, data_sha256: the text.
        convention, context: how windows were cut (kbit.text.windows).
        tokens: scored tokens.
        text_bytes: bytes of UTF-8 these tokens make: losses per byte compare between all models.
        backend: who computed, for people.
        nll: mean loss in nats per token.
        kl: mean KL divergence from the original in nats per token; 0 for ORIGINAL.
        top1: fraction of positions with the original's top token.
        weight_error: squared error of the linear weights over their square, summed over all; 0 for ORIGINAL.
        cluster_tokens, cluster_nll, cluster_kl: sums over each cluster of text (kbit.evaluate.statistics.cluster): the
            same clusters for all formats of a model.
        quantize_seconds, evaluate_seconds: what it took.
        created: date and time, ISO 8601, UTC.
        weight_gain: how much of the linear weights is left in the quantized ones, <w, q> / <w, w>; None where an older
            kbit measured the row.
        expected_kl: the divergence that the errors of the linear weights make to second order, from gradients of the
            model as it is (kbit.evaluate.fisher), nats per token; None where they were not taken.
    """

    key: str
    model: str
    model_id: str
    tokenizer: str
    method: str
    format: str
    dtype: str
    bits: int
    block_size: int
    linear_parameters: int
    parameters: int
    linear_bits: int
    total_bits: int
    training_tokens: int | None
    data: str
    data_sha256: str
    convention: str
    context: int
    tokens: int
    text_bytes: int
    backend: str
    nll: float
    kl: float
    top1: float
    weight_error: float
    cluster_tokens: tuple[float, ...]
    cluster_nll: tuple[float, ...]
    cluster_kl: tuple[float, ...]
    quantize_seconds: float
    evaluate_seconds: float
    created: str
    weight_gain: float | None = None
    expected_kl: float | None = None

    @property
    def is_original(self) -> bool:
        """Whether this is the model as it is."""
        return self.format == ORIGINAL

    @property
    def bits_per_weight(self) -> float:
        """Of the linear layers, everything stored counted."""
        return self.linear_bits / self.linear_parameters

    @property
    def perplexity(self) -> float:
        """exp(nll); infinite where that exceeds a float64."""
        try:
            return math.exp(self.nll)
        except OverflowError:
            return math.inf

    @property
    def nll_per_byte(self) -> float:
        """Nats per byte of text."""
        return self.nll * self.tokens / self.text_bytes

    def clusters(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """(tokens, summed loss, summed KL) of each cluster, float64 (C,) each."""
        return np.array(self.cluster_tokens), np.array(self.cluster_nll), np.array(self.cluster_kl)

    def to_json(self) -> str:
        """One line, without its end. Infinite values become null."""
        row = {"schema": SCHEMA, **asdict(self), "perplexity": self.perplexity, "bits_per_weight": self.bits_per_weight}
        return json.dumps(finite(row), allow_nan=False)


def read_points(path: Path) -> list[Point]:
    """The rows of a table, the latest of each key; none where there is no file.

    A last line without its end, which a run left that was killed while writing, is passed over.

    Raises:
        KbitError: the file cannot be read, or a line is not a row of this schema.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise KbitError(f"{path} cannot be read: {error}") from error
    *lines, _ = text.split("\n")
    found: dict[str, Point] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            point = _parse(line, f"{path}, line {number}")
            found[point.key] = point
    return list(found.values())


def append_points(path: Path, points: Iterable[Point]) -> None:
    """Add rows to a table so that they stay, whatever happens next. What a killed run left half-written is cut off.

    Raises:
        KbitError: the file cannot be written.
    """
    text = "".join(point.to_json() + "\n" for point in points)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            size = file.seek(0, os.SEEK_END)
            back = 0
            while back < size:  # to the end of the last whole line
                step = min(1 << 16, size - back)
                file.seek(size - back - step)
                at = file.read(step).rfind(b"\n")
                if at >= 0:
                    back += step - at - 1
                    break
                back += step
            if back:
                file.truncate(size - back)
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        if not size:  # the table is new, and so may its folder be
            fsync_folder(path.parent)
            fsync_folder(path.parent.absolute().parent)
    except OSError as error:
        raise KbitError(f"{path} cannot be written: {error.strerror or error}") from error


def _parse(line: str, where: str) -> Point:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise KbitError(f"{where}: not JSON ({error}): delete the line, and it will be measured again") from None
    if not isinstance(row, dict) or row.get("schema") != SCHEMA:
        raise KbitError(f"{where}: not a row of schema {SCHEMA}: another version of kbit wrote it; use another folder")
    values: dict[str, Any] = {}
    for field in fields(Point):
        value = row.get(field.name)
        kind = str(field.type)
        if kind.startswith("tuple"):
            good = isinstance(value, list) and all(_is_number(item) for item in value)
            value = tuple(float(item) for item in value) if good and value is not None else None
        elif kind.startswith("float"):
            good = _is_number(value) or (value is None and "None" in kind)
            value = float(value) if good and value is not None else value
        elif kind == "str":
            good = isinstance(value, str)
        else:
            good = (isinstance(value, int) and not isinstance(value, bool)) or (value is None and "None" in kind)
        if not good:
            raise KbitError(
                f"{where}: {field.name} is {row.get(field.name)!r:.60}: delete the line to measure it again"
            )
        values[field.name] = value
    return Point(**values)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
