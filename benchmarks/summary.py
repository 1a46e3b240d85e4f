"""One table of a run of `pytest benchmarks/`: what each width loses, and how fast and how large it is.

    python benchmarks/summary.py .benchmarks/20260101T120000Z.json

pytest prints it at the end of a run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Heading, key of a width's facts, and how to show them.
COLUMNS = (
    ("bits", "bits", "d"),
    ("format", "format", "s"),
    ("bits/weight", "bits_per_weight", ".2f"),
    ("MB", "megabytes", ".0f"),
    ("KL", "kl_mean", ".5f"),
    ("±", "kl_stderr", ".5f"),
    ("top-1", "top1", ".1%"),
    ("perplexity", "perplexity", ".4g"),
    ("decode tok/s", "decode", ".0f"),
    ("GB/s", "GB/s", ".1f"),
    ("of bandwidth", "decode_share", ".0%"),
    ("prompt tok/s", "prefill", ".0f"),
    ("of torch's product", "prefill_share", ".0%"),
)


def summary(results: Mapping[str, Any]) -> str:
    """The table of what a file of pytest-benchmark holds; empty where it holds nothing by width."""
    facts: dict[int, dict[str, Any]] = {}
    models: list[str] = []
    for entry in cases(results):
        if entry.get("case") not in ("accuracy by width", "throughput") or entry.get("engine", "native") != "native":
            continue
        models.append(str(entry.get("model")))
        for row in entry["rows"]:
            facts.setdefault(row["bits"], {}).update(of_width(row))
    if not facts:
        return ""
    columns = [column for column in COLUMNS if any(width.get(column[1]) is not None for width in facts.values())]
    table = [[heading for heading, _, _ in columns]]
    for bits in sorted(facts):
        width = facts[bits]
        table.append([format(width[key], spec) if width.get(key) is not None else "-" for _, key, spec in columns])
    widths = [max(len(row[index]) for row in table) for index in range(len(columns))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    return "\n".join([", ".join(dict.fromkeys(models)), *lines])


def cases(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """extra_info of every benchmark that has rows."""
    for entry in results.get("benchmarks", []):
        about = entry.get("extra_info") or {}
        if about.get("rows"):
            yield about


def of_width(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row adds to the facts of its width."""
    found = {key: row[key] for _, key, _ in COLUMNS if key in row}
    if "model_bytes" in row:
        found["megabytes"] = row["model_bytes"] / 1e6
    phase = row.get("phase")
    if phase:
        found[phase], found[f"{phase}_share"] = row["median"], row["share"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a file that pytest benchmarks/ saved")
    path = parser.parse_args().results
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        print(f"error: {path}: {error}", file=sys.stderr)
        return 1
    text = summary(results) if isinstance(results, dict) else ""
    if not text:
        print(
            f"error: {path}: holds no accuracy or throughput by width; pytest benchmarks/ measures it", file=sys.stderr
        )
        return 1
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
