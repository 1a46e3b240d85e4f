#!/usr/bin/env python3
"""Compare two runs of the benchmarks: ratios with their uncertainty, and which differences are real.

    pytest benchmarks/                                              # saves .benchmarks/TIME.json
    python tools/compare_benchmarks.py BEFORE.json AFTER.json
    python tools/compare_benchmarks.py BEFORE.json AFTER.json --real       # only what differs
    python tools/compare_benchmarks.py --before B1.json B2.json --after A1.json A2.json

A ratio above 1 is better, whatever the unit; differences of accuracy are of KL divergence, where less is better. The
interval holds the rounds' scatter and the drift of the machine between the runs, which is taken from what did not
change between them: peers of the same version, the memory's bandwidth. Interleave the runs (B A B A) where it matters.
How this is estimated: benchmarks/comparison.py.

Exits with 0; with 1 for a file that cannot be compared and, with --fail-on-loss, for a real loss; with 2 for wrong use.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from comparison import DRIFT, LEVEL, Difference, Drift, common_keys, compare
from results import ResultsError, Run, read_run

REAL = ("better", "worse")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        before, after = ([read_run(path) for path in paths] for paths in (options.before, options.after))
        drift, found = compare(before, after, options.drift, options.level)
        if not found:
            raise ResultsError(f"{before[0].path} and {after[0].path} have no result of kbit in common")
    except ResultsError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(as_json(before, after, drift, found, options.level)))
    else:
        print(as_text(before, after, drift, found, options.level, real_only=options.real))
    return int(options.fail_on_loss and any(one.verdict == "worse" for one in found))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", metavar="BEFORE.json AFTER.json", help="two files")
    parser.add_argument("--before", type=Path, nargs="+", default=[], help="files of several runs before the change")
    parser.add_argument("--after", type=Path, nargs="+", default=[], help="files of several runs after it")
    parser.add_argument("--real", action="store_true", help="list only differences that are real")
    parser.add_argument("--level", type=float, default=LEVEL, help="of intervals and verdicts (0.95)")
    help_drift = f"relative drift between runs where the files do not show it ({DRIFT}: 8 %%)"
    parser.add_argument("--drift", type=float, default=DRIFT, help=help_drift)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--fail-on-loss", action="store_true", help="exit with 1 where anything is really worse")
    options = parser.parse_args(arguments)
    if len(options.files) == 2 and not options.before and not options.after:
        options.before, options.after = [options.files[0]], [options.files[1]]
    elif options.files or not options.before or not options.after:
        parser.error("name two files, or any number with each of --before and --after")
    if not 0.5 <= options.level < 1:
        parser.error(f"--level {options.level}: take one from 0.5 to below 1, such as 0.95")
    if not 0 <= options.drift < 1:
        parser.error(f"--drift {options.drift}: take a fraction from 0 to below 1, such as 0.05")
    return options


def as_text(
    before: Sequence[Run],
    after: Sequence[Run],
    drift: Drift,
    found: Sequence[Difference],
    level: float,
    *,
    real_only: bool = False,
) -> str:
    """For people."""
    lines = [f"{side}: {describe(run)}" for side, runs in (("before", before), ("after ", after)) for run in runs]
    lines += [f"note: {note}" for note in notes(before, after)]
    lines.append(f"drift between the runs: {drift.deviation:.1%}, from {drift.origin}")
    title = ""
    width = max(len(one.name) for one in found)
    for one in found:
        if real_only and one.verdict not in REAL:
            continue
        if one.benchmark != title:
            title = one.benchmark
            lines += ["", printable(f"{title} ({one.unit})")]
        lines.append(f"  {printable(one.name):<{width}}  {figures(one)}  {one.verdict}")
        lines += [f"  {'':<{width}}  {change}" for change in one.changed]
    counts = {verdict: sum(one.verdict == verdict for one in found) for verdict in REAL}
    lines += [
        "",
        f"{len(found)} compared: {counts['better']} really better, {counts['worse']} really worse "
        f"(any false one: at most {1 - level:.0%}, Holm); intervals are {level:.0%} for each row alone",
    ]
    return "\n".join(lines)


def figures(one: Difference) -> str:
    """Before, after, and the change with its interval."""
    middle = f"{one.before:>10.4g} -> {one.after:<10.4g}"
    if one.unit == "KL":
        interval = "" if one.low is None or one.high is None else f"[{one.low:+.2g}, {one.high:+.2g}]"
        return f"{middle}  {one.change:+.3g} {interval:<20}"
    interval = "" if one.low is None or one.high is None else f"[{one.low:.2f}, {one.high:.2f}]"
    return f"{middle}  {one.change:5.2f}x {interval:<14}"


def describe(run: Run) -> str:
    """A run in a line."""
    kbit = (run.machine.get("versions") or {}).get("kbit", "?")
    cpu = f"{run.machine.get('cpu', 'unknown CPU')}, {run.machine.get('cores', '?')} cores"
    return printable(f"{run.path.name}, {run.date}, kbit {kbit} at {run.commit}, {cpu}, {len(run.rows)} results")


def notes(before: Sequence[Run], after: Sequence[Run]) -> list[str]:
    """What else differs between the sides."""
    first, last = before[0].machine, after[0].machine
    names = ("cpu", "cores", "isa", "instruction_set", "threads", "kbit_isa", "memory_bytes")
    lines = [
        f"{name} differs: {first.get(name)} and {last.get(name)}; ratios compare the machines too"
        for name in names
        if first.get(name) != last.get(name)
    ]
    old, new = first.get("versions") or {}, last.get("versions") or {}
    changed = [name for name in sorted({*old, *new} - {"kbit"}) if old.get(name) != new.get(name)]
    lines += [f"{name} differs: {old.get(name)} and {new.get(name)}" for name in changed]
    shared = len(common_keys(before, after))
    for side, runs in (("before", before), ("after", after)):
        most = max(len(run.rows) for run in runs)
        if most > shared:
            lines.append(f"{most - shared} results {side} have no counterpart")
    return [printable(line) for line in lines]


def as_json(
    before: Sequence[Run], after: Sequence[Run], drift: Drift, found: Sequence[Difference], level: float
) -> dict[str, Any]:
    """For programs."""
    return {
        "before": [str(run.path) for run in before],
        "after": [str(run.path) for run in after],
        "notes": notes(before, after),
        "level": level,
        "drift": asdict(drift) | {"freedom": drift.freedom if drift.freedom < float("inf") else None},
        "rows": [asdict(one) for one in found],
    }


def printable(value: object) -> str:
    """Text from a file that cannot disturb a terminal."""
    return "".join(char if char.isprintable() else "?" for char in str(value))


if __name__ == "__main__":
    sys.exit(main())
