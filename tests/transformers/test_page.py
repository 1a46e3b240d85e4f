"""docs/transformers.md: what it shows runs, on a small real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from page_cases import run_page


def test_every_block_runs(
    novels_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers", minversion="5")
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    names: Any = run_page("transformers.md", {"smollm2": novels_folder})
    assert "Once upon a time" in capsys.readouterr().out
    with torch.no_grad():
        one, other = (names[name](names["ids"]).logits for name in ("model", "same"))
    assert torch.equal(one, other)
    assert any(values.grad is not None for values in names["trained"].parameters())
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
