"""A stand-in for Triton's GPU driver, under which launches compile and do not run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from triton_lint.chips import CHIPS


@dataclass(frozen=True)
class Launch:
    """A kernel that was compiled instead of launched.

    Attributes:
        arch: "sm_90", "gfx942" and so on.
        kernel: name of the function.
        grid: number of programs along three axes.
        compiled: Triton's CompiledKernel.
        arguments: the kernel's scalar and constant arguments by name.
    """

    arch: str
    kernel: str
    grid: tuple[int, int, int]
    compiled: Any = field(repr=False)
    arguments: dict[str, Any] = field(repr=False)

    @property
    def programs(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def num_warps(self) -> int:
        return int(self.compiled.metadata.num_warps)

    @property
    def num_stages(self) -> int:
        return int(self.compiled.metadata.num_stages)


def gpu_target(arch: str) -> GPUTarget:
    """Triton's name for an architecture.

    Raises:
        ValueError: unknown architecture.
    """
    if arch not in CHIPS:
        raise ValueError(f"architecture {arch!r} is not one of {', '.join(CHIPS)}")
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch[3:]), 32)
    return GPUTarget("hip", arch, CHIPS[arch].warp)


class StandInDriver:
    """What the just-in-time compiler asks a driver for, answered without one."""

    def __init__(self, arch: str) -> None:
        self.target = gpu_target(arch)
        # Triton keeps compiled kernels per device: a device of its own for every architecture.
        self.device = list(CHIPS).index(arch)
        self.utils = self
        self._chip = CHIPS[arch]

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int | None = None) -> dict[str, int]:
        return {
            "max_shared_mem": self._chip.shared_program,
            "multiprocessor_count": self._chip.units,
            "max_num_regs": 65536,
            "warpSize": self._chip.warp,
        }

    def get_benchmarker(self) -> Any:
        return lambda call, **options: [0.0, 0.0, 0.0]

    def map_python_to_cpp_type(self, name: str) -> str:
        return name

    @staticmethod
    def is_active() -> bool:
        return True


@contextmanager
def compile_for(arch: str) -> Iterator[list[Launch]]:
    """Within this block, launching a kernel compiles it for `arch` and runs nothing.

    Tensors may be on "cpu" or "meta" (any size costs nothing; their address counts as aligned). Code between launches
    runs as usual, so a launcher's own outputs hold nothing.

    Yields:
        A list that grows by a Launch with every launch.

    Raises:
        ValueError: unknown architecture.
        RuntimeError: TRITON_INTERPRET is set.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: compile and interpret in separate processes")
    launches: list[Launch] = []
    before, run = driver._active, JITFunction.run
    stand_in = StandInDriver(arch)

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        bound = dict(zip(self.arg_names, args, strict=False))
        bound.update({name: value for name, value in options.items() if name in self.arg_names})
        size = grid(bound) if callable(grid) else grid
        size = (*(int(n) for n in size), 1, 1)[:3]
        plain = {name: value for name, value in bound.items() if not isinstance(value, torch.Tensor)}
        launches.append(Launch(arch, self.__name__, size, compiled, plain))
        return compiled

    driver.set_active(stand_in)
    JITFunction.run = compile_only
    try:
        yield launches
    finally:
        JITFunction.run = run
        driver._active = before
