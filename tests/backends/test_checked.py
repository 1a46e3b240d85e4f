"""--device auto takes a GPU that was checked here with what is installed, and says why where it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from kbit.backends import checked, gpu, select
from kbit.host.errors import UnsupportedError
from kbit.host.notes import KbitNote

OF = {"gpu": "NVIDIA H100", "driver": "580.1", "torch": "2.11.0", "triton": "3.6.0", "kbit": "0.1.0", "kernels": "ab"}


@pytest.fixture(autouse=True)
def this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KBIT_CACHE", str(tmp_path))
    monkeypatch.setattr(checked, "machine", lambda: OF)
    checked.auto_device.cache_clear()


def taken(monkeypatch: pytest.MonkeyPatch, **options: object) -> str:
    """Where a command with --device auto would run."""
    monkeypatch.setattr(select, "_gpu", lambda device, *rest: device)
    found = select.select_backend("auto", **options)  # type: ignore[arg-type]
    return found if isinstance(found, str) else found.name


def test_a_gpu_that_passed_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    checked.remember(OF, {"passed": True})
    assert taken(monkeypatch) == "cuda"
    assert taken(monkeypatch, kv_bits=4) == "cuda"
    # What is for the CPU alone, or means another thing there, stays there.
    assert taken(monkeypatch, threads=1) == "native"
    assert taken(monkeypatch, compute="int8") == "native"
    assert taken(monkeypatch, kv_bits=32) == "native"
    assert taken(monkeypatch, backend="reference") == "reference"


@pytest.mark.parametrize("key", [*OF])
def test_another_gpu_driver_or_version_is_another_check(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checked.remember({**OF, key: "other"}, {"passed": True})
    with pytest.warns(KbitNote, match=r"the GPU \(NVIDIA H100\) has not passed kbit check-gpu with torch 2.11.0"):
        assert taken(monkeypatch) == "native"


@pytest.mark.parametrize("content", [b"", b"[]", b"{", json.dumps({"machine": OF, "passed": False}).encode()])
def test_a_check_that_failed_or_is_damaged_counts_as_none(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checked.remember(OF, {"passed": True})
    path.write_bytes(content)
    assert checked.passed(OF) is None
    with pytest.warns(KbitNote, match="this runs on the CPU"):
        assert taken(monkeypatch) == "native"


def test_without_a_gpu_nothing_is_said(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.setattr(checked, "machine", lambda: None)
    assert taken(monkeypatch) == "native"
    assert not recwarn.list


def test_the_machine_is_known_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.03  Tue Sep 2\nGCC version: 12\n")
    monkeypatch.setattr(gpu, "NVIDIA_VERSION", file)
    assert gpu.driver_version() == "580.159.03"
    monkeypatch.setattr(checked, "gpu_summary", lambda: "X")
    found = checked.machine()
    assert found is not None
    assert (found["gpu"], found["driver"], len(found["kernels"])) == ("X", "580.159.03", 64)
    (tmp_path / "nvidia0").touch()
    assert gpu.gpu_summary(tmp_path / "none", tmp_path / "none", tmp_path) == "NVIDIA GPU"


def test_check_gpu_remembers_and_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """With steps of the tests, which pass or not; and no GPU at all."""
    import torch

    from kbit.gpu_check.check import check_machine, refuse_without_gpu
    from kbit.gpu_check.place import DRY, Place
    from kbit.gpu_check.runner import Step

    steps = [Step("kernels", "1. Kernels", "gpu_check_steps", 60)]
    found = check_machine(OF, steps=steps, place=Place("cpu", DRY))
    assert found["passed"]
    record = checked.passed(OF)
    assert record is not None
    assert [row["case"] for row in record["steps"][0]["rows"]] == ["first", "last"]
    assert not check_machine(OF, steps=steps, place=Place("cpu", DRY, models=("raise",)))["passed"]
    assert checked.passed(OF) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedError, match="torch sees none"):
        refuse_without_gpu()
