"""What tools/aot.py compiles: launches with the work they do and the gates they must pass."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from triton_lint.chips import TARGETS
from triton_lint.code import SHARED_LOAD, SHUFFLE
from triton_lint.driver import Launch
from triton_lint.model import Work
from triton_lint.report import Report

# Modules with a function cases() -> list[Case].
MODULES = tuple(f"triton_lint.cases_{name}" for name in ("rows", "matmul", "attention", "recurrent"))


@dataclass(frozen=True)
class Gate:
    """What a kernel's machine code must satisfy.

    Attributes:
        spills: at most this many.
        load_bits: the narrowest evict-first load allowed in the hot loop (asynchronous copies too), and there must be
            one of this width or wider.
        mma: some tensor-core instruction must begin with one of these; () asks nothing.
        per_unit: most thread instructions per unit of work in the hot loop.
        over_floor: most that the estimate may be over the memory floor.
        tensor_share: least share of the tensor cores in the model's time of a multiprocessor.
        shuffles: most shuffles in the hot loop.
        shared_loads: most loads from shared memory in the hot loop.
    """

    spills: int = 0
    load_bits: int = 0
    mma: tuple[str, ...] = ()
    per_unit: float | None = None
    over_floor: float | None = None
    tensor_share: float | None = None
    shuffles: int | None = None
    shared_loads: int | None = None

    def broken(self, found: Report) -> list[str]:
        """What of it does not hold, in words."""
        wrong = []
        if not found.fits:
            wrong.append(f"does not fit: {found.registers} registers, {found.shared} B shared")
        if found.spills > self.spills:
            wrong.append(f"{found.spills} spills, at most {self.spills}")
        if self.load_bits:
            streams = found.stream_loads or found.async_loads
            if not streams or max(streams) < self.load_bits:
                wrong.append(f"no evict-first or asynchronous load of {self.load_bits} bits: {streams or found.loads}")
            elif found.stream_loads and min(found.stream_loads) < self.load_bits:
                wrong.append(f"evict-first loads narrower than {self.load_bits} bits: {found.stream_loads}")
        if self.mma and not found.has_mma(*self.mma):
            wrong.append(f"no {' or '.join(self.mma)}: {sorted(found.mma)}")
        for kind, most in ((SHUFFLE, self.shuffles), (SHARED_LOAD, self.shared_loads)):
            if most is not None and found.counts.get(kind, 0) > most:
                wrong.append(f"{found.counts[kind]} {kind}s in the hot loop, at most {most}")
        e = found.estimate
        if e is None:
            if self.per_unit or self.over_floor or self.tensor_share:
                wrong.append("no estimate: the case gives no work")
            return wrong
        if self.per_unit is not None and e.per_unit > self.per_unit:
            wrong.append(f"{e.per_unit:.2f} instructions per unit, at most {self.per_unit}")
        if self.over_floor is not None and e.over_floor > self.over_floor:
            wrong.append(f"estimate {e.over_floor:.2f} x floor, at most {self.over_floor}")
        if self.tensor_share is not None and e.tensor_share < self.tensor_share:
            wrong.append(f"tensor share {e.tensor_share:.0%}, at least {self.tensor_share:.0%}")
        return wrong


@dataclass(frozen=True)
class Case:
    """A launcher's call to be compiled.

    Attributes:
        name: unique, for example "gemv/nf4-b64/4096x4096".
        launch: (arch, config) -> calls a launcher on "meta" tensors; config is one of `configs`.
        configs: arch -> the configurations to compile; None means the launcher's own choice.
        work: (launch, config) -> the work of one compiled launch, or None for no estimate (a small second kernel).
        gates: arch -> what must hold, for launches of `gated` under the launcher's own choice of configuration.
        gated: name of the kernel that the gates are about; "" for all launches.
        quick: part of the subset that tests compile.
        targets: architectures that the kernel is for.
    """

    name: str
    launch: Callable[[str, Any], object] = field(repr=False)
    configs: Callable[[str], Sequence[Any]] = field(default=lambda arch: (None,), repr=False)
    work: Callable[[Launch, Any], Work | None] = field(default=lambda launch, config: None, repr=False)
    gates: Mapping[str, Gate] = field(default_factory=dict, repr=False)
    gated: str = ""
    quick: bool = False
    targets: Sequence[str] = TARGETS


def all_cases() -> list[Case]:
    """Every case of every module of MODULES, in order."""
    found: list[Case] = []
    for name in MODULES:
        if importlib.util.find_spec(name) is not None:
            found += importlib.import_module(name).cases()
    names = [case.name for case in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"cases with the same name: {', '.join(sorted(twice))}")
    return found
