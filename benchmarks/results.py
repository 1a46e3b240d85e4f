"""Results of the benchmarks as rows: what a file of pytest-benchmark holds, of this version or an earlier one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard


class ResultsError(Exception):
    """A file that cannot be used, in one line."""


@dataclass(frozen=True)
class Row:
    """One measured thing of one run.

    Attributes:
        benchmark, name: which.
        engine: "kbit", or what is measured beside it.
        unit: of the values; empty for a control.
        higher_is_better: of the values.
        values: one a round, all positive; none for rows of accuracy.
        about: the whole row as saved, and what was measured (model, data_sha256).
    """

    benchmark: str
    name: str
    engine: str
    unit: str
    higher_is_better: bool
    values: tuple[float, ...]
    about: Mapping[str, Any]

    @property
    def key(self) -> tuple[str, str]:
        return self.benchmark, self.name


@dataclass(frozen=True)
class Run:
    """One file: its rows by key, and where and when it was made."""

    path: Path
    date: str
    commit: str
    machine: Mapping[str, Any]
    rows: Mapping[tuple[str, str], Row]


def read_run(path: Path) -> Run:
    """A file of pytest-benchmark.

    Raises:
        ResultsError: it cannot be read, or is not one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ResultsError(f"{path}: not JSON") from None
    entries = content.get("benchmarks") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ResultsError(f"{path}: not a file that pytest benchmarks/ saves")
    rows = {}
    for entry in entries:
        for row in rows_of(entry) if isinstance(entry, dict) else ():
            rows[row.key] = row
    if not rows:
        raise ResultsError(f"{path}: holds no results")
    commit, machine = content.get("commit_info"), content.get("machine_info")
    about = machine.get("kbit") if isinstance(machine, dict) else None
    return Run(
        path,
        str(content.get("datetime", "?"))[:19],
        str(commit.get("id", "?"))[:12] + ("+" if commit.get("dirty") else "") if isinstance(commit, dict) else "?",
        about if isinstance(about, dict) else {},
        rows,
    )


def rows_of(entry: Mapping[str, Any]) -> list[Row]:
    """The rows of a benchmark: those of its report, or its own rounds where it has none."""
    # The folder before the file's name depends on where pytest was started.
    benchmark = str(entry.get("fullname") or entry.get("name", "?")).rsplit("/", 1)[-1]
    about = entry.get("extra_info")
    about = about if isinstance(about, dict) else {}
    if about.get("model"):  # the default model, or what stood in for it: never to be compared with each other
        benchmark += f", {about['model']}"
    unit = str(about.get("unit", "seconds"))
    higher = about.get("higher_is_better")
    if not isinstance(higher, bool):  # files of earlier versions do not say
        higher = unit.endswith("/s")
    context = {key: about.get(key) for key in ("model", "data_sha256")}
    rows = []
    for row in dictionaries(about.get("rows")):
        values, name = positive(row.get("values")), str(row.get("name", row.get("format", "?")))
        if values or is_number(row.get("kl_mean")):
            engine = str(row.get("engine", "kbit"))
            rows.append(Row(benchmark, name, engine, unit, higher, values, {**context, **row}))
    for row in dictionaries(about.get("controls")):
        values, name = positive(row.get("values")), str(row.get("name", "?"))
        if values:
            rows.append(Row(benchmark, name, str(row.get("engine", "?")), "", higher, values, row))
    stats = entry.get("stats")
    if not rows and isinstance(stats, dict) and (values := positive(stats.get("data"))):
        rows.append(Row(benchmark, "", "kbit", "seconds", False, values, context))
    return rows


def dictionaries(values: object) -> list[dict[str, Any]]:
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def positive(values: object) -> tuple[float, ...]:
    """Values as they are where all are positive and finite numbers; none otherwise."""
    found = numbers(values)
    return found if all(value > 0 for value in found) else ()


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def numbers(values: object) -> tuple[float, ...]:
    """Values as they are where all are finite numbers; none otherwise."""
    if not isinstance(values, list) or not all(is_number(x) for x in values):
        return ()
    return tuple(float(x) for x in values)
