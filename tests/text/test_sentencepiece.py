"""SentencePiece models segment text as the best of all segmentations; Marian's and M2M-100's ids are vocab.json's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from piece_cases import SPACE, model_file, pieces_of, save_m2m, save_marian, save_t5

from kbit.host.errors import CheckpointError, UnsupportedError
from kbit.text.piece_tokenizer import PieceTokenizer, has_pieces
from kbit.text.sentencepiece import SentencePieceModel, joined, t5_tokenizer


def files_of(folder: Path) -> Mapping[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def segmentations(text: str, known: Mapping[str, float]) -> Iterator[list[str]]:
    if not text:
        yield []
    for end in range(1, len(text) + 1):
        if text[:end] in known:
            for rest in segmentations(text[end:], known):
                yield [text[:end], *rest]


def test_the_unknown_piece_is_no_text() -> None:
    """Written out, its name is as unknown as any other word."""
    library = SentencePieceModel.parse(model_file(pieces_of()), "m.spm").tokenizer()
    assert library.encode("the<unk>the").tokens == [f"{SPACE}the", "<unk>", "the"]  # the text, not the piece
    assert library.encode("<unk>").ids == library.encode("qqq").ids


@pytest.mark.parametrize("text", ["the cat sat on the mat", "  a   cat at a mat ", "cats", "thecat", "at"])
def test_unigram_is_the_best_of_all_segmentations(text: str) -> None:
    pieces = pieces_of()
    known = dict(pieces[1:])
    whole = SPACE + SPACE.join(text.split())
    best = max(segmentations(whole, known), key=lambda parts: sum(known[part] for part in parts))
    found = SentencePieceModel.parse(model_file(pieces), "m.spm").tokenizer().encode(text).tokens
    assert found == best
    assert joined(found) == " ".join(text.split())


def test_pairs_are_joined_by_score() -> None:
    """BPE: "ab" is worth more than "bc", so "abc" is "ab" and "c"; of "bcd" that goes the other way."""
    pieces = [("<unk>", 0.0), (SPACE, -9.0), *((x, -8.0) for x in "abcd"), ("ab", -1.0), ("bc", -2.0), ("cd", -3.0)]
    library = SentencePieceModel.parse(model_file(pieces, kind=2, normalizer={3: 0}), "m.model").tokenizer()
    assert library.encode("abc").tokens == ["ab", "c"]
    assert library.encode("bcd").tokens == ["bc", "d"]
    assert library.encode("abcd").tokens == ["ab", "cd"]


def test_what_is_no_model() -> None:
    for data in (b"", b"\xff" * 40, model_file(pieces_of())[:9]):
        with pytest.raises(CheckpointError, match="m.spm is no SentencePiece model; download it again"):
            SentencePieceModel.parse(data, "m.spm")
    for change in ({"kind": 3}, {"normalizer": {4: 0}}):
        with pytest.raises(UnsupportedError, match="m.spm segments text in a way that kbit does not"):
            SentencePieceModel.parse(model_file(pieces_of(), **change), "m.spm")  # type: ignore[arg-type]


def test_marian(tmp_path: Path) -> None:
    vocabulary = save_marian(tmp_path, codes=("deu", "fra"))
    files = files_of(tmp_path)
    assert has_pieces(files)
    tokenizer = PieceTokenizer(files, "m")
    wanted = [vocabulary[f"{SPACE}the"], vocabulary[f"{SPACE}cat"]]
    end = vocabulary["</s>"]
    assert tokenizer.encode("the cat").ids == [*wanted, end]
    assert tokenizer.encode("the cat", add_special_tokens=False).ids == wanted
    assert tokenizer.encode(">>fra<< the cat").ids == [vocabulary[">>fra<<"], *wanted, end]
    assert tokenizer.encode(">>xyz<< the cat").ids == [vocabulary["<unk>"], *wanted, end]
    assert tokenizer.encode("the zq cat").ids.count(vocabulary["<unk>"]) == 1
    assert tokenizer.decode([vocabulary["<pad>"], *wanted, end]) == "the cat"
    assert tokenizer.decode([*wanted, end], skip_special_tokens=False) == "the cat </s>"


def test_marian_with_two_vocabularies(tmp_path: Path) -> None:
    vocabulary = save_marian(tmp_path)
    other = {text: len(vocabulary) - 1 - index for text, index in vocabulary.items()}
    (tmp_path / "target_vocab.json").write_text(json.dumps(other))
    about = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**about, "separate_vocabs": True}))
    tokenizer = PieceTokenizer(files_of(tmp_path), "m")
    assert tokenizer.encode("the", add_special_tokens=False).ids == [vocabulary[f"{SPACE}the"]]
    assert tokenizer.decode([other[f"{SPACE}the"]]) == "the"


def test_m2m_100(tmp_path: Path) -> None:
    vocabulary = save_m2m(tmp_path)
    tokenizer = PieceTokenizer(files_of(tmp_path), "m")
    ids = tokenizer.encode("the cat").ids
    assert ids == [vocabulary[f"{SPACE}the"], vocabulary[f"{SPACE}cat"], vocabulary["</s>"]]
    assert tokenizer.token_to_id("__fr__") == vocabulary["__fr__"] == max(vocabulary.values())
    assert tokenizer.decode([vocabulary["__fr__"], *ids]) == "the cat"
    (tmp_path / "special_tokens_map.json").unlink()
    with pytest.raises(UnsupportedError, match="names no languages"):
        PieceTokenizer(files_of(tmp_path), "m")


@pytest.mark.parametrize("extra", [0, 100])
def test_t5(tmp_path: Path, extra: int) -> None:
    """As transformers' tokenizer of the same pieces; mT5's are published without tokenizer.json."""
    from transformers import T5Tokenizer

    behind = [(f"<extra_id_{index}>", 0.0) for index in reversed(range(extra))]  # as its converter has them
    theirs = T5Tokenizer(vocab=[*save_t5(tmp_path), *behind], extra_ids=extra)
    ours = t5_tokenizer((tmp_path / "spiece.model").read_bytes(), extra, "m")
    for text in ("the cat sat", "  a  mat ", "cats</s> on", "zq the", "the <extra_id_1> cat <extra_id_99>"):
        ids = ours.encode(text).ids
        assert ids == theirs(text)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.get_vocab_size() == len(theirs)


def test_what_is_not_t5s() -> None:
    with pytest.raises(UnsupportedError, match="m is not T5's: its first pieces are"):
        t5_tokenizer(model_file(pieces_of()), 100, "m")


def test_damaged_vocabularies(tmp_path: Path) -> None:
    save_marian(tmp_path)
    for text, message in (
        ('{"a": "b"}', "vocab.json is missing or gives no ids to tokens"),
        ('{"a": 0}', "vocab.json lacks <unk> or </s>"),
    ):
        (tmp_path / "vocab.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            PieceTokenizer(files_of(tmp_path), "m")
