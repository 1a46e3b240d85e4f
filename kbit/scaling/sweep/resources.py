"""How many points fit side by side, and how long they will take. Imports no torch."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kbit.host.cpu import default_threads
from kbit.host.memory import available_memory
from kbit.scaling.points import Point
from kbit.scaling.sweep.subject import Subject

# A process with torch and kbit loaded that has measured a small model (0.36 GB), and room to spare.
_BASE_BYTES = 450_000_000
# Elements of logits that a process holds at once (kbit.evaluate.logits), the reference's beside the model's.
_PIECE_BYTES = 2 * 4 * (1 << 25)
# Of what the system says is free, sweeps take this part: the page cache holds the reference's logits.
_SHARE = 0.75
# Arithmetic of one thread, in operations per second, where nothing has been measured yet: an AVX2 core of 3 GHz in
# fp32 at half its peak. Only for a first guess at the time.
_GUESS = 4.0e10


@dataclass(frozen=True)
class Jobs:
    """Processes side by side.

    Attributes:
        count: how many.
        keep_weights: whether each holds a model's weights in memory between points, instead of reading them again.
        memory: bytes that each takes, roughly.
    """

    count: int
    keep_weights: bool
    memory: int


def choose_jobs(subjects: Sequence[Subject], tasks: int, jobs: int | None, threads: int) -> Jobs:
    """As many processes as there are cores, tasks and memory for; or `jobs`, if they are given.

    Args:
        tasks: points to measure.
        threads: of each process.
    """
    largest = max((subject.parameters for subject in subjects), default=0)
    vocab = max((subject.vocab_size for subject in subjects), default=0)
    prepared = 4 * largest
    lean = _BASE_BYTES + prepared + min(_PIECE_BYTES, 2 * 4 * 512 * vocab)
    keeping = lean + 4 * largest
    wanted = jobs or max(1, default_threads() // threads)
    wanted = max(1, min(wanted, tasks))
    available = available_memory()
    if available is None:
        return Jobs(wanted, True, keeping)
    budget = _SHARE * available
    for count in range(wanted, 0, -1):
        if count * keeping <= budget:
            return Jobs(count, True, keeping)
        if count * lean <= budget or jobs is not None:
            return Jobs(count, False, lean)
    return Jobs(1, False, lean)


@dataclass
class Rates:
    """Seconds a point takes, learned from the points that have been measured.

    Attributes:
        seconds: of the points of each model, by its content digest.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, points: Iterable[Point]) -> Rates:
        rates = cls()
        for point in points:
            rates.add(point)
        return rates

    def add(self, point: Point) -> None:
        """Learn from a point."""
        self.seconds.setdefault(point.model_id, []).append(point.quantize_seconds + point.evaluate_seconds)

    def of_point(self, subject: Subject, subjects: Iterable[Subject]) -> float | None:
        """Seconds for a point of a model: the median of its own, or in proportion to the work from other models'.

        None where no model has been measured yet.
        """
        own = self.seconds.get(subject.content)
        if own:
            return statistics.median(own)
        known = [
            statistics.median(self.seconds[other.content]) * work(subject) / work(other)
            for other in subjects
            if self.seconds.get(other.content)
        ]
        return statistics.median(known) if known else None


def work(subject: Subject) -> float:
    """Operations that a pass over the windows takes, roughly: two for each weight and token, the head included."""
    return 2.0 * subject.parameters * subject.windows.ids.size


def guess_seconds(subject: Subject) -> float:
    """Seconds for a point on a machine of which nothing is known."""
    return work(subject) / _GUESS
