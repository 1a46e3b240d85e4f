"""Tokenizer files, and the incremental detokenizer against decoding everything at once."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_cases import sentencepiece
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from kbit.checkpoint.gguf.source import GGUFSource
from kbit.host.errors import CheckpointError, UnsupportedError, UsageError
from kbit.text.detokenizer import DetokenizerStream
from kbit.text.tokenizer import Tokenizer

EMOJI = "a \U0001f468\u200d\U0001f469\u200d\U0001f467 b \u4f60\u597d \u00e9\u0301 \U0001f1e9\U0001f1ea!"


def source(files: dict[str, Any], config: dict[str, Any] | None = None) -> Any:
    """A CheckpointSource as far as a tokenizer looks at it; dictionaries become JSON."""
    content = {k: v if isinstance(v, bytes) else json.dumps(v).encode() for k, v in files.items()}
    return SimpleNamespace(
        path=Path("model"), config=config or {}, sidecar_files=lambda: content, token_table=lambda: None
    )


def byte_level(special: tuple[str, ...] = ("<s>", "</s>")) -> Backend:
    """Every byte is a token."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    return backend


def word_piece() -> Backend:
    """Like BERT: a continuation mark, and spaces the decoder puts back."""
    pieces = ["[UNK]", "hel", "##lo", "world", "##s", "!", ",", "a"]
    backend = Backend(models.WordPiece(vocab={p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


@pytest.fixture(scope="module")
def novels(data_dir: Path) -> Tokenizer:
    folder = data_dir / "models" / "novels-2m"
    names = ("tokenizer.json", "tokenizer_config.json")
    return Tokenizer.from_source(
        source({n: (folder / n).read_bytes() for n in names}, json.loads((folder / "config.json").read_bytes()))
    )


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Tokenizer:
    with GGUFSource(smollm2_gguf) as gguf:
        return Tokenizer.from_source(gguf)


SYNTHETIC: dict[str, Callable[[], Backend]] = {
    "byte level": byte_level,
    "sentencepiece": sentencepiece,
    "word piece": word_piece,
}


def streamed(tokenizer: Tokenizer, ids: list[int], **options: Any) -> tuple[list[str], str]:
    """All pushed pieces, and what finish gives."""
    stream = tokenizer.stream(**options)
    return [stream.push(i) for i in ids], stream.finish()


class TestDetokenizer:
    @pytest.mark.parametrize("kind", SYNTHETIC)
    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_text_round_trips_in_pieces(self, kind: str, data: st.DataObject) -> None:
        tokenizer = Tokenizer(SYNTHETIC[kind]())
        ids = tokenizer.encode(data.draw(st.text(max_size=40)))
        pieces, rest = streamed(tokenizer, ids)
        assert "".join(pieces) + rest == tokenizer.decode(ids)

    @pytest.mark.parametrize("kind", ["byte level", "word piece"])
    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_any_ids_give_what_decode_gives(self, kind: str, data: st.DataObject) -> None:
        tokenizer = Tokenizer(SYNTHETIC[kind]())
        # Ids at random are mostly invalid UTF-8; the last ones are special or outside the vocabulary.
        ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=70))
        pieces, rest = streamed(tokenizer, ids)
        assert "".join(pieces) + rest == tokenizer.decode(ids)

    @settings(max_examples=200, deadline=None)
    @given(data=st.data())
    def test_byte_fallback_any_ids_of_valid_runs(self, data: st.DataObject) -> None:
        tokenizer = Tokenizer(sentencepiece())
        plain = st.integers(259, tokenizer.vocab_size - 1).map(lambda i: [i])
        special = st.integers(0, 2).map(lambda i: [i])
        character = (st.characters(codec="utf-8") | st.sampled_from(" \u2581\ufffd")).map(
            lambda c: [3 + b for b in c.encode()]
        )
        parts = data.draw(st.lists(st.one_of(plain, special, character), max_size=40))
        ids = [i for part in parts for i in part]
        pieces, rest = streamed(tokenizer, ids)
        assert "".join(pieces) + rest == tokenizer.decode(ids)

    def test_byte_fallback_replaces_only_invalid_bytes(self) -> None:
        tokenizer = Tokenizer(sentencepiece())
        ids = [3 + b for b in b"A\xff\xe2\x82"]
        pieces, rest = streamed(tokenizer, ids)
        assert (pieces, rest) == (["A", "\ufffd", "", ""], "\ufffd\ufffd")
        # The library gives up the whole run: the documented difference, and the reason the test above has valid runs.
        assert tokenizer.decode(ids) == "\ufffd" * 4

    def test_real_tokenizers_any_ids(self, novels: Tokenizer, smollm2: Tokenizer) -> None:
        for tokenizer in (novels, smollm2):
            generator = random.Random(0)
            for length in (1, 5, 40, 300):
                ids = [generator.randrange(tokenizer.vocab_size) for _ in range(length)]
                pieces, rest = streamed(tokenizer, ids)
                assert "".join(pieces) + rest == tokenizer.decode(ids)

    def test_real_tokenizers_text(self, data_dir: Path, novels: Tokenizer, smollm2: Tokenizer) -> None:
        text = (data_dir / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8")[:4000] + EMOJI
        for tokenizer in (novels, smollm2):
            ids = tokenizer.encode(text)
            pieces, rest = streamed(tokenizer, ids)
            assert "".join(pieces) + rest == text == tokenizer.decode(ids)
            assert rest == ""
            assert "\ufffd" not in "".join(pieces)

    @pytest.mark.parametrize("make", [byte_level, sentencepiece])
    def test_no_half_characters(self, make: Callable[[], Backend]) -> None:
        tokenizer = Tokenizer(make())
        pieces, rest = streamed(tokenizer, tokenizer.encode(EMOJI))
        assert "".join(pieces) == EMOJI
        assert rest == ""
        assert all("\ufffd" not in piece for piece in pieces)
        assert sum(piece == "" for piece in pieces) >= 3 * 5  # each of the five emoji waits for its last byte

    def test_replacement_character_that_is_meant(self) -> None:
        for make in (byte_level, sentencepiece):
            tokenizer = Tokenizer(make())
            ids = tokenizer.encode("a\ufffd\ufffdb\ufffd", add_special_tokens=False)
            pieces, rest = streamed(tokenizer, ids)
            assert "".join(pieces) + rest == "a\ufffd\ufffdb\ufffd"

    def test_incomplete_end(self) -> None:
        tokenizer = Tokenizer(byte_level())
        ids = tokenizer.encode("ok\U0001f600")[:-1]
        assert streamed(tokenizer, ids) == (["o", "k", "", "", ""], "\ufffd")

    @pytest.mark.parametrize("byte", [0xFF, 0x80, 0xE2, 0x20])
    @pytest.mark.parametrize("make", [byte_level, sentencepiece])
    def test_work_per_token_is_bounded(self, make: Callable[[], Backend], byte: int) -> None:
        """Also for endless invalid bytes, where nothing ever becomes a complete character."""
        tokenizer = Tokenizer(make())
        seen = []

        class Counting(DetokenizerStream):
            def _decode(self, ids: Any) -> str:
                seen.append(len(ids))
                return super()._decode(ids)

        inner = tokenizer.stream()
        name = f"<0x{byte:02X}>" if make is sentencepiece else bytes_to_piece(byte)
        token = inner._backend.token_to_id(name)
        stream = Counting(inner._backend, inner._skip_ids, inner._byte_fallback)
        text = "".join(stream.push(token) for _ in range(500)) + stream.finish()
        assert text == tokenizer.decode([token] * 500)
        assert max(seen) <= 16
        assert len(seen) <= 2 * 500 + 2

    def test_context_keeps_the_leading_space(self) -> None:
        tokenizer = Tokenizer(sentencepiece())
        prompt, answer = tokenizer.encode("hello"), tokenizer.encode(" hello", add_special_tokens=False)[1:]
        assert tokenizer.decode(answer) == "hello"
        assert streamed(tokenizer, answer) == (["hello"], "")
        assert streamed(tokenizer, answer, context=prompt) == ([" hello"], "")
        # A context of special tokens only is the beginning of a text.
        assert streamed(tokenizer, answer, context=[1]) == (["hello"], "")

    def test_special_tokens_can_be_shown(self) -> None:
        tokenizer = Tokenizer(byte_level())
        ids = tokenizer.encode("<s>a")
        assert len(ids) == 2
        assert streamed(tokenizer, ids) == (["", "a"], "")
        assert streamed(tokenizer, ids, skip_special_tokens=False) == (["<s>", "a"], "")


def bytes_to_piece(byte: int) -> str:
    """The character byte-level vocabularies write for a byte (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return chr(byte) if byte in printable else chr(256 + [b for b in range(256) if b not in printable].index(byte))


class TestFiles:
    def test_equals_transformers(self, data_dir: Path, novels: Tokenizer) -> None:
        from transformers import PreTrainedTokenizerFast

        theirs = PreTrainedTokenizerFast(tokenizer_file=str(data_dir / "models" / "novels-2m" / "tokenizer.json"))
        text = EMOJI + " The <|endoftext|> end.  \n\n x"
        assert novels.encode(text) == theirs.encode(text)
        ids = theirs.encode(text)
        assert novels.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert novels.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
        assert novels.vocab_size == len(theirs) == 2048
        assert (novels.bos_id, novels.eos_ids, novels.pad_id) == (0, frozenset({0}), None)

    def test_smollm2(self, smollm2: Tokenizer) -> None:
        assert smollm2.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
        assert smollm2.eos_ids == {2}
        assert smollm2.chat_template is not None
        assert smollm2.encode("<|im_start|>user\n")[0] == 1

    @pytest.mark.parametrize(
        ("generation", "config", "expected"),
        [
            ({"eos_token_id": 5}, {"eos_token_id": 7}, {257, 5}),
            ({"eos_token_id": [5, 6]}, {}, {257, 5, 6}),
            ({}, {"eos_token_id": [7, 8]}, {257, 7, 8}),
            ({"eos_token_id": None}, {"eos_token_id": 7}, {257, 7}),
            ({"eos_token_id": -1}, {}, {257}),
            ({}, {}, {257}),
        ],
    )
    def test_eos_ids(self, generation: Any, config: Any, expected: set[int]) -> None:
        files = {
            "tokenizer.json": byte_level().to_str().encode(),
            "tokenizer_config.json": {"eos_token": {"content": "</s>"}, "bos_token": "<s>", "pad_token": None},
            "generation_config.json": generation,
        }
        tokenizer = Tokenizer.from_source(source(files, config))
        assert tokenizer.eos_ids == expected
        assert tokenizer.bos_id == 256
        assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}

    def test_ids_from_config_where_the_tokenizer_names_none(self) -> None:
        files = {"tokenizer.json": byte_level().to_str().encode()}
        tokenizer = Tokenizer.from_source(source(files, {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": -1}))
        assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (256, {257}, None)

    @pytest.mark.parametrize("value", ["2", 2.0, True, {"id": 2}, [1, "2"]])
    def test_senseless_eos_id(self, value: Any) -> None:
        files = {"tokenizer.json": byte_level().to_str().encode(), "generation_config.json": {"eos_token_id": value}}
        with pytest.raises(CheckpointError, match="model: eos_token_id is .*expected a token id"):
            Tokenizer.from_source(source(files))

    @pytest.mark.parametrize("setting", [True, False, None])
    @pytest.mark.parametrize("adds", [True, False])
    @pytest.mark.parametrize("make", [byte_level, sentencepiece])
    def test_who_adds_bos(self, tmp_path: Path, make: Callable[[], Backend], adds: bool, setting: bool | None) -> None:
        """As in transformers, the post-processor alone decides; add_bos_token changes nothing either way."""
        from transformers import LlamaTokenizerFast, PreTrainedTokenizerFast

        backend = make()
        bos = backend.token_to_id("<s>")
        single = "<s> $A" if adds else "$A"
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", bos)])
        state = json.loads(backend.to_str())
        if not adds:
            state["post_processor"] = None
        config = {"bos_token": "<s>", "eos_token": "</s>", **({} if setting is None else {"add_bos_token": setting})}
        files = {"tokenizer.json": state, "tokenizer_config.json": config, "config.json": {"model_type": "llama"}}
        for name, content in files.items():
            (tmp_path / name).write_text(json.dumps(content))
        tokenizer = Tokenizer.from_source(source(files))
        bare = tokenizer.encode("hello", add_special_tokens=False)
        assert bos not in bare
        assert tokenizer.encode("hello") == ([bos, *bare] if adds else bare)
        for kind in (PreTrainedTokenizerFast, LlamaTokenizerFast):
            assert tokenizer.encode("hello") == kind.from_pretrained(tmp_path).encode("hello")

    def test_training_truncation_and_padding_are_ignored(self) -> None:
        backend = byte_level()
        backend.enable_truncation(4)
        backend.enable_padding(length=4)
        tokenizer = Tokenizer.from_source(source({"tokenizer.json": backend.to_str().encode()}))
        assert len(tokenizer.encode("a" * 100)) == 100
        assert len(tokenizer.encode("a")) == 1

    def test_named_token_becomes_special(self) -> None:
        """A tokenizer.json that lists <end> as plain vocabulary: naming it eos_token makes it one token, not shown."""
        backend = byte_level(())
        backend.add_tokens([AddedToken("<end>", special=False)])
        files = {"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": {"eos_token": "<end>"}}
        tokenizer = Tokenizer.from_source(source(files))
        assert tokenizer.decode(tokenizer.encode("a<end>b")) == "ab"
        assert streamed(tokenizer, tokenizer.encode("a<end>b")) == (["a", "", "b"], "")

    @pytest.mark.parametrize(
        ("files", "expected"),
        [
            ({"tokenizer_config.json": {"chat_template": "T"}}, {"default": "T"}),
            ({"tokenizer_config.json": {"chat_template": "T"}, "chat_template.jinja": b"J"}, {"default": "J"}),
            (
                {
                    "tokenizer_config.json": {
                        "chat_template": [
                            {"name": "default", "template": "T"},
                            {"name": "tool_use", "template": "U"},
                        ]
                    }
                },
                {"default": "T", "tool_use": "U"},
            ),
            ({"tokenizer_config.json": {"chat_template": None}}, {}),
            (
                {"chat_template.jinja": b"J", "additional_chat_templates/tool_use.jinja": b"U"},
                {"default": "J", "tool_use": "U"},
            ),
            ({}, {}),
        ],
    )
    def test_chat_templates(self, files: dict[str, Any], expected: dict[str, str]) -> None:
        tokenizer = Tokenizer.from_source(source({"tokenizer.json": byte_level().to_str().encode(), **files}))
        assert tokenizer.chat_templates == expected
        assert tokenizer.chat_template == expected.get("default")

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({"tokenizer.json": b"{"}, "tokenizer.json is not a tokenizer"),
            ({"tokenizer.json": b"[]"}, "tokenizer.json is not a tokenizer"),
            ({"tokenizer.json": b"\xff\xfe"}, "tokenizer.json is not a tokenizer"),
            ({"tokenizer.json": b"[" * 100_000}, "tokenizer.json is not a tokenizer"),
            ({"tokenizer_config.json": b'{"bos_token": '}, "tokenizer_config.json is not valid JSON"),
            ({"tokenizer_config.json": b"[" * 100_000}, "tokenizer_config.json is not valid JSON"),
            ({"tokenizer_config.json": b"[1]"}, "tokenizer_config.json holds a list, not an object"),
            ({"generation_config.json": b"\xff"}, "generation_config.json is not valid JSON"),
            ({"chat_template.jinja": b"\xff"}, "chat_template.jinja is not UTF-8"),
            ({"tokenizer_config.json": b'{"chat_template": [{"name": 1}]}'}, "chat_template is neither"),
            ({"tokenizer_config.json": b'{"chat_template": 5}'}, "chat_template is neither"),
        ],
    )
    def test_corrupt_files(self, files: dict[str, Any], message: str) -> None:
        good = {"tokenizer.json": byte_level().to_str().encode()}
        with pytest.raises(CheckpointError, match=message) as caught:
            Tokenizer.from_source(source({**good, **files}))
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400

    def test_missing_tokenizer(self) -> None:
        with pytest.raises(UnsupportedError, match="no tokenizer.json"):
            Tokenizer.from_source(source({}))
        for name in ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"):
            with pytest.raises(UnsupportedError, match=f"{name} is a sentencepiece model.*AutoTokenizer"):
                Tokenizer.from_source(source({name: b"\x00"}))

    def test_vocabulary_without_its_unknown_token(self) -> None:
        backend = Backend(models.WordPiece(vocab={"a": 0}, unk_token="[UNK]"))
        with pytest.raises(CheckpointError, match="cannot encode this text: .*UNK"):
            Tokenizer(backend).encode("b")

    def test_text_that_is_not_unicode(self) -> None:
        with pytest.raises(UsageError, match="character 2"):
            Tokenizer(byte_level()).encode("ab\udc80")
