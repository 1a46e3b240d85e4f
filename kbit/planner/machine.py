"""What this machine can do, measured once and kept: the rates that `kbit plan` predicts speed from.

A measurement belongs to a processor, an instruction set, a number of threads, a compute type and a version of kbit; it
lies as JSON in the folder `machine` of kbit's cache. Kernels and attention shapes are measured when a plan first asks
for them, a second or two each, and added.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kbit.host.errors import KbitError
from kbit.host.memory import available_memory

if TYPE_CHECKING:
    from kbit.planner.kernel_timing import AttentionRate, KernelRate, Overheads

SCHEMA = 1
# Other work while measuring, in processors' worth, from which on the figures are called disturbed.
BUSY = 0.3

Progress = Callable[[str], object]
_Rate = TypeVar("_Rate")


@dataclass
class MachineSpeed:
    """Measured rates.

    Attributes:
        machine: `describe_machine` when they were measured.
        threads, compute: of the native backend.
        bandwidth: bytes per second at which weights are read from memory, at best.
        misses: (bytes read per token, share that comes from memory and not from the processor's caches), rising.
        overheads: what a token costs besides weights and attention.
        constant_bytes: resident memory of a process that runs a model of no size.
        kernels: by `kernel_timing.kernel_key`.
        attention: by `attention_key`.
        busy: processors' worth of other work while measuring; None where the system does not tell.
        created: date and time, ISO 8601, UTC.
    """

    machine: dict[str, Any]
    threads: int
    compute: str
    bandwidth: float
    misses: list[tuple[int, float]]
    overheads: Overheads
    constant_bytes: int
    kernels: dict[str, KernelRate] = field(default_factory=dict)
    attention: dict[str, AttentionRate] = field(default_factory=dict)
    busy: float | None = None
    created: str = ""

    @property
    def disturbed(self) -> bool:
        """Whether so much else ran during the measurement that it is not to be trusted."""
        return self.busy is not None and self.busy > BUSY

    def memory_share(self, nbytes: float) -> float:
        """Share of what is read that comes from memory, where each token reads so many bytes: 0 to 1."""
        before = self.misses[0]
        for point in self.misses:
            if nbytes <= point[0]:
                if point[0] == before[0]:
                    return point[1]
                part = (nbytes - before[0]) / (point[0] - before[0])
                return before[1] + part * (point[1] - before[1])
            before = point
        return before[1]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> MachineSpeed:
        """
        Raises:
            ValueError: not what `to_dict` gives.
        """
        from kbit.planner.kernel_timing import AttentionRate, KernelRate, Overheads

        if value.get("schema") != SCHEMA:
            raise ValueError("another schema")
        misses = [(int(size), _positive(share, zero=True)) for size, share in value["misses"]]
        if not misses:
            raise ValueError("no misses")
        return cls(
            machine=dict(value["machine"]),
            threads=int(value["threads"]),
            compute=str(value["compute"]),
            bandwidth=_positive(value["bandwidth"]),
            misses=misses,
            overheads=_rate(Overheads, value["overheads"]),
            constant_bytes=int(_positive(value["constant_bytes"])),
            kernels={str(key): _rate(KernelRate, entry) for key, entry in value["kernels"].items()},
            attention={str(key): _rate(AttentionRate, entry) for key, entry in value["attention"].items()},
            busy=None if value["busy"] is None else _positive(value["busy"], zero=True),
            created=str(value["created"]),
        )


def describe_machine() -> dict[str, Any]:
    """The processor, what of it this process may use, and the software: JSON values. Imports no torch."""
    from kbit import __version__
    from kbit.host.cpu import default_threads, instruction_set

    return {
        "cpu": _cpu_name(),
        "instruction_set": instruction_set(),
        "cores": default_threads(),
        "memory_bytes": available_memory(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "kbit": __version__,
    }


def attention_key(kv: str, head_dim: int, group: int) -> str:
    """Name of an attention shape: cache kind, features of a head, query heads per key/value head."""
    return f"{kv}-d{head_dim}-g{group}"


def machine_speed(
    kernels: Iterable[str],
    attention: Iterable[tuple[str, int, int]],
    *,
    threads: int | None = None,
    compute: str = "int8",
    remeasure: bool = False,
    progress: Progress | None = None,
) -> MachineSpeed:
    """Rates of this machine, measured now as far as they are not known.

    Args:
        kernels: formats' keys (`kernel_timing.kernel_key`) that are needed.
        attention: (cache kind, head_dim, group) that are needed.
        threads: of the native backend; None: one per physical core.
        compute: "int8", "bf16" or "fp32".
        remeasure: forget what is known.
        progress: called with a line about what is measured next.

    Raises:
        UnsupportedError: a compute type that the instruction set does not have.
        KbitError: a model of no size could not be run, which means that none can.
    """
    from kbit.host.cpu import default_threads

    threads = threads or default_threads()
    description = describe_machine()
    path = _path(description, threads, compute)
    known = None if remeasure or path is None else _read(path)
    attention = list(dict.fromkeys(attention))
    wanted = {attention_key(*shape): shape for shape in attention}
    missing = [key for key in dict.fromkeys(kernels) if known is None or key not in known.kernels]
    unseen = [key for key in wanted if known is None or key not in known.attention]
    if known is not None and not missing and not unseen:
        return known
    say = progress or (lambda line: None)
    timer = _timer(threads, compute)
    busy = other_work()
    if known is None:
        from kbit.planner.process_probe import probe

        say("a process without a model")
        empty = probe(threads, compute)
        say("memory and caches")
        known = MachineSpeed(
            machine=description,
            threads=threads,
            compute=compute,
            bandwidth=timer.bandwidth(),
            misses=timer.misses(),
            overheads=timer.overheads(empty.token_seconds, empty.prompt_seconds),
            constant_bytes=empty.nbytes,
        )
    for key in missing:
        say(f"products with {key} weights")
        known.kernels[key] = timer.kernel(key)
    for key in unseen:
        say(f"attention {key}")
        known.attention[key] = timer.attention(*wanted[key])
    known.busy = max((value for value in (known.busy, busy) if value is not None), default=None)
    known.created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    if path is not None:
        _write(path, known)
    return known


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Processor"):
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def other_work() -> float | None:
    """How many processors other processes keep busy, by a look of a fifth of a second at the system's counters."""
    from time import perf_counter, sleep

    before = _busy_seconds()
    begin = perf_counter()
    sleep(0.2)
    after = _busy_seconds()
    if before is None or after is None:
        return None
    return max(0.0, after - before) / (perf_counter() - begin)


def _busy_seconds() -> float | None:
    """Seconds that all processors have worked since the system started."""
    try:
        words = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
        user, nice, system = (int(word) for word in words[1:4])
        return (user + nice + system) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None


def _timer(threads: int, compute: str) -> Any:
    from kbit.host.errors import UnsupportedError
    from kbit.planner.kernel_timing import Timer

    timer = Timer(threads, compute)
    if compute == "bf16" and not timer.context.has_bf16:
        raise UnsupportedError(
            f"--compute bf16: the {timer.context.isa} kernels have no bfloat16 products; use --compute int8 or fp32"
        )
    return timer


def _path(description: Mapping[str, Any], threads: int, compute: str) -> Path | None:
    """Where a measurement is kept; None where there is no cache folder."""
    from kbit.host.cache_folder import cache_dir

    names = ("cpu", "instruction_set", "cores", "kbit", "python")
    identity = json.dumps([*(description[name] for name in names), threads, compute])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    try:
        return cache_dir() / "machine" / f"{description['instruction_set']}-{threads}-{compute}-{digest}.json"
    except KbitError:
        return None


def _read(path: Path) -> MachineSpeed | None:
    """A measurement that was kept, or None: one that is damaged, or of another schema, is made again."""
    try:
        return MachineSpeed.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(path: Path, measured: MachineSpeed) -> None:
    from kbit.host.files import write_durably

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, json.dumps(measured.to_dict(), indent=1).encode())
    except OSError:
        pass  # it will be measured again


def _rate(kind: type[_Rate], value: Mapping[str, Any]) -> _Rate:
    numbers = {item.name: _positive(value[item.name], zero=True) for item in fields(kind)}  # type: ignore[arg-type]
    return kind(**numbers)


def _positive(value: Any, *, zero: bool = False) -> float:
    number = float(value)
    if not isfinite(number) or number < 0 or (number == 0 and not zero):
        raise ValueError("not a positive number")
    return number
