"""Running a target for some time: guided by coverage (atheris), or by a seed alone."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from fuzzing.judge import Finding, bounded_memory, judge
from fuzzing.target import Target, corpus, load_target

OnFinding = Callable[[Finding], object]


class Counter:
    """Executions, in a file that outlives a crash."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT)
        self.count = int.from_bytes(os.pread(self._file, 8, 0), "little")

    def add(self) -> None:
        self.count += 1
        os.pwrite(self._file, self.count.to_bytes(8, "little"), 0)


def random_loop(
    target: Target, inputs: list[bytes], random: Random, on_finding: OnFinding, last: Callable[[], bool]
) -> int:
    """Every input as it is, then changes of them until `last` says that it is enough; how many there were.

    What `random` draws is all that the inputs depend on.
    """
    count = 0
    for data in inputs:
        count += 1
        finding = judge(target, data)
        if finding is not None:
            on_finding(finding)
    while not last():
        data = random.choice(inputs)
        for _ in range(1 + random.randrange(3)):
            data = target.mutate(data, random)
        count += 1
        finding = judge(target, data[: target.longest])
        if finding is not None:
            on_finding(finding)
    return count


def guided(name: str, seconds: float, seed: int, work: Path, on_finding: OnFinding) -> None:
    """libFuzzer over a target; ends the process.

    Args:
        name: the target.
        seconds: how long.
        seed: of libFuzzer.
        work: a folder: `corpus/` grows there, `count` has the executions, crashes lie beside them.
        on_finding: called with each, once a kind.
    """
    import atheris

    inputs = corpus(name)
    with tempfile.TemporaryDirectory(dir=shared_memory()) as scratch:
        with atheris.instrument_imports(include=["kbit"], exclude=["kbit._native", "kbit.host", "kbit.kernels"]):
            target = load_target(name, Path(scratch))
            for data in inputs:  # what is imported late is imported now
                judge(target, data)
        counter, seen = Counter(work / "count"), set[str]()

        def one(data: bytes) -> None:
            counter.add()
            finding = judge(target, data)
            if finding is not None and finding.kind not in seen:
                seen.add(finding.kind)
                on_finding(finding)

        def changed(data: bytes, most: int, number: int) -> bytes:
            random = Random(number)
            if random.random() < 0.3:
                return bytes(atheris.Mutate(data, most))
            return target.mutate(data, random)[:most]

        grown = work / "corpus"
        grown.mkdir(parents=True, exist_ok=True)
        for index, data in enumerate(inputs):
            (grown / f"seed{index:04d}").write_bytes(data)
        flags = [f"-max_total_time={max(1, round(seconds))}", f"-seed={seed}", f"-max_len={target.longest}"]
        flags += ["-timeout=60", "-rss_limit_mb=0", f"-artifact_prefix={work}/", "-len_control=0", "-verbosity=1"]
        atheris.Setup([sys.argv[0], *flags, str(grown)], one, custom_mutator=changed)
        with bounded_memory():
            atheris.Fuzz()


def until(seconds: float) -> Callable[[], bool]:
    """For `random_loop`: whether the time is over."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def executions(most: int) -> Callable[[], bool]:
    """For `random_loop`: whether so many changed inputs were run."""
    left = [most]

    def over() -> bool:
        left[0] -= 1
        return left[0] < 0

    return over


def shared_memory() -> Path | None:
    """Where files cost no disk, if there is such a place."""
    place = Path("/dev/shm")
    return place if place.is_dir() and os.access(place, os.W_OK) else None
