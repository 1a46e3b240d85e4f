"""kbit calibrate: what it leaves behind, that kbit quantize finds it, and how it is removed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from error_cases import run_command


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where calibrations go."""
    monkeypatch.setenv("KBIT_CALIBRATION", str(tmp_path / "calibration"))
    return tmp_path / "calibration"


def test_a_calibration_is_found_again_and_removed(tmp_path: Path, folder: Path, tiny_model: Path) -> None:
    words = ["calibrate", str(tiny_model), "--calibration-tokens", "256", "--json"]
    code, out, _ = run_command(words)
    made = json.loads(out)
    assert code == 0
    assert made["calibration"]["tokens"] == 256
    kept = {path.name: path.stat().st_mtime_ns for path in Path(made["path"]).iterdir()}
    assert {"calibration.json", "layer-00000.safetensors", "layer-00001.safetensors", "outside.safetensors"} <= set(
        kept
    )
    assert run_command(words)[0] == 0
    quantize = ["quantize", str(tiny_model), "--calibration-tokens", "256", "--format", "nf4-b32", "--no-measure"]
    assert run_command([*quantize, "-o", str(tmp_path / "out")])[0] == 0
    assert {path.name: path.stat().st_mtime_ns for path in Path(made["path"]).iterdir()} == kept
    assert len(list(folder.iterdir())) == 1
    code, out, _ = run_command(["calibrate", str(tiny_model), "--forget", "--json"])
    assert (code, json.loads(out)["freed_bytes"]) == (0, made["bytes"])
    assert not list(folder.iterdir())


def test_a_killed_calibration_continues(folder: Path, tiny_model: Path) -> None:
    words = ["calibrate", str(tiny_model), "--calibration-tokens", "256", "--json"]
    whole = Path(json.loads(run_command(words)[1])["path"])
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    for name in ("layer-00000.safetensors", "outside.safetensors"):
        (whole / name).unlink()
    assert run_command(words)[0] == 0
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


def test_what_is_done_is_measured_and_said(tmp_path: Path, tiny_model: Path) -> None:
    words = ["quantize", str(tiny_model), "--calibration-tokens", "256", "--bits", "6", "-o", str(tmp_path / "out")]
    code, out, _ = run_command(words)
    assert code == 0
    for said in ("method ldlq2", "KL divergence from the original", "half a bit more would leave"):
        assert said in out
