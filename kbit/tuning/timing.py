"""Tuning: timing a kernel's candidate configurations on problems, and keeping the fastest that compute the right thing.

The search knows no GPU: it is given jobs (`kbit.tuning.jobs` makes a model's) and a timer (`GpuTimer`). Every
candidate's result is compared with plain torch before it is timed. What is done is kept after every job, so an
interrupted search has lost only the job it was in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import mean, median
from typing import Any

import torch
from triton.errors import TritonError

from kbit.host.errors import KbitError, UnsupportedError, one_line
from kbit.tuning.stored import AnyProblem, Entry, choices

# Less than so much faster counts as noise, and the table's choice stays.
MIN_GAIN = 0.02
# The best candidates and the default are timed again in turns, so that a lucky moment does not decide.
FINALISTS = 3
FINAL_ROUNDS = 2

Timer = Callable[[Callable[[], object]], float]


@dataclass(frozen=True, eq=False)
class Trial:
    """A problem with its tensors.

    Attributes:
        launch: runs the kernel with a configuration, and returns its result.
        is_wrong: whether a result is too far from plain torch's.
    """

    launch: Callable[[Any], torch.Tensor]
    is_wrong: Callable[[torch.Tensor], bool]


@dataclass(frozen=True, eq=False)
class Job:
    """One problem to tune.

    Attributes:
        kernel: as in Entry.
        problem: as in Entry.
        label: for people.
        prepare: makes the tensors: one trial, or several (contexts of attention) whose times count equally.
    """

    kernel: str
    problem: AnyProblem
    label: str
    prepare: Callable[[], Sequence[Trial]]

    @property
    def key(self) -> tuple[str, AnyProblem]:
        return self.kernel, self.problem


@dataclass(frozen=True)
class Outcome:
    """What came of a job.

    Attributes:
        job: which.
        entry: what was found; None where no configuration ran and was right.
        tried: configurations.
        failed: those that the compiler, or the GPU's resources, refused.
        wrong: those whose result was wrong.
    """

    job: Job
    entry: Entry | None
    tried: int
    failed: int
    wrong: int

    @property
    def speedup(self) -> float | None:
        """Times as fast as the table's configuration; None where one of the two is missing."""
        if self.entry is None or self.entry.default_seconds is None:
            return None
        return self.entry.default_seconds / self.entry.seconds


def tune(
    jobs: Sequence[Job],
    arch: str,
    timer: Timer,
    *,
    step: Callable[[Job], object] = lambda job: None,
    done: Callable[[Outcome], object] = lambda outcome: None,
) -> list[Outcome]:
    """Tunes problems one after the other.

    Args:
        jobs: the problems.
        arch: whose candidates to try.
        timer: seconds of a launch.
        step: called after each configuration.
        done: called after each job: the place to save.

    Raises:
        KbitError: the GPU no longer works (a kernel broke its context).
    """
    outcomes = []
    for job in jobs:
        outcomes.append(tune_job(job, arch, timer, step))
        done(outcomes[-1])
    return outcomes


def tune_job(job: Job, arch: str, timer: Timer, step: Callable[[Job], object] = lambda job: None) -> Outcome:
    """Tunes one problem; see tune."""
    trials = job.prepare()
    configs = choices(job.kernel, arch, job.problem)
    times: dict[Any, list[list[float]]] = {}  # per trial, its timings
    failed = wrong = 0
    for config in configs:
        try:
            if any(trial.is_wrong(trial.launch(config)) for trial in trials):
                wrong += 1
            else:
                times[config] = [[_time(timer, trial, config)] for trial in trials]
        except (TritonError, RuntimeError, UnsupportedError, ValueError) as error:
            _check_gpu(job, config, error)
            failed += 1
        step(job)
    if not times:
        return Outcome(job, None, len(configs), failed, wrong)
    default = configs[0] if configs[0] in times else None
    ranked = sorted(times, key=lambda config: _geometric(times[config]))[:FINALISTS]
    finalists = list(dict.fromkeys([*ranked, *([] if default is None else [default])]))
    for _ in range(FINAL_ROUNDS if len(finalists) > 1 else 0):
        for config in finalists:
            for trial, taken in zip(trials, times[config], strict=True):
                taken.append(_time(timer, trial, config))
    best = min(finalists, key=lambda config: _geometric(times[config]))
    seconds = _geometric(times[best])
    default_seconds = None if default is None else _geometric(times[default])
    if default_seconds is not None and seconds > default_seconds * (1 - MIN_GAIN):
        best, seconds = default, default_seconds
    entry = Entry(job.kernel, job.problem, best, seconds, default_seconds)
    return Outcome(job, entry, len(configs), failed, wrong)


def _time(timer: Timer, trial: Trial, config: Any) -> float:
    return timer(lambda: trial.launch(config))


def _geometric(times: Sequence[Sequence[float]]) -> float:
    """Geometric mean over trials of the medians: long contexts do not drown the short ones."""
    return exp(mean(log(max(median(taken), 1e-12)) for taken in times))


def _check_gpu(job: Job, config: Any, error: Exception) -> None:
    """Goes on after a refusal, but not on a GPU whose context is lost: every later launch would fail too."""
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        raise KbitError(
            f"the GPU stopped working in {job.label} with {config} ({one_line(error)}); what was tuned before is "
            "saved. Please report this; run kbit tune again to go on with the rest"
        ) from None


class GpuTimer:
    """Seconds of a launch on the GPU, nothing of it in the L2 cache: the median of many.

    Launches are replayed from a CUDA graph, so that the host's share (tens of microseconds in Triton) does not count,
    as it does not in decoding. What is left beside the kernels is the start of a graph, a few microseconds and the same
    for every configuration.

    Args:
        device: the GPU.
        budget: seconds to spend on a timing, the emptying of the cache included.
    """

    def __init__(self, device: torch.device, budget: float = 0.05) -> None:
        self._device = device
        self._budget = budget
        cache = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))
        # At least the 256 MB of the MI300's last cache, which that property does not tell.
        self._flush = torch.empty(max(256 << 20, 2 * cache), dtype=torch.uint8, device=device)

    def __call__(self, launch: Callable[[], object]) -> float:
        with torch.cuda.device(self._device):
            launch()  # compiles, which must not happen while capturing
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                launch()
            once = max(self._timings(graph, 3))
            # Emptying the cache is taken to cost 256 MB at 1 TB/s.
            repeats = max(5, min(200, int(self._budget / (once + 250e-6))))
            return median(self._timings(graph, repeats))

    def _timings(self, graph: torch.cuda.CUDAGraph, repeats: int) -> list[float]:
        make: Callable[..., Any] = torch.cuda.Event
        events = [(make(enable_timing=True), make(enable_timing=True)) for _ in range(repeats)]
        for start, end in events:
            self._flush.zero_()
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]
