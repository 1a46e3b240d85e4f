"""Tuning the GPU kernels for a model: from its name to a file of configurations in the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import exp, log
from statistics import mean
from typing import TYPE_CHECKING, Any

from kbit.host.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from kbit.tuning.stored import AnyProblem, Entry, Target
    from kbit.tuning.timing import Job, Outcome, Timer

Step = Callable[[int, int, str], None]


@dataclass(frozen=True, eq=False)
class TuneResult:
    """What a tuning came to.

    Attributes:
        gpu: its name.
        triton: version.
        path: the file of configurations.
        outcomes: of the problems that were tuned now.
        known: problems that had been tuned before, and were left as they are.
        interrupted: whether it ended early.
    """

    gpu: str
    triton: str
    path: Path
    outcomes: Sequence[Outcome]
    known: int
    interrupted: bool

    @property
    def gain(self) -> float | None:
        """Geometric mean of the speedups over the default; None without any."""
        speedups = [outcome.speedup for outcome in self.outcomes if outcome.speedup is not None]
        return exp(mean(map(log, speedups))) if speedups else None

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "gpu": self.gpu,
            "triton": self.triton,
            "path": str(self.path),
            "known": self.known,
            "interrupted": self.interrupted,
            "speedup": self.gain,
            "problems": [
                {
                    "kernel": outcome.job.kernel,
                    "label": outcome.job.label,
                    "problem": asdict(outcome.job.problem),
                    "config": outcome.entry and asdict(outcome.entry.config),
                    "seconds": outcome.entry and outcome.entry.seconds,
                    "default_seconds": outcome.entry and outcome.entry.default_seconds,
                    "speedup": outcome.speedup,
                    "tried": outcome.tried,
                    "failed": outcome.failed,
                    "wrong": outcome.wrong,
                }
                for outcome in self.outcomes
            ],
        }


def tune_model(
    model: str,
    device: str = "cuda",
    *,
    compute: str | None = None,
    kv_bits: int | str | None = None,
    bits: float | None = None,
    quick: bool = False,
    again: bool = False,
    on_step: Step = lambda done, total, label: None,
) -> TuneResult:
    """Tunes the kernels for a model's shapes on a GPU, and saves what is found after every problem.

    Args:
        model: as for load_model.
        device: "cuda", or "cuda:1" and so on.
        compute, kv_bits: as for select_backend: types are problems of their own.
        bits: of a nested model, how many; None: the most. Each width has problems of its own.
        quick: fewer problems.
        again: also those that the file has.
        on_step: called with (configurations done, in all, what is being tuned).

    Raises:
        UnsupportedError: no Triton, or no GPU.
        UsageError: a value that does not exist; no such model.
        KbitError: the model cannot be read; the file cannot be written; the GPU stopped working.
    """
    if device.partition(":")[0] != "cuda":
        raise UsageError(f"--device {device}: tuning is for GPUs: use cuda")
    _check_gpu(device)
    import torch

    from kbit.backends.select import select_backend
    from kbit.backends.triton.backend import TritonBackend
    from kbit.models.load import load_decoder
    from kbit.models.opening import open_model
    from kbit.tuning.jobs import model_jobs
    from kbit.tuning.stored import target_of
    from kbit.tuning.timing import GpuTimer

    if compute in ("int8", "fp8"):
        raise UsageError(f"--compute {compute}: its kernels have nothing to tune; use fp16, which it is for few tokens")
    if "," in str(kv_bits):
        raise UsageError(f"--kv-bits {kv_bits}: tune one width at a time")
    checked = select_backend("cuda", compute=compute, kv_bits=kv_bits)  # refuses what does not exist
    assert isinstance(checked, TritonBackend)
    place = torch.device(device)
    with torch.cuda.device(place):
        place = torch.device("cuda", torch.cuda.current_device())
        backend = TritonBackend(place, compute=checked.compute, kv=str(kv_bits or 16))
        with open_model(model, bits) as source:
            decoder = load_decoder(source, backend, progress=lambda done, total: on_step(done, total, "loading"))
        jobs = model_jobs(decoder.weights, decoder.spec, backend.kv, place, quick=quick)
        return tune_jobs(jobs, target_of(place), GpuTimer(place), again=again, on_step=on_step)


def tune_jobs(
    jobs: Sequence[Job], target: Target, timer: Timer, *, again: bool = False, on_step: Step = lambda *_: None
) -> TuneResult:
    """Tunes jobs for a target and keeps its file; see tune_model. Ctrl-C ends it and is reported, not raised."""
    from kbit.tuning.stored import add, choices, install, load
    from kbit.tuning.timing import tune

    entries: dict[tuple[str, AnyProblem], Entry] = load(target)
    wanted = [job for job in jobs if again or job.key not in entries]
    total = sum(len(choices(job.kernel, target.arch, job.problem)) for job in wanted)
    outcomes: list[Outcome] = []
    path = target.path
    count = 0

    def step(job: Job) -> None:
        nonlocal count
        count += 1
        on_step(count, total, job.label)

    def done(outcome: Outcome) -> None:
        outcomes.append(outcome)
        if outcome.entry is not None:
            entries[outcome.job.key] = outcome.entry
            add(target, outcome.entry)

    interrupted = False
    try:
        tune(wanted, target.arch, timer, step=step, done=done)
    except KeyboardInterrupt:
        interrupted = True
    install(target, entries)
    return TuneResult(target.gpu, target.triton, path, outcomes, len(jobs) - len(wanted), interrupted)


def _check_gpu(device: str) -> None:
    """
    Raises:
        UnsupportedError: there is nothing to tune on.
    """
    from importlib.util import find_spec

    if find_spec("triton") is None:
        raise UnsupportedError("kbit tune needs Triton, which this Python has not: pip install triton (Linux)")
    import torch

    if not torch.cuda.is_available():
        raise UnsupportedError(
            "kbit tune times kernels on a GPU, and torch sees none. Is there one, and is this torch a CUDA "
            "or ROCm build? Without a GPU there is nothing to tune"
        )
    index = device.partition(":")[2]
    if index and not (index.isdecimal() and int(index) < torch.cuda.device_count()):
        raise UsageError(f"--device {device}: torch sees {torch.cuda.device_count()} GPUs, counted from cuda:0")
