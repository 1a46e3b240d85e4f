"""Sweeps through power cuts and deaths: no row is lost that was told, no part of one is taken for a row."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from fault_cases import Recorder, Tree, put, some
from scale_cases import figures, sweep, write_text

from kbit.host.errors import KbitError
from kbit.scaling.points import read_points

pytestmark = pytest.mark.usefixtures("one_thread")

FORMATS = {"bits": (4,), "dtypes": ("nf", "int")}


def run(model: Path, root: Path, patch: pytest.MonkeyPatch) -> Any:
    """The sweep of a folder that holds text, results and cache."""
    patch.setenv("KBIT_CACHE", str(root / "cache"))
    return sweep(model, root / "out", root / "tides.txt", cache=True, **FORMATS)


def rows_of(tree: Tree) -> dict[str, bytes]:
    """Files of the store by path."""
    of_store = {path for path in tree if path.startswith("cache/points/") and path.endswith(".json")}
    return {path: data for path in of_store if (data := tree[path]) is not None}


@pytest.fixture(scope="module")
def recorder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Recorder:
    """A sweep that nothing disturbs, watched."""
    root = tmp_path_factory.mktemp("watched")
    write_text(root)
    recorder = Recorder(root)
    with pytest.MonkeyPatch.context() as patch:
        recorder.run(lambda: run(tiny_model, root, patch))
    return recorder


@pytest.mark.parametrize("death", ["killed", "power_cuts"])
def test_the_same_command_ends_with_the_same_rows(
    recorder: Recorder, death: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = figures(read_points(recorder.root / "out" / "points.jsonl"))
    trees = getattr(recorder, death)()
    assert len(trees) > 20
    measured = set()
    for index, tree in enumerate(some(trees, 5, most_of_all=60)):
        root = tmp_path / str(index)
        put(tree, root)
        result = run(tiny_model, root, monkeypatch)
        assert figures(result.points) == right
        assert figures(read_points(root / "out" / "points.jsonl")) == right
        assert {path.name for path in (root / "out").iterdir()} == {".lock", "points.jsonl", "sweep.json"}
        measured.add(result.measured)
    assert measured >= {0, 3}


def test_rows_of_the_store_are_whole_after_a_power_cut(recorder: Recorder) -> None:
    whole = rows_of(recorder.killed()[-1])
    assert len(whole) == 3
    seen = set()
    for tree in recorder.power_cuts():
        rows = rows_of(tree)
        assert rows.items() <= whole.items()
        seen.add(len(rows))
    assert seen == {0, 1, 2, 3}


def test_rows_that_were_told_survive_a_power_cut(recorder: Recorder) -> None:
    """Once the sweep has ended, the table has all of them."""
    for tree in recorder.last_power_cuts():
        table = tree["out/points.jsonl"]
        assert table is not None
        assert table.count(b"\n") == 3


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_takes_no_more_is_named(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """From the first row on. With room again the same command ends well, and measures no row twice."""
    write_text(tmp_path)
    real = os.fsync

    def failing(descriptor: int) -> None:
        if any(tmp_path.glob("cache/points/??/*.json")):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(KbitError, match=os.strerror(code)):
            run(tiny_model, tmp_path, monkeypatch)
    kept = len(read_points(tmp_path / "out" / "points.jsonl"))
    result = run(tiny_model, tmp_path, monkeypatch)
    assert 0 < kept < 3
    assert result.measured == 3 - kept
