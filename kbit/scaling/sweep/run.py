"""Running a sweep: models x formats on one text, measured side by side, each point once.

What is known already was found when the sweep was planned (sweep.plan); the rest is handed to a pool of
processes. Rows are written as they come; a run that is killed at any moment leaves a table that the next one continues.

    OUT/points.jsonl         the table
    OUT/sweep.json           what all its rows share: text, windows, arithmetic
    OUT/reference-*.logits   while the sweep runs: the originals' logits (kbit.evaluate.shared_logits)
    OUT/reference-*.npz      the same time: what their gradients say of their weights (kbit.evaluate.fisher)
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from kbit.host.errors import KbitError, UsageError
from kbit.host.files import write_durably
from kbit.scaling.points import Point, append_points
from kbit.scaling.sweep.measure import Task
from kbit.scaling.sweep.plan import Planned, SweepPlan, check_settings, read_table, settings_of
from kbit.scaling.sweep.resources import Rates
from kbit.scaling.sweep.store import PointStore
from kbit.scaling.sweep.subject import text_name
from kbit.scaling.sweep.workers import Event, InlinePool, Pool, ProcessPool

# How often a sweep looks up while nothing happens, in seconds.
_TICK = 0.5


@dataclass(frozen=True)
class Failure:
    """A point that could not be measured.

    Attributes:
        model, label: which.
        why: the reason.
        bug: the traceback, where the reason is a mistake in kbit.
    """

    model: str
    label: str
    why: str
    bug: str | None = None


@dataclass(frozen=True)
class Running:
    """A point under way: of which model, in which format, how much of it is done, and its mean loss so far."""

    model: str
    label: str
    fraction: float
    nll: float | None


@dataclass(frozen=True)
class Status:
    """How far a sweep is.

    Attributes:
        total: points asked for.
        reused: of them, known before.
        measured: of them, measured in this run.
        failed: of them, impossible to measure.
        running: under way.
        by_model: (name, points done, points asked for) of each model.
        last: what was measured last, the latest at the end.
        elapsed: seconds since the start.
        left: seconds left, or None while nothing tells.
    """

    total: int
    reused: int
    measured: int
    failed: int
    running: tuple[Running, ...]
    by_model: tuple[tuple[str, int, int], ...]
    last: tuple[Point, ...]
    elapsed: float
    left: float | None


@dataclass(frozen=True, eq=False)
class SweepResult:
    """What a sweep has found.

    Attributes:
        plan: what was asked for.
        points: all that were asked for and could be measured, in the plan's order.
        measured: how many of them this run measured.
        failures: the others.
        seconds: what it took.
    """

    plan: SweepPlan
    points: tuple[Point, ...]
    measured: int
    failures: tuple[Failure, ...]
    seconds: float


# Called whenever something happens, and now and then: the state, and what has just been measured or has failed.
OnStatus = Callable[[Status, "Point | Failure | None"], None]


def run_sweep(plan: SweepPlan, on_status: OnStatus = lambda _status, _news: None) -> SweepResult:
    """Measure what is missing. Rows are in the table as soon as they are measured; Ctrl-C and kill lose none of them.

    Raises:
        UsageError: another sweep is writing into the folder.
        KbitError: the folder cannot be written, or there are no processes to measure with.
    """
    started = time.perf_counter()
    out = plan.request.out
    with _locked(out):
        settings = settings_of(plan.request, plan.text, plan.subjects)
        check_settings(out, settings)
        write_text(out / "sweep.json", json.dumps(settings, indent=1) + "\n")
        table = read_table(out)
        reused = [p.known for p in plan.points if p.known is not None and table.get(p.key) != p.known]
        append_points(out / "points.jsonl", reused)
        run = _Run(plan, table | {point.key: point for point in reused}, on_status)
        run.measure()
        for path in out.glob("reference-*"):
            _remove(path)
    points = tuple(run.found[p.key] for p in plan.points if p.key in run.found)
    return SweepResult(plan, points, run.measured, tuple(run.failures.values()), time.perf_counter() - started)


def open_pool(plan: SweepPlan, on_window: Callable[[Event], None]) -> Pool:
    """The processes of a sweep.

    Args:
        on_window: told how far a point is, where it is measured in this process.

    Raises:
        UnsupportedError, KbitError: a cluster was asked for and cannot be had.
    """
    request = plan.request
    if request.cluster is not None:
        from kbit.scaling.sweep.cluster import RayPool

        return RayPool(request.cluster, request.jobs, request.threads, plan.jobs.memory)
    return InlinePool(on_window) if plan.jobs.count == 1 else ProcessPool(plan.jobs.count)


@dataclass(eq=False)
class _Run:
    """The state of a sweep while it runs: which points wait, which are under way, what has been found."""

    plan: SweepPlan
    known: dict[str, Point]
    on_status: OnStatus
    found: dict[str, Point] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    measured: int = 0
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.found = {p.key: self.known[p.key] for p in self.plan.points if p.key in self.known}
        self.rates = Rates.of(self.found.values())
        self.reused = len(self.found)
        self.by_key = {p.key: p for p in self.plan.points}
        self.store = PointStore() if self.plan.request.cache else None
        self.slots = self.plan.jobs.count
        self.under_way: dict[str, Event] = {}
        self.last: list[Point] = []
        # By model: points that wait for the original's logits, and whether these are there.
        self.waiting: dict[str, list[Planned]] = {}
        self.originals: dict[str, Planned] = {}
        for point in self.plan.points:
            content = point.subject.content
            if point.cell.format is None:
                self.originals[content] = point
            if point.key not in self.found and point.cell.format is not None:
                self.waiting.setdefault(content, []).append(point)
        self.ready: set[str] = set()
        self.to_start = [
            point for content, point in self.originals.items() if content in self.waiting or point.key not in self.found
        ]

    def measure(self) -> None:
        self._remove_stale_logits()
        if not self.to_start:
            self._say(None)
            return
        with open_pool(self.plan, self._handle) as pool:
            self.slots = pool.size
            self._say(None)
            while True:
                while len(self.under_way) < pool.size and (point := self._next()) is not None:
                    self.under_way[point.key] = Event(point.key, 0.0)
                    pool.submit(self._task(point))
                if not self.under_way:
                    return
                events = pool.wait(_TICK)
                for event in events:
                    self._handle(event)
                if not events:
                    self._say(None)

    def _next(self) -> Planned | None:
        """The next point that can be measured: of the first model that has one."""
        for subject in self.plan.subjects:
            content = subject.content
            if content in self.ready and self.waiting.get(content):
                return self.waiting[content].pop(0)
            original = self.originals[content]
            if original in self.to_start:
                self.to_start.remove(original)
                return original
        return None

    def _task(self, point: Planned) -> Task:
        plan, content = self.plan, point.subject.content
        needed = point.cell.format is not None or bool(self.waiting.get(content))
        return Task(
            key=point.key,
            subject=point.subject,
            cell=point.cell,
            arithmetic=plan.arithmetic,
            text_name=text_name(plan.text),
            text_sha256=plan.text.sha256,
            logits=self._logits(content) if needed else None,
            threads=plan.request.threads,
            keep_weights=plan.jobs.keep_weights,
        )

    def _handle(self, event: Event) -> None:
        if not event.ended:
            self.under_way[event.key] = event
            self._say(None)
            return
        del self.under_way[event.key]
        planned = self.by_key[event.key]
        content = planned.subject.content
        news: Point | Failure | None = None
        if event.point is not None:
            if event.key not in self.found:  # else an original that was run for its logits only
                news = event.point
                self._keep(event.point)
            if planned.cell.format is None:
                self.ready.add(content)
        else:
            news = Failure(planned.subject.name, planned.cell.label, event.error or "", event.bug)
            self.failures[event.key] = news
            if planned.cell.format is None:
                for other in self.waiting.pop(content, []):
                    why = f"the original could not be measured: {event.error}"
                    self.failures[other.key] = Failure(other.subject.name, other.cell.label, why)
        if not self.waiting.get(content) and not any(
            self.by_key[key].subject.content == content for key in self.under_way
        ):
            _remove_logits(self._logits(content))
        self._say(news)

    def _keep(self, point: Point) -> None:
        append_points(self.plan.request.out / "points.jsonl", [point])
        if self.store is not None:
            self.store.put(point)
        self.found[point.key] = point
        self.measured += 1
        self.rates.add(point)
        self.last = [*self.last[-4:], point]

    def _logits(self, content: str) -> Path:
        return self.plan.request.out.absolute() / f"reference-{self.originals[content].key[:24]}.logits"

    def _remove_stale_logits(self) -> None:
        """Room that a killed run of other settings has left taken."""
        wanted = {self._logits(content).stem for content in self.waiting}
        for path in self.plan.request.out.glob("reference-*"):
            if path.stem not in wanted:
                _remove(path)

    def _say(self, news: Point | Failure | None) -> None:
        done = self.found.keys() | self.failures.keys()
        by_model = []
        for subject in self.plan.subjects:
            keys = [point.key for point in self.plan.points if point.subject is subject]
            by_model.append((subject.name, sum(key in done for key in keys), len(keys)))
        running = [
            Running(self.by_key[key].subject.name, self.by_key[key].cell.label, event.fraction, event.nll)
            for key, event in self.under_way.items()
        ]
        status = Status(
            total=len(self.plan.points),
            reused=self.reused,
            measured=self.measured,
            failed=len(self.failures),
            running=tuple(running),
            by_model=tuple(by_model),
            last=tuple(self.last),
            elapsed=time.perf_counter() - self.started,
            left=self._left(),
        )
        self.on_status(status, news)

    def _left(self) -> float | None:
        """Seconds left: the points to come at their models' rates, shared among the processes."""
        total = 0.0
        waiting = [point for points in self.waiting.values() for point in points]
        for point, share in [
            *((point, 1.0) for point in (*waiting, *self.to_start)),
            *((self.by_key[key], 1.0 - event.fraction) for key, event in self.under_way.items()),
        ]:
            seconds = self.rates.of_point(point.subject, self.plan.subjects)
            if seconds is None:
                return None
            total += share * seconds
        return total / self.slots


def write_text(path: Path, text: str) -> None:
    """Write a file that is whole or not there.

    Raises:
        KbitError: it cannot be written.
    """
    try:
        write_durably(path, text.encode())
    except OSError as error:
        raise KbitError(f"{path}: cannot be written ({error.strerror or error}); choose another --out") from error


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """The output folder, made if need be, for this process alone."""
    from filelock import FileLock, Timeout

    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise UsageError(f"{out}: another sweep is writing there: wait for it, or use another --out") from None
    except OSError as error:
        raise KbitError(f"{out}: cannot be written ({error.strerror or error}); choose another --out") from error
    try:
        yield
    finally:
        lock.release()


def _remove_logits(path: Path) -> None:
    _remove(path.with_suffix(".done"))
    _remove(path.with_suffix(".npz"))
    _remove(path)


def _remove(path: Path) -> None:
    with suppress(OSError):  # still mapped by a process that is about to end, on Windows; the next run removes it
        path.unlink(missing_ok=True)
