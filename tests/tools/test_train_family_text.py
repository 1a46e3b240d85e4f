"""tools/train_family.py: shapes, texts, tokens and the order of windows."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

# Before the rest of ours: it puts tools/ where Python looks.
from train_family_cases import texts as texts
from train_family_cases import tokens as tokens

# isort: split
import train.corpus
from train.corpus import Corpus, Tokens, WindowOrder, open_corpus, tokenize
from train.model import Llama
from train.run import heldout_windows
from train.shapes import PRESETS, parse_size

from kbit.host.errors import KbitError, UsageError

# Shapes


@pytest.mark.parametrize("name", ["0.25m", "0.3m", "0.7m", "1.3m", "2m", "5m", "11m"])
def test_parameters_are_counted_as_they_are(name: str) -> None:
    shape = PRESETS[name]
    model = Llama(shape, 2048, 16, seed=0)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total - 2048 * shape.hidden == shape.non_embedding_parameters
    assert shape.non_embedding_parameters == pytest.approx(float(name.removesuffix("m")) * 1e6, rel=0.1)


@pytest.mark.parametrize("name", ["0.7m", "2m", "5m"])
def test_presets_are_the_novels_family(data_dir: Path, name: str) -> None:
    """A model trained with the defaults has the configuration of the one that is there."""
    folder = data_dir / "models" / f"novels-{name}"
    assert PRESETS[name].config(2048, 256, 0) == json.loads((folder / "config.json").read_text())
    recorded = json.loads((folder / "training.json").read_text())
    assert PRESETS[name].non_embedding_parameters == recorded["non_embedding_parameters"]


def test_sizes_by_numbers() -> None:
    shape = parse_size("96x160x3")
    assert (shape.hidden, shape.intermediate, shape.layers, shape.head_dim, shape.heads) == (96, 160, 3, 32, 3)
    assert parse_size("128x256x4").head_dim == 64


@pytest.mark.parametrize("text", ["7b", "", "100x256x4", "128x250x4", "128x256x0", "0x256x4", "128x256", "-1x2x3"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="size"):
        parse_size(text)


# Text


def test_what_is_held_out_is_not_trained_on(texts: Path, tmp_path: Path) -> None:
    """Neither a document of the same name nor one of the same text."""
    (tmp_path / "text1.txt").write_text("another edition of text1\n")
    (tmp_path / "renamed.txt").write_bytes(b"\xef\xbb\xbf" + (texts / "text3.txt").read_bytes().replace(b"\n", b"\r\n"))
    corpus = open_corpus(texts, [tmp_path], 0)
    assert [name for name, _ in corpus.training()] == ["text0", "text2", "text4"]
    assert dict(corpus.heldout)["renamed"] == (texts / "text3.txt").read_text()


def test_documents_are_held_out_whole(texts: Path) -> None:
    corpus = open_corpus(texts, [], 0.3)
    held, kept = dict(corpus.heldout), dict(corpus.training())
    assert len(held) == 2
    assert held.keys() | kept.keys() == {f"text{number}" for number in range(5)}
    assert not held.keys() & kept.keys()
    assert open_corpus(texts, [], 0.3) == corpus


def test_the_end_of_a_single_document_is_held_out(texts: Path) -> None:
    path = texts / "text0.txt"
    corpus = open_corpus(path, [], 0.1)
    ((_, held),), ((_, kept),) = corpus.heldout, corpus.training()
    assert kept + held == path.read_text()
    assert held.startswith("The ")  # at a line's start
    assert len(held) == pytest.approx(0.1 * len(kept + held), abs=100)


@pytest.mark.parametrize("kind", ["gz", "xz", "bz2"])
def test_an_archive_is_a_folder(texts: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"texts.tar.{kind}"
    with tarfile.open(path, f"w:{kind}") as archive:  # type: ignore[call-overload]
        archive.add(texts, "folder")
    assert dict(open_corpus(path, [texts / "text0.txt"], 0).training()) == dict(
        open_corpus(texts, [texts / "text0.txt"], 0).training()
    )
    assert open_corpus(path, [], 0.1).name == "texts"
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(KbitError, match=f"texts.tar.{kind}: cannot be read"):
        open_corpus(path, [], 0.1)


def test_texts_that_cannot_be_used(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        open_corpus(tmp_path / "missing", [], 0.1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "blank.txt").write_text(" \n")
    with pytest.raises(UsageError, match="no .txt file with text"):
        open_corpus(tmp_path / "empty", [], 0.1)
    with pytest.raises(UsageError, match="nothing is left"):
        open_corpus(texts, [texts], 0)
    with pytest.raises(UsageError, match="--heldout-fraction 1.5"):
        open_corpus(texts, [], 1.5)
    (tmp_path / "book.pdf").write_text("no")
    with pytest.raises(UsageError, match=r"book\.pdf: give a folder"):
        open_corpus(tmp_path / "book.pdf", [], 0.1)
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(KbitError, match=r"latin\.txt is not UTF-8 \(.* at byte 3\)"):
        open_corpus(tmp_path / "latin.txt", [], 0.1)


def test_tokens_are_the_text(tokens: Tokens, texts: Path, tmp_path: Path) -> None:
    """Decoded, the stream is the training documents with the separator after each; and it is found again."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokens.tokenizer_json.decode())
    corpus = open_corpus(texts, [], 0.1)
    parts = tokenizer.decode(tokens.training.tolist(), skip_special_tokens=False).split(tokens.separator)
    assert parts == [*(text for _, text in corpus.training()), ""]
    assert tokens.training.dtype == np.uint16
    heard: list[str] = []
    first = tokenize(corpus, tokens.tokenizer_json, tmp_path, heard.append)
    again = tokenize(corpus, tokens.tokenizer_json, tmp_path, heard.append)
    assert len(heard) == 1
    assert first.digest == again.digest == tokens.digest
    moved = Corpus(corpus.path, corpus.heldout[:0], corpus.excluded)
    assert tokenize(moved, tokens.tokenizer_json, tmp_path, heard.append).digest != tokens.digest


def test_long_documents_go_through_in_pieces(texts: Path, tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokens.tokenizer_json.decode())
    text = (texts / "text0.txt").read_text() + "x" * 5000
    monkeypatch.setattr("train.corpus._PIECE", 1000)
    pieces = train.corpus._encode(tokenizer, text)
    assert tokenizer.decode(pieces) == text
    assert len(pieces) < 1.02 * len(tokenizer.encode(text).ids)


def test_every_window_once_in_every_pass() -> None:
    stream, context = np.arange(1000, dtype=np.uint16), 64
    order = WindowOrder(stream, context, seed=3)
    seen = order.windows(0, 2 * order.per_pass)
    assert order.per_pass == 14
    assert seen.shape == (28, context + 1)
    np.testing.assert_array_equal(seen - seen[:, :1], np.broadcast_to(np.arange(context + 1), seen.shape))
    starts = [np.sort(seen[:14, 0]), np.sort(seen[14:, 0])]
    for start in starts:
        assert set(np.diff(start)) == {context}
    assert starts[0][0] != starts[1][0]  # cut elsewhere
    for position in (0, 5, 13, 14, 27):  # wherever it goes on
        np.testing.assert_array_equal(WindowOrder(stream, context, seed=3).windows(position, 1)[0], seen[position])
    assert (WindowOrder(stream, context, seed=4).windows(0, 14) != seen[:14]).any()
    assert WindowOrder(stream[:128], context, seed=0).windows(0, 900).max() == 127  # up to the last token, not beyond
    with pytest.raises(UsageError, match="100 tokens of text are too few"):
        WindowOrder(stream[:100], context, seed=0)


def test_heldout_windows_do_not_overlap() -> None:
    texts = (np.arange(100), np.arange(5), np.arange(200, 232))
    windows = heldout_windows(texts, 16, None)
    assert windows.shape == (6 + 2, 16)
    assert windows[:, 0].tolist() == [0, 16, 32, 48, 64, 80, 200, 216]
    assert heldout_windows(texts, 16, 3)[:, 0].tolist() == [0, 64, 216]
    with pytest.raises(UsageError, match="shorter than a window of 300"):
        heldout_windows(texts, 300, None)
