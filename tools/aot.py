"""Compile every Triton kernel and configuration for every GPU, without one, and say what the machine code is like.

    python tools/aot.py                                   every case, every target, the launchers' own configurations
    python tools/aot.py --target sm_90 --case gemv        cases whose name contains "gemv", for one target
    python tools/aot.py --configs                         every candidate configuration too
    python tools/aot.py --quick --gates                   the subset that tests compile; exit code 1 if a gate breaks
    python tools/aot.py --json out.json                   the same numbers for machines

Nothing runs on a GPU: times are a model's (tools/triton_lint/model.py). Exit code 1 if a kernel does not compile or,
with --gates, if a gate breaks; 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

from triton_lint.cases import Case, all_cases
from triton_lint.chips import TARGETS
from triton_lint.driver import compile_for
from triton_lint.report import Report, report


def compile_case(case: Case, arch: str, config: Any) -> list[tuple[Report, list[str]]]:
    """Reports of a case's launches, each with the gates it breaks."""
    with compile_for(arch) as launches:
        case.launch(arch, config)
    found = []
    for launch in launches:
        numbers = report(launch, case.work(launch, config))
        gated = config is None and (not case.gated or launch.kernel == case.gated)
        gate = case.gates.get(arch) if gated else None
        found.append((numbers, gate.broken(numbers) if gate else []))
    return found


def row_of(case: Case, config: Any, found: Report, broken: list[str]) -> dict[str, Any]:
    """The numbers of a report as JSON can hold them."""
    launch, estimate = found.launch, found.estimate
    row: dict[str, Any] = {
        "case": case.name,
        "arch": launch.arch,
        "kernel": launch.kernel,
        "config": None if config is None else str(config),
        "grid": launch.grid,
        "warps": launch.num_warps,
        "stages": launch.num_stages,
        "registers": found.registers,
        "spills": found.spills,
        "shared": found.shared,
        "programs_per_multiprocessor": found.resident,
        "occupancy": round(found.occupancy, 3),
        "fits": found.fits,
        "loads": found.loads,
        "evict_first_loads": found.stream_loads,
        "async_loads": found.async_loads,
        "mma": found.mma,
        "loop_instructions": len(found.hot),
        "loop_counts": found.counts,
        "broken": broken,
        "text": str(found),
    }
    if estimate is not None:
        row["model"] = {
            "instructions_per_unit": round(estimate.per_unit, 3),
            "bounds_us": {name: round(seconds * 1e6, 3) for name, seconds in estimate.bounds.items()},
            "estimate_us": round(estimate.time * 1e6, 3),
            "over_floor": round(estimate.over_floor, 3),
            "tensor_share": round(estimate.tensor_share, 3),
        }
    return row


def rows_of(name: str, arch: str, quick: bool, configs: bool) -> list[dict[str, Any]]:
    """All rows of one case for one target; an error becomes a row of its own."""
    case = next(case for case in all_cases() if case.name == name)
    rows = []
    for config in case.configs(arch) if configs else (None,):
        start = time.monotonic()
        try:
            found = [row_of(case, config, *pair) for pair in compile_case(case, arch, config)]
        except Exception as error:  # any of the compiler's: it must not hide the other targets
            words = f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"
            found = [{"case": name, "arch": arch, "config": None if config is None else str(config), "error": words}]
        for row in found:
            row["seconds"] = round(time.monotonic() - start, 2)
        rows += found
    return rows


def all_rows(arguments: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    cases = [
        case
        for case in all_cases()
        if (case.quick or not arguments.quick)
        and (not arguments.case or any(part in case.name for part in arguments.case))
    ]
    if not cases:
        print(f"aot.py: no case has {' or '.join(arguments.case)} in its name", file=sys.stderr)
        raise SystemExit(2)
    jobs = [
        (case.name, arch, arguments.quick, arguments.configs)
        for case in cases
        for arch in arguments.target or TARGETS
        if arch in case.targets
    ]
    if arguments.jobs <= 1:
        for job in jobs:
            yield rows_of(*job)
        return
    with ProcessPoolExecutor(arguments.jobs) as pool:
        yield from pool.map(rows_of, *zip(*jobs, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this target (may be repeated)")
    parser.add_argument("--case", action="append", help="only cases with this in their name (may be repeated)")
    parser.add_argument("--quick", action="store_true", help="only the subset that tests compile")
    parser.add_argument("--configs", action="store_true", help="candidate configurations too")
    parser.add_argument("--gates", action="store_true", help="exit code 1 if a gate breaks")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", metavar="FILE", help="write all numbers as JSON")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    broken = failed = 0
    last = ""
    for found in all_rows(arguments):
        for row in found:
            if row["case"] != last:
                last = row["case"]
                print(f"== {last}")
            if "error" in row:
                failed += 1
                print(f"{row['arch']:8} DOES NOT COMPILE{_config(row)}: {row['error']}", flush=True)
                continue
            print(f"{row['text']}{_config(row)}", flush=True)
            for words in row["broken"]:
                broken += 1
                print(f"         GATE: {words}", flush=True)
        rows += found
    print(f"{len(rows)} kernels compiled, {failed} failed, {broken} gates broken")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)
    return 1 if failed or (arguments.gates and broken) else 0


def _config(row: dict[str, Any]) -> str:
    return f" [{row['config']}]" if row.get("config") else ""


if __name__ == "__main__":
    sys.exit(main())
