"""docs/python.md: what it shows runs, on a small real model."""

from __future__ import annotations

from pathlib import Path

import pytest
from adapter_cases import shapes_of, write_adapter
from page_cases import run_page
from serve_cases import with_template


def test_every_block_runs(
    novels_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_template(Path(novels_folder), tmp_path / "novels-chat")
    write_adapter(tmp_path / "poet-lora", folder, shapes_of(folder))
    monkeypatch.chdir(tmp_path)
    names = run_page("python.md", {"smollm2-135m-instruct": str(folder)})
    said = capsys.readouterr().out
    assert "--temperature -1: expected" in said
    assert names["rhymed"].text != names["plain"].text  # type: ignore[attr-defined]
    assert len(names["answers"]) == 3  # type: ignore[arg-type]
    assert (tmp_path / "out" / "config.json").is_file()
    assert names["first"].text in said  # type: ignore[attr-defined]  # (greedy, as the stream)
