"""The file of tuned configurations through deaths, power cuts, full disks, and two processes at once."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from fault_cases import Recorder, put, some
from tune_cases import DECODE, PREFILL, SQUARE, TARGET
from tune_cases import own_cache as own_cache

from kbit.tuning.run import tune_jobs
from kbit.tuning.stored import load
from kbit.tuning.timing import Job, Trial

PROBLEMS = {"gemv": SQUARE, "decode": DECODE, "prefill": PREFILL}


def job(kernel: str, meanwhile: Callable[[], object] = lambda: None) -> Job:
    """A job whose launches do nothing."""

    def prepare() -> list[Trial]:
        meanwhile()
        return [Trial(lambda config: None, lambda out: False)]  # type: ignore[arg-type, return-value]

    return Job(kernel, PROBLEMS[kernel], kernel, prepare)


def clock(launch: Callable[[], object]) -> float:
    launch()
    return 1e-5


def tune() -> Any:
    return tune_jobs([job(kernel) for kernel in PROBLEMS], TARGET, clock)


@pytest.mark.parametrize("death", ["killed", "power_cuts"])
def test_what_was_tuned_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], death: str
) -> None:
    """The file is whole or not there, and the same command ends with all of it."""
    watched = tmp_path / "watched"
    watched.mkdir()
    monkeypatch.setenv("KBIT_CACHE", str(watched))
    recorder = Recorder(watched)
    recorder.run(tune)
    right = load(TARGET)
    assert {kernel for kernel, _ in right} == set(PROBLEMS)
    found = set()
    for index, tree in enumerate(some(getattr(recorder, death)(), 60, most_of_all=10**6)):
        put(tree, tmp_path / str(index))
        monkeypatch.setenv("KBIT_CACHE", str(tmp_path / str(index)))
        before = load(TARGET)
        assert before.items() <= right.items()
        found.add(len(before))
        again = tune()
        assert (again.known, len(again.outcomes)) == (len(before), 3 - len(before))
        assert load(TARGET) == right
    assert found == {0, 1, 2, 3}
    assert "is ignored" not in capsys.readouterr().err


def test_two_processes_at_once_lose_nothing_of_each_other(own_cache: Path) -> None:
    other = lambda: tune_jobs([job("decode")], TARGET, clock)  # noqa: E731
    tune_jobs([job("gemv", meanwhile=other)], TARGET, clock)
    assert {kernel for kernel, _ in load(TARGET)} == {"gemv", "decode"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_no_more(own_cache: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Ends it with the system's word; what was there stays, and nothing half-written beside it."""
    tune_jobs([job("gemv")], TARGET, clock)

    def failing(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(OSError, match=os.strerror(code)):
            tune()
    assert {kernel for kernel, _ in load(TARGET)} == {"gemv"}
    assert [path.suffix for path in sorted(TARGET.path.parent.iterdir())] == [".json", ".lock"]
