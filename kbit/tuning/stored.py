"""The file of tuned configurations: in the cache, one per GPU name, Triton version and state of the kernels.

What `kbit tune` found is read once per process, when a backend for that GPU is made. A file is data that anyone may
have written: sizes are limited, every value is checked, and a configuration counts only if it is one that tuning would
try for that problem, so that the worst a file can do is to make kernels slow. A file that is anything else is ignored
as a whole, with one warning that names it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from inspect import unwrap
from pathlib import Path
from typing import Any

import torch
import triton

from kbit.backends.gpu import kernels_hash
from kbit.host.cache_folder import cache_dir
from kbit.host.errors import KbitError, one_line
from kbit.host.files import write_durably
from kbit.kernels.triton import tuned
from kbit.kernels.triton.attention import configs as attention_configs
from kbit.kernels.triton.attention.configs import DecodeConfig, PrefillConfig
from kbit.kernels.triton.attention.kv_layout import KINDS
from kbit.kernels.triton.product import configs
from kbit.kernels.triton.product.configs import GemmConfig, GemvConfig, Problem
from kbit.kernels.triton.target import current_arch

VERSION = 1
MAX_BYTES = 4 << 20
MAX_ENTRIES = 10_000  # a model has about 20 per width
_MAX_SIZE = 1 << 40  # of any number in a problem

Config = GemvConfig | GemmConfig | DecodeConfig | PrefillConfig


@dataclass(frozen=True)
class DecodeProblem:
    """What `decode_config` is asked.

    Attributes:
        head_dim: D.
        k_bits: width of the keys, 16 for floats.
        v_bits: width of the values.
        rows: of a tile: 16, 32 or 64.
    """

    head_dim: int
    k_bits: int
    v_bits: int
    rows: int


@dataclass(frozen=True)
class PrefillProblem:
    """What `prefill_config` is asked; see DecodeProblem."""

    head_dim: int
    k_bits: int
    v_bits: int


AnyProblem = Problem | DecodeProblem | PrefillProblem
_PROBLEMS: dict[str, type[Any]] = {
    "gemv": Problem,
    "gemm": Problem,
    "decode": DecodeProblem,
    "prefill": PrefillProblem,
}
_CONFIGS: dict[str, type[Any]] = {
    "gemv": GemvConfig,
    "gemm": GemmConfig,
    "decode": DecodeConfig,
    "prefill": PrefillConfig,
}


@dataclass(frozen=True)
class Entry:
    """What was found for one problem.

    Attributes:
        kernel: "gemv", "gemm", "decode" or "prefill".
        problem: which one.
        config: the fastest that was timed and gave the right result.
        seconds: it took.
        default_seconds: the table's configuration took; None where that one does not run.
    """

    kernel: str
    problem: AnyProblem
    config: Config
    seconds: float
    default_seconds: float | None


@dataclass(frozen=True)
class Target:
    """Whose configurations these are.

    Attributes:
        gpu: its name, as the driver tells it.
        arch: of current_arch().
        triton: version.
        kernels: hash of the kernels' sources.
    """

    gpu: str
    arch: str
    triton: str
    kernels: str

    @property
    def path(self) -> Path:
        """The file. Raises KbitError where no cache folder is known."""
        name = re.sub(r"[^A-Za-z0-9.]+", "-", self.gpu).strip("-.")[:80] or "gpu"
        version = re.sub(r"[^A-Za-z0-9.+]+", "-", self.triton)[:40]
        return cache_dir() / "tuned" / f"{name}-{self.arch}-triton-{version}-{self.kernels[:12]}.json"


def target_of(device: torch.device) -> Target:
    """A GPU as a target; in Triton's interpreter, the interpreter."""
    if device.type != "cuda":
        return Target("interpreter", current_arch(), str(triton.__version__), kernels_hash())
    with torch.cuda.device(device):
        name = torch.cuda.get_device_name(device)
        return Target(name, current_arch(), str(triton.__version__), kernels_hash())


def choices(kernel: str, arch: str, problem: AnyProblem) -> list[Any]:
    """Every configuration that tuning tries for a problem, the table's own first, each once.

    Raises:
        ValueError: a problem that no kernel has (columns that are not padded).
    """
    default = default_config(kernel, arch, problem)
    found: list[Any]
    if isinstance(problem, Problem):
        make: Callable[[str, Problem], list[Any]]
        make = configs.gemv_candidates if kernel == "gemv" else configs.gemm_candidates
        found = make(arch, problem)
        if kernel == "gemm" and problem.gated:  # an activation needs whole sums
            found = [replace(config, split=1) for config in found]
            default = replace(default, split=1)
    elif isinstance(problem, DecodeProblem):
        # What accuracy and the compiler need is the table's business; candidates are for tiles of 16 rows and a warp.
        keep = {name: getattr(default, name) for name in ("warps", "p_log2", "scale_tiles", "waves")}
        found = [
            replace(config, programs=max(1, config.programs // default.warps), **keep)
            for config in attention_configs.decode_candidates(arch)
        ]
    else:
        keep = {name: getattr(default, name) for name in ("p_log2", "scale_tiles", "waves")}
        found = [replace(config, **keep) for config in attention_configs.prefill_candidates(arch)]
    return list(dict.fromkeys([default, *found]))


def default_config(kernel: str, arch: str, problem: AnyProblem) -> Any:
    """The table's configuration, whatever is installed."""
    choosers: dict[str, Callable[..., Any]] = {
        "gemv": configs.gemv_config,
        "gemm": configs.gemm_config,
        "decode": attention_configs.decode_config,
        "prefill": attention_configs.prefill_config,
    }
    return unwrap(choosers[kernel])(arch, *_arguments(problem))


def use_tuned(device: torch.device) -> None:
    """Makes the kernels prefer what was tuned for a GPU, if anything was. The file is read once per process.

    Of two GPUs of one architecture but different names in one process, the second's file counts for both.
    """
    if device.type == "cuda":
        _use(target_of(device))


@lru_cache(maxsize=16)
def _use(target: Target) -> None:
    install(target, load(target))


def install(target: Target, entries: Mapping[tuple[str, AnyProblem], Entry]) -> None:
    """Puts entries in force, in place of any others for the architecture."""
    tuned.install(
        target.arch,
        {(kernel, _arguments(problem)): entry.config for (kernel, problem), entry in entries.items()},
    )


def load(target: Target) -> dict[tuple[str, AnyProblem], Entry]:
    """What the target's file holds, by (kernel, problem); nothing where there is none, or, with a warning, where it is
    not what `save` writes."""
    try:
        path = target.path
    except KbitError:  # no cache folder
        return {}
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        return parse(data, target)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        reason = f"no {one_line(error)}" if isinstance(error, KeyError) else one_line(error)
        reason = "".join(char if char.isprintable() else "?" for char in reason)  # it may quote a hostile file
        sys.stderr.write(f"kbit: warning: {path} is ignored: {reason}; run kbit tune again, or delete it\n")
        return {}


def add(target: Target, entry: Entry) -> Path:
    """Adds an entry to the target's file, to what other processes have added meanwhile; see `save`."""
    from filelock import FileLock

    path = target.path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        return save(target, {**load(target), (entry.kernel, entry.problem): entry})


def save(target: Target, entries: Mapping[tuple[str, AnyProblem], Entry]) -> Path:
    """Writes the target's file, complete or not at all, and returns where.

    Raises:
        KbitError: no cache folder is known.
        OSError: it cannot be written.
    """
    path = target.path
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "kernel": entry.kernel,
            "problem": asdict(entry.problem),
            "config": asdict(entry.config),
            "seconds": entry.seconds,
            "default_seconds": entry.default_seconds,
        }
        for entry in entries.values()
    ]
    text = json.dumps({"version": VERSION, **asdict(target), "entries": rows}, indent=1, allow_nan=False)
    write_durably(path, text.encode())
    return path


def parse(data: bytes, target: Target) -> dict[tuple[str, AnyProblem], Entry]:
    """The entries in a file's bytes.

    Raises:
        ValueError, TypeError, KeyError, RecursionError: it is not what `save` writes for this target.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES >> 20} MiB")
    content = json.loads(data.decode("utf-8"))
    if not isinstance(content, dict):
        raise ValueError("a JSON object was expected")
    for name, wanted in {"version": VERSION, **asdict(target)}.items():
        if content[name] != wanted:
            raise ValueError(f"it is for {name} {one_line(content[name], 60)}, not {one_line(wanted, 60)}")
    rows = content["entries"]
    if not isinstance(rows, list) or len(rows) > MAX_ENTRIES:
        raise ValueError(f"entries: a list of at most {MAX_ENTRIES} was expected")
    entries = {}
    for row in rows:
        entry = _entry(row, target.arch)
        entries[entry.kernel, entry.problem] = entry
    return entries


def _entry(row: Any, arch: str) -> Entry:
    if not isinstance(row, dict) or row["kernel"] not in _CONFIGS:
        raise ValueError("an entry for no known kernel")
    kernel = row["kernel"]
    problem = _build(_PROBLEMS[kernel], row["problem"])
    config = _build(_CONFIGS[kernel], row["config"])
    _check_problem(problem)
    if config not in choices(kernel, arch, problem):
        raise ValueError(f"a {kernel} configuration that tuning does not try: {one_line(config)}")
    seconds = _seconds(row["seconds"])
    default = row["default_seconds"]
    return Entry(kernel, problem, config, seconds, None if default is None else _seconds(default))


def _build(kind: type[Any], values: Any) -> Any:
    """An instance of a dataclass of plain values, each of exactly the type it is declared with."""
    declared = {field.name: field.type for field in fields(kind)}
    if not isinstance(values, dict) or set(values) != set(declared):
        raise ValueError(f"a {kind.__name__} with other fields")
    for name, value in values.items():
        if type(value).__name__ != declared[name]:
            raise ValueError(f"{kind.__name__}.{name}: {one_line(value, 60)} is no {declared[name]}")
        if isinstance(value, int) and not 0 <= value < _MAX_SIZE:
            raise ValueError(f"{kind.__name__}.{name}: {value}")
    return kind(**values)


def _check_problem(problem: AnyProblem) -> None:
    if isinstance(problem, Problem):
        valid = problem.tokens >= 1 and problem.rows >= 16 and problem.columns >= 64 and 2 <= problem.bits <= 8
        valid = valid and problem.element_size in (2, 4) and len(problem.format) <= 40
    else:
        widths = {16, *(int(kind) for kind in KINDS if kind.isdigit())}
        valid = 16 <= problem.head_dim <= 256 and {problem.k_bits, problem.v_bits} <= widths
        valid = valid and (isinstance(problem, PrefillProblem) or problem.rows in (16, 32, 64))
    if not valid:
        raise ValueError(f"no such problem: {one_line(problem)}")


def _seconds(value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e6:
        raise ValueError(f"{one_line(value, 60)} is no time")
    return float(value)


def _arguments(problem: AnyProblem) -> tuple[Hashable, ...]:
    """A problem as the arguments of its chooser, after the architecture."""
    if isinstance(problem, Problem):
        return (problem,)
    return tuple(getattr(problem, field.name) for field in fields(problem))
