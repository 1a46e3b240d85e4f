"""What `kbit quantize` does where its first choice of method is more than the machine can do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from error_cases import run_command

from kbit.checkpoint.resolve import open_model
from kbit.quantizers.calibrated import Gptq, TwoSided
from kbit.quantizers.plan import BASE_BYTES


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, write_model: Any) -> Path:
    folder: Path = write_model(tmp_path_factory.mktemp("choice") / "model")
    return folder


def memory_for(model: Path, method: TwoSided | Gptq) -> int:
    with open_model(str(model)) as source:
        return BASE_BYTES + method.memory(source)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what is available, and keeps calibrations apart from other tests'."""

    def set_to(nbytes: int) -> None:
        monkeypatch.setattr("kbit.host.memory.available_memory", lambda: nbytes)

    return set_to


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KBIT_CALIBRATION", str(tmp_path / "calibration"))


def test_without_memory_for_gradients_inputs_serve(tmp_path: Path, model: Path, memory: Any) -> None:
    needed = memory_for(model, TwoSided())
    memory(needed - 1)
    code, out, said = run_command(["quantize", str(model), "--dry-run", "--json"])
    assert code == 0
    plan = json.loads(out)
    assert (plan["method"], plan["mixed"]) == ("gptq", False)
    assert f"needs about {needed / 1e6:.0f} MB of memory, and {(needed - 1) / 1e6:.0f} MB is available" in said
    assert "inputs only" in said
    memory(needed)
    code, out, said = run_command(["quantize", str(model), "--dry-run", "--json"])
    plan = json.loads(out)
    assert (code, plan["method"], plan["mixed"], said) == (0, "ldlq2", True, "")


@pytest.mark.parametrize("flags", [["--method", "ldlq2"], ["--bits", "3.5"], ["--size", "30KB"], ["--max-kl", "0.1"]])
def test_what_was_asked_for_is_not_replaced(model: Path, memory: Any, flags: list[str]) -> None:
    """The remedy works."""
    memory(memory_for(model, TwoSided()) - 1)
    code, _, error = run_command(["quantize", str(model), *flags, "--dry-run"])
    assert code == 2
    assert "is available; use --calibration-tokens 32768, or " in error
    assert ("--method gptq --inputs-only" in error) == ("--method" in flags)
    code, out, _ = run_command(["quantize", str(model), *flags, "--dry-run", "--json", "--calibration-tokens", "32768"])
    assert (code, json.loads(out)["method"]) == (0, "ldlq2")


def test_with_no_memory_for_inputs_either_nothing_is_promised(model: Path, memory: Any) -> None:
    memory(BASE_BYTES)
    code, _, error = run_command(["quantize", str(model), "--dry-run"])
    assert (code, error.rstrip().endswith("is available; use --method rtn")) == (2, True)


def test_what_is_calibrated_needs_no_memory_for_it(model: Path, memory: Any) -> None:
    words = ["quantize", str(model), "--calibration-tokens", "256", "--dry-run", "--json"]
    assert run_command(["calibrate", str(model), "--calibration-tokens", "256"])[0] == 0
    memory(BASE_BYTES)
    code, out, said = run_command(words)
    assert (code, json.loads(out)["method"], said) == (0, "ldlq2", "")
