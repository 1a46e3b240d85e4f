"""Files of pairs, and their scores."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from kbit.evaluate.pairs import Pair, not_installed, read_pairs, score
from kbit.host.errors import UsageError


def test_files(tmp_path: Path) -> None:
    tabs, lines = tmp_path / "a.tsv", tmp_path / "a.jsonl"
    tabs.write_bytes(b"one\teins\r\n\ntwo\tzwei\tzwo\n")
    wanted = [Pair("one", ("eins",)), Pair("two", ("zwei", "zwo"))]
    assert read_pairs(tabs) == wanted
    assert read_pairs(tabs, 1) == wanted[:1]
    lines.write_text('{"source": "one", "reference": "eins"}\n{"source": "two", "references": ["zwei", "zwo"]}\n')
    assert read_pairs(lines) == wanted


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "one\n", "line 1 is not a source, a tab and a reference"),
        ("a.tsv", "one\teins\n \tx\n", "line 2 is not a source"),
        ("a.tsv", "\n", "has no pairs"),
        ("a.jsonl", "[]\n", 'line 1 is not {"source"'),
        ("a.jsonl", '{"source": "x", "reference": 1}\n', "line 1 is not"),
        ("a.jsonl", '{"source": "x", "references": []}\n', "line 1 is not"),
    ],
)
def test_what_is_no_pair(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        read_pairs(tmp_path / name)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_pairs(tmp_path / "none.tsv")
    (tmp_path / "a.tsv").write_bytes(b"a\t\xff")
    with pytest.raises(UsageError, match="is not UTF-8 at byte 2"):
        read_pairs(tmp_path / "a.tsv")


def test_scores_are_those_of_the_libraries() -> None:
    """With as many references as each text has."""
    sacrebleu = pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    texts = ["the cat sat on the mat", "a dog ran far away today"]
    references = [["the cat sat on a mat", "a cat was on the mat"], ["the dog ran far away"]]
    found = score(texts, references)
    assert found.bleu == pytest.approx(
        sacrebleu.corpus_bleu(texts, [[references[0][0], references[1][0]], [references[0][1], None]]).score
    )
    assert found.signatures["bleu"].startswith("nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    # Unigrams of the first: 5 of 6 in both directions; of the second: 4 of 6 and of 5.
    assert found.rouge["rouge1"] == pytest.approx(100 * (5 / 6 + 8 / 11) / 2)


def test_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == "sacrebleu" else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    assert not_installed() == ("sacrebleu is not installed, so there is no BLEU and chrF: pip install 'kbit[text]'",)
    found = score(["a"], [["a"]])
    assert found.bleu is None
    assert found.rouge["rougeL"] == pytest.approx(100.0)
