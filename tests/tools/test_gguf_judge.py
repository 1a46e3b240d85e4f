"""tools/judges/gguf_families.py, but for llama.cpp's part: what it compares, and what it calls a difference."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from decoder_cases import saved_model
from gguf_family_cases import CASES, write
from module_cases import module_of


@pytest.fixture(scope="module")
def judge() -> Any:
    before = list(sys.path)
    yield module_of("tools/judges/gguf_families.py")
    sys.path[:] = before
    del sys.modules["gguf_families"]


def test_a_folder_and_its_file_say_the_same(judge: Any, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    saved_model("qwen3", tmp_path / "folder", **{"max_position_embeddings": 64, **CASES["qwen3"][2]})
    file = write("qwen3", tmp_path / "folder", tmp_path / "m.gguf")
    ids = list(range(4, 4 + max(judge.LENGTHS)))
    found = judge.kbit_log_probabilities(file, ids)
    assert found.shape == (len(judge.LENGTHS), 131)
    np.testing.assert_allclose(np.exp(found).sum(1), 1.0, rtol=1e-6)
    assert np.abs(found - judge.kbit_log_probabilities(tmp_path / "folder", ids)).max() <= judge.KBIT_LIMIT
    assert np.abs(found - judge.kbit_log_probabilities(file, ids[::-1])).max() > judge.LLAMA_LIMIT


def test_verdicts(judge: Any) -> None:
    differs, lost, same, known, none = (
        judge.Verdict("a", 0.0, 1.0),
        judge.Verdict("b", 1.0, 1e-5),
        judge.Verdict("c", 0.0, 1e-5),
        judge.Verdict("phi3-window", 0.0, 1.0),
        judge.Verdict("d", why="converter: no"),
    )
    assert [each.bad for each in (differs, lost, same, known, none)] == [True, False, False, False, False]
    assert differs.line(False).endswith("DIFFER")
    assert lost.line(False).endswith("not in the file")
    assert known.line(False).endswith("windows off")
    assert same.line(True).split() == ["c", "0.0e+00", "1.0e-05", "-"]
    assert none.line(True).split() == ["d", "-", "-", "-", "converter:", "no"]
    assert none.line(False).split() == ["d", "-", "-", "-"]
