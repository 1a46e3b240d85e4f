"""Feeds wrong input to everything that reads what strangers write, and counts what kbit did not mean to do.

    pip install 'atheris>=3'
    python tools/fuzz.py --minutes 10                          # all targets, guided by coverage
    python tools/fuzz.py --minutes 2 --target gguf-model
    python tools/fuzz.py --random --executions 20000           # no atheris: changes of the corpus by a seed alone
    python tools/fuzz.py --target template --reproduce FILE    # one input again, with the traceback

A finding is: an error that is none of kbit's own, or a crash; more than 10 seconds of work; memory beyond twice the
input and 200 MB; a server's answer of 500. Each is written to the folder --findings with its traceback. Exit code 1:
there were some. The inputs that are kept lie in tools/fuzzing/corpus, one folder a target.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from fuzzing.judge import Finding, bounded_memory, judge
from fuzzing.loop import executions, guided, random_loop, shared_memory, until
from fuzzing.target import TARGETS, corpus, load_target


@dataclass
class Result:
    """What became of a target."""

    name: str
    executions: int
    seconds: float
    coverage: str
    findings: list[Path]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="for all targets together [1]")
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="one of them; may be repeated")
    parser.add_argument("--seed", type=int, default=1, help="[1]")
    parser.add_argument("--findings", type=Path, default=Path("findings"), help="folder to write them to [findings]")
    parser.add_argument("--random", action="store_true", help="without coverage")
    parser.add_argument("--executions", type=int, help="with --random: changed inputs a target, whatever the time")
    parser.add_argument("--reproduce", type=Path, metavar="FILE", help="run this one input of the target")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)  # of a process that this one starts
    arguments = parser.parse_args()
    names = arguments.target or list(TARGETS)
    if arguments.executions is not None and not arguments.random:
        parser.error("--executions counts the inputs of --random")
    if arguments.reproduce is not None:
        if len(names) != 1:
            parser.error("--reproduce FILE needs one --target")
        return _reproduce(names[0], arguments.reproduce)
    if arguments.work is not None:
        guided(names[0], 60 * arguments.minutes, arguments.seed, arguments.work, _keep(arguments.findings, names[0]))
    if not arguments.random and not _has_atheris():
        print("fuzz: atheris is not installed: pip install 'atheris>=3', or give --random", file=sys.stderr)
        return 2
    seconds = 60 * arguments.minutes / len(names)
    run = _run_random if arguments.random else _run_guided
    results = []
    for name in names:
        results.append(run(name, seconds, arguments))
        print(_line(results[-1]), flush=True)
    total, findings = sum(r.executions for r in results), [path for r in results for path in r.findings]
    print(f"{total:,} executions in all, {len(findings)} findings")
    for path in findings:
        print(f"  {path}")
    return 1 if findings else 0


def _run_random(name: str, seconds: float, arguments: argparse.Namespace) -> Result:
    start, found, seen = time.monotonic(), [], set[str]()

    def on_finding(finding: Finding) -> None:
        if finding.kind not in seen:
            seen.add(finding.kind)
            found.append(_keep(arguments.findings, name)(finding))

    with tempfile.TemporaryDirectory(dir=shared_memory()) as scratch:
        target = load_target(name, Path(scratch))
        last = until(seconds) if arguments.executions is None else executions(arguments.executions)
        with bounded_memory():
            count = random_loop(target, corpus(name), Random(arguments.seed), on_finding, last)
        target.close()
    return Result(name, count, time.monotonic() - start, "-", found)


def _run_guided(name: str, seconds: float, arguments: argparse.Namespace) -> Result:
    """Starts libFuzzer in a process of its own, again after each crash until the time is over."""
    start = time.monotonic()
    coverage, before = "?", _files(arguments.findings)
    with tempfile.TemporaryDirectory(dir=shared_memory()) as folder:
        work, round_ = Path(folder), 0
        while (left := seconds - (time.monotonic() - start)) > 1:
            command = [sys.executable, __file__, "--target", name, "--work", folder, "--minutes", str(left / 60)]
            command += ["--seed", str(arguments.seed + round_), "--findings", str(arguments.findings)]
            process = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
            round_ += 1
            coverage = (re.findall(r"cov: (\d+)", process.stderr) or [coverage])[-1]
            crashes = [path for path in work.glob("*-*") if path.is_file()]
            for crash in crashes:
                told = f"{crash.name} (exit code {process.returncode})\n{process.stderr[-6000:]}"
                Finding("crash", told, crash.read_bytes()).save(arguments.findings, name)
                crash.unlink()
            if process.returncode != 0 and not crashes:
                print(f"fuzz: {name}: ended with {process.returncode}:\n{process.stderr[-3000:]}", file=sys.stderr)
                sys.exit(3)
        counted = work / "count"
        count = int.from_bytes(counted.read_bytes(), "little") if counted.exists() else 0
    new = sorted(_files(arguments.findings) - before)
    return Result(name, count, time.monotonic() - start, coverage, new)


def _reproduce(name: str, path: Path) -> int:
    with tempfile.TemporaryDirectory(dir=shared_memory()) as scratch:
        target = load_target(name, Path(scratch))
        finding = judge(target, path.read_bytes())
        target.close()
    print("no finding" if finding is None else f"{finding.kind}\n{finding.text}")
    return 0 if finding is None else 1


def _keep(folder: Path, name: str) -> Callable[[Finding], Path]:
    return lambda finding: finding.save(folder, name)


def _files(folder: Path) -> set[Path]:
    return {path for path in folder.glob("*") if path.suffix != ".txt"} if folder.is_dir() else set()


def _has_atheris() -> bool:
    from importlib.util import find_spec

    return find_spec("atheris") is not None


def _line(result: Result) -> str:
    rate = result.executions / max(result.seconds, 1e-9)
    return (
        f"{result.name:14} {result.executions:>9,} executions, {rate:>7,.0f}/s, coverage {result.coverage:>5}, "
        f"{len(result.findings)} findings"
    )


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
