"""What a model said to each item, kept: one JSON object a line.

Everything that is reported is computed from these rows, so a file of them can be compared with another model's later
(`kbit eval --against`), looked at in a notebook (`pandas.read_json(path, lines=True)`), and taken up where a run was
interrupted.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from kbit.evaluate.tasks.documents import Item, Metric, Task
from kbit.evaluate.tasks.scorer import Score
from kbit.evaluate.tasks.sources import item_digest
from kbit.host.errors import KbitError, UsageError

# Raised when what a row means changes: rows of another number are not read.
SCHEMA = 1


@dataclass(frozen=True)
class ItemRecord:
    """A model's answer to one item.

    Attributes:
        run: digest of the model and of how it ran.
        model: as the user gave it.
        task: its name.
        index: of the item in the data set.
        item: digest of the item's texts and its right answer.
        group: what the item belongs to, or None (`kbit.evaluate.tasks.documents.Item`).
        gold: index of the right choice.
        loglikelihoods: of each choice in nats.
        greedy: of each choice, whether the model would have said it by itself.
        tokens: of each choice.
        lengths: of each choice in characters.
        truncated: tokens of the longest request that did not fit and were cut off in front.
    """

    run: str
    model: str
    task: str
    index: int
    item: str
    group: str | None
    gold: int
    loglikelihoods: tuple[float, ...]
    greedy: tuple[bool, ...]
    tokens: tuple[int, ...]
    lengths: tuple[int, ...]
    truncated: int

    @property
    def answer(self) -> int:
        """The likeliest choice, the first of several; where there is one only, 0 if the model would say it, else -1."""
        if len(self.loglikelihoods) == 1:
            return 0 if self.greedy[0] else -1
        return int(np.argmax(self.loglikelihoods))

    def value(self, metric: Metric) -> float:
        """This item's share in a metric: 0 or 1, for perplexity the log-likelihood in nats."""
        if metric == "perplexity":
            return self.loglikelihoods[self.gold]
        if metric == "acc":
            return float(self.answer == self.gold)
        per_character = np.array(self.loglikelihoods) / np.array(self.lengths)
        return float(int(np.argmax(per_character)) == self.gold)

    def to_json(self, task: Task) -> str:
        """One line, without its end; with the values of the task's metrics besides."""
        values = {metric: self.value(metric) for metric in task.metrics if metric != "perplexity"}
        return json.dumps({"schema": SCHEMA, **asdict(self), **values}, allow_nan=False)


@dataclass(frozen=True)
class Estimate:
    """A metric over items and its standard error, which is None for a single item."""

    value: float
    stderr: float | None


def make_record(run: str, model: str, task: Task, index: int, item: Item, scores: Sequence[Score]) -> ItemRecord:
    """A row from the scores of an item's requests."""
    return ItemRecord(
        run,
        model,
        task.name,
        index,
        item_digest(item),
        item.group,
        item.gold,
        tuple(score.loglikelihood for score in scores),
        tuple(score.greedy for score in scores),
        tuple(score.tokens for score in scores),
        item.lengths,
        max(score.truncated for score in scores),
    )


def summarize(task: Task, records: Sequence[ItemRecord]) -> dict[Metric, Estimate]:
    """The task's metrics over its items, at least 1, as lm-eval defines them.

    Standard errors are those of a mean over independent items (lm-eval's for accuracies); perplexity's is that of its
    logarithm times itself, where lm-eval draws bootstrap samples.
    """
    found: dict[Metric, Estimate] = {}
    for metric in task.metrics:
        values = np.array([record.value(metric) for record in records])
        mean = float(values.mean())
        error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
        if metric == "perplexity":
            mean = math.exp(min(-mean, 700.0))
            error = None if error is None else mean * error
        found[metric] = Estimate(mean, error)
    return found


def read_records(path: Path) -> list[ItemRecord]:
    """The rows of a file, in its order. A last line without its end, left by a killed run, is passed over.

    Raises:
        KbitError: there is no such file, it cannot be read, or a line is no row of this schema.
    """
    return _parse_file(path)[0]


class RecordFile:
    """A file of rows that grows while a run goes on, and that a later run of the same kind takes up.

    Attributes:
        records: rows that were there, by task and item.

    Raises:
        UsageError: it holds rows of another run.
        KbitError: it cannot be read or written.
    """

    def __init__(self, path: Path, run: str) -> None:
        self._path = path
        self.records: dict[tuple[str, str], ItemRecord] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError as error:
            raise KbitError(f"{path} cannot be written: {error.strerror or error}") from error
        rows, whole = _parse_file(path)
        for row in rows:
            if row.run != run:
                raise UsageError(
                    f"{path} holds the items of another run ({row.model}, or the same model run in another way): give "
                    "another file to --items, or delete it"
                )
            self.records[row.task, row.item] = row
        try:
            self._file: BinaryIO = path.open("r+b")
            self._file.truncate(whole)
            self._file.seek(whole)
        except OSError as error:
            raise KbitError(f"{path} cannot be written: {error.strerror or error}") from error

    def append(self, task: Task, records: Iterable[ItemRecord]) -> None:
        """Adds rows so that they stay.

        Raises:
            KbitError: the file cannot be written.
        """
        text = "".join(record.to_json(task) + "\n" for record in records)
        try:
            self._file.write(text.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise KbitError(f"{self._path} cannot be written: {error.strerror or error}") from error

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _parse_file(path: Path) -> tuple[list[ItemRecord], int]:
    """The rows of a file, and the bytes they take: what follows is an unfinished line."""
    try:
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        text = content[:whole].decode("utf-8")
    except FileNotFoundError:
        raise KbitError(f"{path}: no such file") from None
    except OSError as error:
        raise KbitError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise KbitError(f"{path}: not UTF-8 text at byte {error.start}") from None
    lines = text.split("\n")
    return [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()], whole


def _parse(line: str, where: str) -> ItemRecord:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise KbitError(f"{where}: not JSON: this is no file that --items wrote, or it is damaged") from None
    if not isinstance(row, dict) or row.get("schema") != SCHEMA:
        raise KbitError(f"{where}: not an item of schema {SCHEMA}, as --items writes them")
    values = {field.name: row.get(field.name) for field in fields(ItemRecord)}
    for name, good in _CHECKS.items():
        if not good(values[name]):
            raise KbitError(f"{where}: {name} is {values[name]!r:.60}: the file is damaged")
    for name in ("loglikelihoods", "greedy", "tokens", "lengths"):
        values[name] = tuple(values[name])  # type: ignore[arg-type]
        if len(values[name]) != len(row["loglikelihoods"]):  # type: ignore[arg-type]
            raise KbitError(f"{where}: {len(row['loglikelihoods'])} choices have {len(row[name])} {name}")
    record = ItemRecord(**values)  # type: ignore[arg-type]
    if not 0 <= record.gold < len(record.loglikelihoods):
        raise KbitError(f"{where}: the right answer is number {record.gold + 1} of {len(record.loglikelihoods)}")
    return record


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


_CHECKS = {
    "run": _is_text,
    "model": _is_text,
    "task": _is_text,
    "index": _is_count,
    "item": _is_text,
    "group": lambda value: value is None or _is_text(value),
    "gold": _is_count,
    "loglikelihoods": lambda value: isinstance(value, list) and bool(value) and all(map(_is_number, value)),
    "greedy": lambda value: isinstance(value, list) and all(isinstance(item, bool) for item in value),
    "tokens": lambda value: isinstance(value, list) and all(map(_is_count, value)),
    "lengths": lambda value: isinstance(value, list) and all(map(_is_count, value)),
    "truncated": _is_count,
}
