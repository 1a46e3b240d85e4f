"""tools/head_accuracy.py, from models with each head to their tables."""

from __future__ import annotations

import sys
from pathlib import Path

import encoder_cases as cases
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import head_accuracy


@pytest.mark.parametrize(
    ("head", "predictions"),
    # Of texts of 3, 5 and 4 words, in [CLS] and [SEP]: every third word masked; every text; every token.
    [("ForMaskedLM", 1 + 2 + 2), ("ForSequenceClassification", 3), ("ForTokenClassification", 5 + 7 + 6)],
)
def test_a_table_of_a_model(head: str, predictions: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases.saved(cases.model_of("Bert", head), tmp_path / "model")
    (tmp_path / "texts").write_text("the cat sat\na dog ran far away\n\nwho sat on mat\n")
    flags = ["--texts", str(tmp_path / "texts"), "--threads", "1", "--bits", "int8-b16,nf2-b16"]
    assert head_accuracy.main([str(tmp_path / "model"), *flags]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"{predictions} predictions"
    rows = [line.split("|")[1:-1] for line in out[4:]]
    assert [row[0].strip() for row in rows] == ["fp32", "int8-b16", "nf2-b16"]
    assert 0.0 <= float(rows[1][3]) < float(rows[2][3])
    assert float(rows[2][1].split()[0]) <= float(rows[1][1].split()[0])
