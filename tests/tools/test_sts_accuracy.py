"""tools/sts_accuracy.py, from a model to its table."""

from __future__ import annotations

import sys
from pathlib import Path

import encoder_cases as cases
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import sts_accuracy


def test_a_table_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases.saved(cases.model_of("Bert"), tmp_path / "model")
    words = ["the cat sat", "a dog ran", "who ?", "far away on the mat", "the dogs sat far away ."]
    rows = [f"a\tb\tc\t{i}\t{i % 4}.5\t{words[i % 5]}\t{words[i * 3 % 5]}" for i in range(12)]
    (tmp_path / "sts.csv").write_text("\n".join(rows) + "\n")
    flags = ["--data", str(tmp_path / "sts.csv"), "--threads", "1"]
    assert sts_accuracy.main([str(tmp_path / "model"), "--bits", "int8-b16,nf2-b16", *flags]) == 0
    table = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()]
    assert [row[0].strip() for row in table[2:]] == ["fp32", "int8-b16 rtn", "nf2-b16 rtn"]
    alike = [float(row[4]) for row in table[2:]]
    assert alike[0] == 1.0
    assert alike[0] > alike[1] > alike[2]
