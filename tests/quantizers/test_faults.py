"""Conversions through power cuts and deaths: what is there is whole, and the same command ends with the same bytes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conversion_cases import files_of, rerun
from error_cases import run_command
from fault_cases import Recorder, Tree, put, some

from kbit.checkpoint import writer


@pytest.fixture(scope="module")
def cuts(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> list[Tree]:
    """What power cuts leave of a conversion."""
    root = tmp_path_factory.mktemp("watched")
    recorder = Recorder(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "SYNC_SECONDS", -1.0)  # as after a minute's work on each tensor
        recorder.run(lambda: rerun(small_model, root / "out"))
    return recorder.power_cuts()


def test_power_cuts(tmp_path: Path, cuts: list[Tree], small_model: Path, undisturbed: dict[str, bytes]) -> None:
    """A folder of the name that was asked for is complete, whatever was not synced when the power failed."""
    assert len(cuts) > 50
    complete, continued = 0, set()
    for index, tree in enumerate(some(cuts, 60)):
        root = tmp_path / str(index)
        put(tree, root)
        if (root / "out").exists():
            complete += 1
            assert undisturbed.items() <= files_of(root / "out").items()
        continued.add(rerun(small_model, root / "out").resumed)
        assert files_of(root / "out") == undisturbed
        assert {path.name for path in root.iterdir()} <= {"out", "out.partial.lock"}
    assert complete
    assert len(continued) > 6


# All methods, and more moments of each, where KBIT_FAULTS is "all": that takes minutes.
METHODS: dict[str, list[str]] = {
    "ldlq2": ["--method", "ldlq2"],
    "rtn": ["--method", "rtn"],
    "hqq": ["--method", "hqq", "--format", "int4-b64-asym"],
    "awq": ["--method", "awq", "--format", "int4-b64-asym"],
    "gptq": ["--method", "gptq"],
    "trellis": ["--method", "trellis"],
    "mixed": ["--bits", "4"],
    "nested": ["--nested", "2..8"],
}
CHOSEN = METHODS if os.environ.get("KBIT_FAULTS") == "all" else ["ldlq2"]


@pytest.mark.slow
@pytest.mark.parametrize("method", CHOSEN)
def test_killed_while_calibrating_and_converting(
    tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Whatever the cache and the folder hold when a method's conversion dies, the same command ends with the same bytes."""
    flags = METHODS[method]
    if method not in ("rtn", "hqq"):
        flags = [*flags, "--calibration-tokens", "256", "--no-measure"]

    def convert(root: Path) -> dict[str, bytes]:
        monkeypatch.setenv("KBIT_CACHE", str(root / "cache"))
        monkeypatch.setenv("KBIT_CALIBRATION", str(root / "calibration"))
        code, _, error = run_command(["quantize", str(small_model), *flags, "-o", str(root / "out")])
        assert code == 0, error
        return files_of(root / "out")

    watched = tmp_path / "watched"
    watched.mkdir()
    recorder = Recorder(watched)
    found: list[dict[str, bytes]] = []
    recorder.run(lambda: found.append(convert(watched)))
    images = recorder.killed()
    assert len(images) > 20
    for index, tree in enumerate(some(images, 4, most_of_all=10)):
        root = tmp_path / str(index)
        put(tree, root)
        assert convert(root) == found[0]
