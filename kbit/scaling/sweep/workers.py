"""Who measures: this process, several beside it, or (sweep.cluster) those of a Ray cluster.

A pool takes tasks and gives back events. It never raises because of a task: what went wrong is an event too, and the
sweep goes on with the other points.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from typing import TYPE_CHECKING

from kbit.host.errors import KbitError
from kbit.scaling.points import Point
from kbit.scaling.sweep.measure import Task, forget_model, measure

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

# How torch's allocators say that memory is exhausted, in a plain RuntimeError.
_OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "bad_alloc")


@dataclass(frozen=True)
class Event:
    """What happened to a task.

    Attributes:
        key: of the task's point.
        fraction: of its windows that are done; 1 once it has ended.
        nll: mean loss so far, or None.
        point: what was measured, once it has ended well.
        error: why it failed.
        bug: the traceback, where the error is none of kbit's own.
    """

    key: str
    fraction: float
    nll: float | None = None
    point: Point | None = None
    error: str | None = None
    bug: str | None = None

    @property
    def ended(self) -> bool:
        return self.point is not None or self.error is not None


OnEvent = Callable[[Event], None]


class Pool(ABC):
    """Processes that measure points."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Tasks it works on at a time."""

    @abstractmethod
    def submit(self, task: Task) -> None:
        """Hand over a task. At most `size` may be under way."""

    @abstractmethod
    def wait(self, seconds: float) -> list[Event]:
        """What has happened; waits for something to happen, but no longer than so many seconds."""

    @abstractmethod
    def close(self) -> None:
        """Stop at once, whatever is under way."""

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def run_task(task: Task, on_event: OnEvent | None = None) -> Event:
    """Measure a point; an error becomes an event.

    Args:
        on_event: given an Event after every window.
    """

    def on_window(done: int, total: int, nll: float) -> None:
        if on_event is not None:
            on_event(Event(task.key, done / total, nll))

    try:
        return Event(task.key, 1.0, point=measure(task, on_window))
    except KbitError as error:
        return Event(task.key, 1.0, error=str(error))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in _OUT_OF_MEMORY):
            return _bug(task, error)
        forget_model()
        return Event(task.key, 1.0, error="out of memory: use fewer --jobs")
    except Exception as error:
        return _bug(task, error)


def _bug(task: Task, error: Exception) -> Event:
    return Event(task.key, 1.0, error=f"{type(error).__name__}: {error}", bug=traceback.format_exc())


class InlinePool(Pool):
    """Measures in this process, a task at a time.

    Args:
        on_window: told after every window how far the task is.
    """

    def __init__(self, on_window: OnEvent | None = None) -> None:
        self._on_window = on_window
        self._task: Task | None = None

    @property
    def size(self) -> int:
        return 1

    def submit(self, task: Task) -> None:
        assert self._task is None, "one task at a time"
        self._task = task

    def wait(self, seconds: float) -> list[Event]:
        if self._task is None:
            return []
        task, self._task = self._task, None
        return [run_task(task, self._on_window)]

    def close(self) -> None:
        forget_model()


class _Worker:
    """A process and the pipe to it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # a forked torch may hang in its thread pools
        self.pipe: Connection
        self.pipe, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=_serve, args=(theirs,), daemon=True)
        with _interrupts_held():
            self.process.start()
        theirs.close()  # so that its end shows here as the end of the pipe
        self.task: Task | None = None
        self.content: str | None = None  # digest of the model it has loaded

    def start(self, task: Task) -> None:
        self.task, self.content = task, task.subject.content
        self.pipe.send(task)

    def receive(self) -> tuple[Event, bool]:
        """An event, and whether the process is still alive."""
        assert self.task is not None
        try:
            event: Event = self.pipe.recv()
            return event, True
        except (EOFError, OSError):
            self.process.join(5)
            code = self.process.exitcode
            what = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            why = f"its process ended unexpectedly ({what}): perhaps memory ran out; use fewer --jobs"
            return Event(self.task.key, 1.0, error=why), False

    def stop(self) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process.close()


class ProcessPool(Pool):
    """Processes side by side on this machine, each with a model of its own.

    They are started when first needed, and anew where one ends unexpectedly.

    Args:
        jobs: processes.
    """

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._workers: list[_Worker] = []
        self._events: deque[Event] = deque()

    @property
    def size(self) -> int:
        return self._jobs

    def submit(self, task: Task) -> None:
        idle = [worker for worker in self._workers if worker.task is None]
        same = [worker for worker in idle if worker.content == task.subject.content]
        if same:
            worker = same[0]
        elif idle and (len(self._workers) == self._jobs or idle[0].content is None):
            worker = idle[0]
        else:
            assert len(self._workers) < self._jobs, "more tasks than processes"
            worker = _Worker()
            self._workers.append(worker)
        try:
            worker.start(task)
        except OSError:  # it ended while idle
            self._remove(worker)
            self._events.append(Event(task.key, 1.0, error="its process ended unexpectedly: run the sweep again"))

    def wait(self, seconds: float) -> list[Event]:
        busy = {worker.pipe: worker for worker in self._workers if worker.task is not None}
        found = list(self._events)
        self._events.clear()
        for pipe in connection.wait(list(busy), 0 if found else seconds):
            worker = busy[pipe]  # type: ignore[index]
            event, alive = worker.receive()
            found.append(event)
            if event.ended:
                worker.task = None
            if not alive:
                self._remove(worker)
        return found

    def close(self) -> None:
        while self._workers:
            self._workers.pop().stop()

    def _remove(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.stop()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """A process started meanwhile never sees Ctrl-C, which a terminal sends to all: the first process decides.

    Not even before its first line of Python runs. Here an interrupt is only put off.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection) -> None:
    """A worker process: tasks in, events out, until the other end of the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for systems where it could not be held
    try:
        while True:
            task: Task = pipe.recv()
            pipe.send(run_task(task, pipe.send))
    except (EOFError, OSError):  # the sweep has gone
        sys.exit()
