"""Running steps one after the other, each in a process of its own, and keeping what they found as they find it.

A step is a module with `items(place)`, names of what there is to do, and `run(place, item)`, the rows of one. It may
crash its process, hang, or lose the GPU's context: what it was at is written down, and the rest of it goes on in a
fresh process. The parent process touches no GPU. Results are written after every step, complete or not at all.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from multiprocessing.connection import Connection, wait
from time import monotonic
from typing import Any

from kbit.gpu_check.place import BrokenDeviceError, Place, Row
from kbit.host.errors import KbitError, one_line

MOST_RESTARTS = 8
PASSED, FAILED, CUT, NOT_RUN = "passed", "failed", "cut short", "not run"


@dataclass(frozen=True)
class Step:
    """What is run.

    Attributes:
        name: of it in results, and for later steps.
        title: for people.
        module: with `items` and `run`.
        seconds: it may take.
        item_seconds: one item may take, the start of its process included.
        shards: processes that share its items; more than one only where nothing is timed.
        compiles: it compiles and does not run: its process must not interpret.
        essential: where it fails, nothing after it runs.
    """

    name: str
    title: str
    module: str
    seconds: float
    item_seconds: float = 60.0
    shards: int = 1
    compiles: bool = False
    essential: bool = False


@dataclass
class Result:
    """What came of a step.

    Attributes:
        step: which.
        rows: what it found; a row with "error" failed.
        planned: items there were.
        outcome: PASSED, FAILED (a row failed), CUT (time was up) or NOT_RUN.
        seconds: it took.
    """

    step: Step
    rows: list[Row] = field(default_factory=list)
    planned: int = 0
    outcome: str = NOT_RUN
    seconds: float = 0.0

    @property
    def failures(self) -> list[Row]:
        return [row for row in self.rows if "error" in row]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.step.name,
            "title": self.step.title,
            "outcome": self.outcome,
            "seconds": round(self.seconds, 2),
            "items": self.planned,
            "rows": self.rows,
        }


def run_steps(
    steps: Sequence[Step],
    place: Place,
    *,
    seconds: float,
    prepare: str = "",
    written: Callable[[list[Result]], None] = lambda results: None,
    said: Callable[[str], None] = lambda line: None,
) -> list[Result]:
    """Runs steps in order within a time.

    Args:
        steps: what to run.
        place: where; each step is told the rows of those before it.
        seconds: for all of it.
        prepare: "module:function", called first in every process that does not compile; "" for nothing.
        written: called with all results after every step: the place to save.
        said: called with a line for people.
    """
    end, results = monotonic() + seconds, [Result(step) for step in steps]
    for result in results:
        left = end - monotonic()
        lost = next((done for done in results if done.step.essential and done.outcome == FAILED), None)
        if lost is not None:
            said(f"{result.step.title}: not run, for want of {lost.step.title}: {lost.failures[-1]['error']}")
        elif left <= 1:
            said(f"{result.step.title}: not run, the time was up")
        else:
            earlier = {done.step.name: done.rows for done in results}
            _Run(result, replace(place, earlier=earlier), prepare, min(left, result.step.seconds)).run()
            bad = len(result.failures)
            said(
                f"{result.step.title}: {result.outcome}, {len(result.rows)} results"
                f"{f', {bad} failed' if bad else ''}, {result.seconds:.0f} s"
            )
        written(results)
    return results


class _Worker:
    """A process with every n-th item of a step, from some item on."""

    def __init__(self, run: _Run, shard: int, skip: int) -> None:
        step = run.result.step
        self.shard, self.done, self.current, self.began = shard, skip, "", monotonic()
        context: Any = multiprocessing.get_context("spawn" if step.compiles else _start_method())
        self.receiver, sender = context.Pipe(duplex=False)
        arguments = (step.module, run.place, run.prepare, shard, step.shards, skip, sender, step.compiles)
        self.process = context.Process(target=_work, args=arguments, daemon=True)
        with _without_interpreter(step.compiles):
            self.process.start()
        sender.close()

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.receiver.close()


class _Run:
    """One step's processes."""

    def __init__(self, result: Result, place: Place, prepare: str, seconds: float) -> None:
        self.result, self.place, self.prepare = result, place, prepare
        self.began, self.limit = monotonic(), seconds
        self.restarts = 0

    def run(self) -> None:
        result = self.result
        workers = [_Worker(self, shard, 0) for shard in range(result.step.shards)]
        cut = False
        try:
            while workers:
                if monotonic() - self.began > self.limit:
                    cut = True
                    at = ", ".join(worker.current for worker in workers if worker.current)
                    result.rows.append({"case": at, "cut": f"the step's {self.limit:.0f} s were up"})
                    break
                ready = set(wait([worker.receiver for worker in workers], timeout=0.2))
                workers = [next_one for worker in workers for next_one in self._follow(worker, ready)]
        finally:
            for worker in workers:
                worker.end()
        result.seconds = monotonic() - self.began
        result.outcome = FAILED if result.failures else CUT if cut else PASSED

    def _follow(self, worker: _Worker, ready: Iterable[Any]) -> list[_Worker]:
        """The worker, or the one that takes its place, or none once its items are done."""
        if worker.receiver in ready:
            try:
                what, value = worker.receiver.recv()
            except (EOFError, OSError):
                worker.process.join(timeout=10)
                return self._instead(worker, _died(worker.process.exitcode))
            if what == "items":
                self.result.planned = value
            elif what == "begin":
                worker.current, worker.began = value, monotonic()
            elif what == "rows":
                self.result.rows += value
                worker.done, worker.current, worker.began = worker.done + 1, "", monotonic()
            else:  # "done"
                worker.end()
                return []
            return [worker]
        if monotonic() - worker.began > self.result.step.item_seconds:
            return self._instead(worker, f"took more than {self.result.step.item_seconds:.0f} s and was ended")
        return [worker]

    def _instead(self, worker: _Worker, why: str) -> list[_Worker]:
        self.result.rows.append({"case": worker.current or "starting", "error": why})
        worker.end()
        self.restarts += 1
        if not worker.current or self.restarts > MOST_RESTARTS:
            return []
        return [_Worker(self, worker.shard, worker.done + 1)]


def _work(
    module: str, place: Place, prepare: str, shard: int, shards: int, skip: int, sender: Connection, compiles: bool
) -> None:
    """In the step's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    if prepare and not compiles:
        name, _, function = prepare.partition(":")
        getattr(import_module(name), function)()
    try:
        step = import_module(module)
        names = list(step.items(place))
    except Exception as error:
        sender.send(("rows", [{"case": "starting", "error": _words(error)}]))
        sender.send(("done", None))
        return
    sender.send(("items", len(names)))
    for name in names[shard::shards][skip:]:
        sender.send(("begin", name))
        try:
            rows = step.run(place, name)
        except BrokenDeviceError as error:
            sys.stderr.write(f"{name}: the GPU's context is lost: {error}\n")
            os._exit(3)
        except Exception as error:  # what a step did not expect is its own failure, not the day's
            rows = [{"case": name, "error": _words(error)}]
        sender.send(("rows", rows))
    sender.send(("done", None))
    sender.close()


def _words(error: Exception) -> str:
    known = isinstance(error, KbitError)
    return one_line(error) if known else f"{type(error).__name__}: {one_line(error)}"


def _died(code: int | None) -> str:
    if code == 3:
        return "the GPU's context was lost"
    if code is not None and code < 0:
        return f"its process was ended by signal {-code}"
    return f"its process ended with code {code}"


def _start_method() -> str:
    """A server that has imported torch once forks a process for every step; elsewhere each imports it anew."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    multiprocessing.set_forkserver_preload(["torch", "triton"])
    return "forkserver"


class _without_interpreter:
    """Processes started within the block do not interpret."""

    def __init__(self, wanted: bool) -> None:
        self._wanted, self._value = wanted, os.environ.get("TRITON_INTERPRET")

    def __enter__(self) -> None:
        if self._wanted:
            os.environ.pop("TRITON_INTERPRET", None)

    def __exit__(self, *error: object) -> None:
        if self._wanted and self._value is not None:
            os.environ["TRITON_INTERPRET"] = self._value
