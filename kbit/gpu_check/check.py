"""`kbit check-gpu`: the steps of a GPU's first day in short, remembered for this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from kbit.backends.checked import machine, remember
from kbit.gpu_check import report
from kbit.gpu_check.place import SHORT, Place
from kbit.gpu_check.runner import Result, Step, run_steps
from kbit.gpu_check.steps import correctness, performance
from kbit.host.errors import UnsupportedError

SECONDS = 240.0


def refuse_without_gpu() -> dict[str, str]:
    """What a check will be valid for.

    Raises:
        UnsupportedError: there is no Triton, or no GPU.
    """
    if find_spec("triton") is None:
        raise UnsupportedError("kbit check-gpu needs Triton, which this Python has not: pip install triton (Linux)")
    import torch

    of = machine()
    if not torch.cuda.is_available():
        raise UnsupportedError(
            "kbit check-gpu runs the kernels on a GPU, and torch sees none. Is there one, and is this torch a CUDA or "
            "ROCm build? Without a GPU there is nothing to check"
        )
    if of is None:
        raise UnsupportedError(
            "kbit check-gpu: torch sees a GPU, but its driver is not where kbit looks (/proc/driver/nvidia/gpus, "
            "/dev/nvidia0, /sys/class/kfd), so --device auto would not find it: use --device cuda"
        )
    return of


def check_machine(
    of: dict[str, str],
    *,
    seed: int = 0,
    steps: Sequence[Step] | None = None,
    place: Place | None = None,
    said: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Runs the steps and remembers what they found.

    Args:
        of: the machine, of `refuse_without_gpu`.
        seed: of everything random.
        steps, place: other ones than `kbit check-gpu` takes.
        said: called with a line for people after each step.

    Returns:
        `report.document`, and under "path" where it is kept.

    Raises:
        KbitError: no cache folder is known.
        OSError: the cache cannot be written.
    """
    place = place or Place("cuda", SHORT, seed)
    started = time.time()
    results: list[Result] = run_steps(
        steps or [*correctness(SHORT), *performance(SHORT)], place, seconds=SECONDS, said=said
    )
    found = report.document(results, place, started, time.time())
    return {**found, "path": str(remember(of, found))}
