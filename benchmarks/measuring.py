"""Measuring in turns: rounds of A B A B, medians with their spread, tables, and what machine it was."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

ROUNDS = int(os.environ.get("KBIT_BENCH_ROUNDS", "5"))


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_counts() -> list[int]:
    """KBIT_BENCH_THREADS ("1,2"), else one and all cores, in rising order."""
    named = os.environ.get("KBIT_BENCH_THREADS")
    return sorted({int(part) for part in named.split(",")} if named else {1, cores()})


@dataclass
class Contestant:
    """One side of a comparison.

    Attributes:
        engine: "kbit", or the peer's name.
        name: engine and what it runs, unique in its comparison.
        measure: one measurement, in the comparison's unit.
        about: what else the report should say of it (bytes_per_token, bits_per_weight, ...).
        group: ratios are formed between contestants of one group.
        values: the measurements.
    """

    engine: str
    name: str
    measure: Callable[[], float]
    about: dict[str, Any] = field(default_factory=dict)
    group: str = ""
    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.values)

    def row(self) -> dict[str, Any]:
        """For the report."""
        spread = {"median": self.median, "min": min(self.values), "max": max(self.values)}
        return {"engine": self.engine, "name": self.name, **spread, "values": self.values, **self.about}


def take_turns(
    benchmark: Any, contestants: Sequence[Contestant], rounds: int = ROUNDS, *, warm_up: bool = True
) -> None:
    """Every contestant once per round, after one round that does not count; the order turns round each time.

    Turning it round means that none always follows the same one, in its heat or on the caches it left.
    """
    turn = 0

    def one_round() -> None:
        nonlocal turn
        for contestant in contestants if turn % 2 else reversed(contestants):
            contestant.values.append(contestant.measure())
        turn += 1

    benchmark.pedantic(one_round, rounds=rounds, warmup_rounds=int(warm_up))
    if warm_up and not benchmark.disabled:
        for contestant in contestants:
            del contestant.values[0]


def take_out(contestants: list[Contestant], engine: str) -> Contestant:
    """The only contestant of an engine, which then is none of them any more: a control."""
    (found,) = (contestant for contestant in contestants if contestant.engine == engine)
    contestants.remove(found)
    return found


def ratios(contestants: Sequence[Contestant], *, higher_is_better: bool = True) -> dict[str, dict[str, float]]:
    """How many times better every kbit contestant is than other engines' of its group, by medians."""
    return {
        ours.name: {
            other.name: ours.median / other.median if higher_is_better else other.median / ours.median
            for other in contestants
            if other.engine != ours.engine and other.group == ours.group
        }
        for ours in contestants
        if ours.engine == "kbit"
    }


def report(
    benchmark: Any,
    case: str,
    unit: str,
    contestants: Sequence[Contestant],
    *,
    missing: Sequence[str] = (),
    goal: str = "",
    higher_is_better: bool = True,
    columns: Mapping[str, str] | None = None,
    controls: Sequence[Contestant] = (),
    **about: Any,
) -> None:
    """Put the results in benchmark.extra_info, and print them.

    Args:
        case: what was measured.
        unit: of the values.
        missing: peers that could not take part, each with its reason.
        goal: what the project wants here, for the reader to compare.
        columns: further columns of the table: key in Contestant.about -> how to format it (a format spec).
        controls: what was measured of the machine in the same rounds (its read bandwidth): kept for
            tools/compare_benchmarks.py, which judges by it how far the machine itself changed between two runs.
        about: further facts of the case, for the report.
    """
    better = ratios(contestants, higher_is_better=higher_is_better)
    benchmark.extra_info.update(
        {
            "case": case,
            "unit": unit,
            "higher_is_better": higher_is_better,
            **about,
            "goal": goal,
            "machine": machine(),
            "rows": [contestant.row() for contestant in contestants],
            "controls": [contestant.row() for contestant in controls],
            "kbit_over": better,
            "missing": list(dict.fromkeys(missing)),
        }
    )
    facts = "".join(
        f", {name} {format(value, '.4g' if isinstance(value, float) else '')}" for name, value in about.items()
    )
    print(f"\n\n{case}{facts}: {unit}, median of {len(contestants[0].values)} (min to max)\n{machine_line()}")
    width = max(len(contestant.name) for contestant in contestants)
    for contestant in contestants:
        low, high = show(min(contestant.values)), show(max(contestant.values))
        line = f"  {contestant.name:<{width}}  {show(contestant.median):>8}  ({low} to {high})"
        for key, spec in (columns or {}).items():
            if contestant.about.get(key) is not None:
                line += f"  {key.replace('_', ' ')} {contestant.about[key]:{spec}}"
        print(line)
    for contestant in controls:
        low, high = show(min(contestant.values)), show(max(contestant.values))
        print(f"  {contestant.name:<{width}}  {show(contestant.median):>8}  ({low} to {high}), measured beside them")
    if any(better.values()):
        print("  times as good as the peers (above 1, kbit is ahead):")
    for name, others in better.items():
        if others:
            print(f"    {name}: " + ", ".join(f"{ratio:.2f} {other}" for other, ratio in others.items()))
    if goal:
        print(f"  goal: {goal}")
    for line in dict.fromkeys(missing):
        print(f"  missing: {line}")


def show(value: float) -> str:
    """Three significant digits or more, without an exponent."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def machine() -> dict[str, Any]:
    """What this ran on."""
    model, flags = platform.processor() or platform.machine(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in cpuinfo.open())}
        model, flags = fields.get("model name", model), fields.get("flags", fields.get("Features", ""))
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")
    return {
        "cpu": model,
        "cores": cores(),
        "isa": [name for name in wanted if name in flags.split()],
        "kbit_isa": os.environ.get("KBIT_CPU_ISA", "best"),
        "system": platform.platform(),
    }


def machine_line() -> str:
    facts = machine()
    return f"{facts['cpu']}, {facts['cores']} cores, {' '.join(facts['isa'])}; KBIT_CPU_ISA {facts['kbit_isa']}"


def run_facts() -> dict[str, Any]:
    """What a file of results should say beyond pytest-benchmark's own description of the machine."""
    from kbit.backends.gpu import gpu_summary
    from kbit.host.cpu import default_threads, instruction_set

    return {
        **machine(),
        "memory_bytes": memory_bytes(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "instruction_set": instruction_set(),
        "threads": default_threads(),
        "gpu": gpu_summary(),
        "versions": {name: version_of(name) for name in ("kbit", "torch", "numpy", "triton", "bitsandbytes")},
    }


def memory_bytes() -> int | None:
    """Memory of the machine; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def version_of(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
