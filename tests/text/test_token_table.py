"""Token tables give what the library gives, and damaged ones are refused."""

from __future__ import annotations

import json
import random
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
from gguf_tokenizer_cases import TRICKY, random_texts
from hypothesis import given, settings
from hypothesis import strategies as st
from token_table_cases import ADDED, SYNTHETIC, Pair, table_of, texts, trained, with_everything
from tokenizers import models, normalizers, pre_tokenizers, processors

from kbit.checkpoint.gguf.header import read_header
from kbit.checkpoint.gguf.tokenizer import sidecars_from_header
from kbit.host.errors import CheckpointError
from kbit.text.added_tokens import add_tokens_of_files
from kbit.text.table_tokenizer import TableTokenizer
from kbit.text.token_table import build_table, open_table
from kbit.text.tokenizer import Tokenizer

VOCABULARIES = ["gpt-2", "starcoder", "deepseek-coder"]  # of those in the data, the ones whose pre-tokenizer is known


@pytest.fixture(scope="module")
def pairs() -> dict[str, Pair]:
    return {name: Pair(make().to_str().encode()) for name, make in SYNTHETIC.items()}


@pytest.fixture(scope="module")
def novels(data_dir: Path) -> Pair:
    return Pair((data_dir / "models" / "novels-2m" / "tokenizer.json").read_bytes())


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Pair:
    return Pair(sidecars_from_header(read_header(smollm2_gguf), 8192)["tokenizer.json"])


@pytest.fixture(scope="module", params=VOCABULARIES)
def published(request: pytest.FixtureRequest, data_dir: Path) -> tuple[Path, Pair]:
    path = data_dir / "tokenizers" / f"ggml-vocab-{request.param}.gguf"
    return path, Pair(sidecars_from_header(read_header(path), 2048)["tokenizer.json"])


class TestEquality:
    @pytest.mark.parametrize("kind", SYNTHETIC)
    @settings(max_examples=150)
    @given(text=texts())
    def test_any_text(self, pairs: dict[str, Pair], kind: str, text: str) -> None:
        pairs[kind].check_text(text)

    @pytest.mark.parametrize("kind", SYNTHETIC)
    def test_vocabulary(self, pairs: dict[str, Pair], kind: str) -> None:
        pairs[kind].check_vocabulary()

    @pytest.mark.parametrize("kind", SYNTHETIC)
    @settings(max_examples=100)
    @given(data=st.data())
    def test_any_ids(self, pairs: dict[str, Pair], kind: str, data: st.DataObject) -> None:
        largest = pairs[kind].theirs.get_vocab_size() + 3
        ids = data.draw(st.lists(st.integers(0, largest), max_size=40))
        for skip in (False, True):
            pairs[kind].check_ids(ids, skip)

    def test_long_words(self, pairs: dict[str, Pair]) -> None:
        generator = random.Random(1)
        for text in ("a" * 5000, "".join(generator.choices("the a12é", k=20_000)), "the" * 3000):
            pairs["unsplit"].check_text(text)

    def test_text_of_real_tokenizers(self, data_dir: Path, novels: Pair, smollm2: Pair) -> None:
        heldout = sorted((data_dir / "novels" / "heldout").iterdir())
        chinese = sorted((data_dir / "chinese").glob("*.txt"))
        for path in (*heldout, *chinese):
            text = path.read_text(encoding="utf-8", errors="replace")[20_000:26_000]
            for pair in (novels, smollm2):
                pair.check_text(text)

    @settings(max_examples=100)
    @given(text=texts())
    def test_any_text_of_real_tokenizers(self, novels: Pair, smollm2: Pair, text: str) -> None:
        for pair in (novels, smollm2):
            pair.check_text(text)

    def test_vocabulary_of_real_tokenizers(self, novels: Pair, smollm2: Pair) -> None:
        for pair in (novels, smollm2):
            pair.check_vocabulary()

    def test_published_vectors(self, published: tuple[Path, Pair]) -> None:
        """Texts and ids that llama.cpp tests its own tokenizers with; the vocabularies' own merges."""
        path, pair = published
        sources = Path(f"{path}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
        expected = Path(f"{path}.out").read_text(encoding="utf-8").splitlines()
        for text, line in zip(sources, expected, strict=False):
            assert pair.ours.encode(text, add_special_tokens=False).ids == [int(number) for number in line.split()]
        for text in (*sources, *TRICKY, *random_texts(100)):
            pair.check_text(text)
        pair.check_vocabulary()

    def test_a_merge_listed_twice_has_its_later_rank(self) -> None:
        state = json.loads(trained().to_str())
        state["model"]["merges"] += state["model"]["merges"][::-1]
        data = json.dumps(state).encode()
        pair = Pair(data)
        for text in random_texts(50):
            pair.check_text(text + "thethe" * 5)

    def test_tokens_of_other_files(self) -> None:
        data = with_everything().to_str().encode()
        # An added token, a token of the model and a byte that become special; a new token.
        names = ["the", "<both>", "a", "<new>"]
        for count in range(len(names) + 1):
            extra = [{"content": name, "normalized": False} for name in names[:count]]
            files = {"special_tokens_map.json": json.dumps({"additional_special_tokens": extra}).encode()}
            pair = Pair(data, complete=lambda full, files=files: add_tokens_of_files(full, files, "model"))
            for text in ("a the <both> aé<new>", *random_texts(30)):
                pair.check_text(text)
            pair.check_vocabulary()
            assert (pair.ours.token_to_id("<new>") is not None) == (count == 4)

    def test_a_token_that_was_special_once_is_for_the_library(self) -> None:
        """It is hidden ever after, which no tokenizer.json can say."""

        def complete(full: tokenizers.Tokenizer) -> bool:
            return bool(full.add_tokens([tokenizers.AddedToken("<s>", special=False)]))

        assert build_table(with_everything().to_str().encode(), complete) is None


def changed(**parts: Any) -> bytes:
    """A plain tokenizer.json with other parts; `model` holds changes of the model."""
    state = json.loads(trained().to_str())
    state["model"].update(parts.pop("model", {}))
    return json.dumps({**state, **parts}).encode()


def part(library_object: Any) -> Any:
    return json.loads(library_object.__getstate__())


class TestOutside:
    """Tokenizers that the library must do by itself."""

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"{}",
            b"\xff",
            changed(model={"dropout": 0.1}),
            changed(model={"byte_fallback": True}),
            changed(model={"end_of_word_suffix": "</w>"}),
            changed(pre_tokenizer=None),
            changed(pre_tokenizer=part(pre_tokenizers.Whitespace())),
            changed(decoder=None),
            changed(
                post_processor=part(processors.TemplateProcessing(single="$A $A", pair="$A $B", special_tokens=[]))
            ),
            tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0})).to_str().encode(),
            tokenizers.Tokenizer(models.Unigram([("a", 0.0)])).to_str().encode(),
        ],
    )
    def test_there_is_no_table(self, data: bytes) -> None:
        assert build_table(data) is None

    def test_a_vocabulary_with_holes(self) -> None:
        state = json.loads(trained(0).to_str())
        state["model"]["vocab"]["the"] += 1000
        assert build_table(json.dumps(state).encode()) is None

    def test_characters_without_a_token(self) -> None:
        """Some vocabularies have none for rare bytes: the library leaves these out and joins their neighbours."""
        state = json.loads(trained().to_str())
        for char in "eĊ©À":
            del state["model"]["vocab"][char]
        vocab = {token: index for index, token in enumerate(state["model"]["vocab"])}
        merges = [pair for pair in state["model"]["merges"] if not {*pair} & {*"eĊ©À"}]
        missing = {**state["model"], "vocab": vocab, "merges": merges}
        pair = Pair(changed(model=missing))
        for text in ("theta aeh\naé", *TRICKY, *random_texts(100)):
            pair.check_text(text)
        for settings_of_model in ({"unk_token": "the"}, {"ignore_merges": True}):
            assert build_table(changed(model={**missing, **settings_of_model})) is None
        added = {"id": len(vocab), "content": "e", "special": False, "normalized": False}
        flags = {"single_word": False, "lstrip": False, "rstrip": False}
        assert build_table(changed(model=missing, added_tokens=[{**added, **flags}])) is None
        assert build_table(changed(model=missing, added_tokens=[{**added, **flags, "content": "À"}])) is not None


class TestDamage:
    @pytest.fixture
    def table(self) -> bytes:
        return table_of(with_everything().to_str().encode())

    def test_every_change_is_noticed(self, table: bytes) -> None:
        generator = random.Random(0)
        for at in [*range(64), *(generator.randrange(len(table)) for _ in range(300))]:
            damaged = bytearray(table)
            damaged[at] ^= 1 << generator.randrange(8)
            if damaged[60:64] != table[60:64]:
                continue  # not used
            with pytest.raises(CheckpointError, match="^cache: table "):
                open_table(memoryview(damaged), "cache: table")

    @pytest.mark.parametrize("length", [0, 1, 63, 64, 100, -1])
    def test_truncated(self, table: bytes, length: int) -> None:
        with pytest.raises(CheckpointError, match="^cache: table "):
            open_table(memoryview(table)[:length], "cache: table")

    def test_hostile_bytes_never_crash(self, table: bytes) -> None:
        """With a checksum that fits: a wrong result or an error, nothing worse."""
        generator = random.Random(0)
        *sizes, _ = struct.unpack_from("<6QI", table, 16)
        arrays = sum(sizes[:5])
        for _ in range(300):
            damaged = bytearray(table)
            for _ in range(generator.choice((1, 10, 1000))):
                damaged[64 + generator.randrange(arrays)] = generator.choice((0, 1, 0x7F, 0xFF))
            struct.pack_into("<I", damaged, 12, zlib.crc32(damaged[64:]))
            try:
                backend = TableTokenizer(open_table(memoryview(damaged), "table"), lambda: None)  # type: ignore[arg-type, return-value]
                backend.decode(backend.encode("the aé<both> 12 the theĠthe\n").ids)
                backend.get_vocab()
            except CheckpointError as error:
                assert "\n" not in str(error)

    def test_sizes_that_do_not_fit(self, table: bytes) -> None:
        for section in range(6):
            for size in (0, 1, 2**63):
                damaged = bytearray(table)
                struct.pack_into("<Q", damaged, 16 + 8 * section, size)
                with pytest.raises(CheckpointError):
                    open_table(memoryview(damaged), "table")

    def test_any_alignment(self, table: bytes) -> None:
        for offset in range(4):
            moved = memoryview(bytes(offset) + table)[offset:]
            backend = TableTokenizer(open_table(moved, "table"), lambda: None)  # type: ignore[arg-type, return-value]
            assert backend.decode(backend.encode("the aé").ids) == "the aé"


class TestSource:
    """What kbit's tokenizer does with a source that has a table."""

    def source(self, data: bytes, files: dict[str, bytes]) -> Any:
        table = memoryview(table_of(data, lambda full: add_tokens_of_files(full, files, "model")))
        return SimpleNamespace(path=Path("model"), config={}, sidecar_files=lambda: files, token_table=lambda: table)

    def test_tokenizer_json_is_not_read(self) -> None:
        data = with_everything().to_str().encode()
        settings_file = json.dumps({"bos_token": "<s>", "eos_token": "the"}).encode()
        tokenizer = Tokenizer.from_source(self.source(data, {"tokenizer_config.json": settings_file}))
        files = {"tokenizer_config.json": settings_file, "tokenizer.json": data}
        plain = Tokenizer.from_source(
            SimpleNamespace(path=Path("model"), config={}, sidecar_files=lambda: files, token_table=lambda: None)
        )  # type: ignore[arg-type]
        assert (tokenizer.bos_id, tokenizer.eos_ids) == (plain.bos_id, plain.eos_ids)
        assert tokenizer.vocab_size == plain.vocab_size
        assert tokenizer.has_vocabulary_of(plain)
        for text in ("a the <both>word<s>", *TRICKY):
            assert tokenizer.encode(text) == plain.encode(text)
            assert tokenizer.decode(tokenizer.encode(text)) == plain.decode(plain.encode(text))

    def test_a_very_long_text_is_for_the_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("kbit.text.table_tokenizer._MOST_CHARACTERS", 100)
        backend = with_everything()
        backend.enable_truncation(4)
        data = backend.to_str().encode()
        files = {"tokenizer.json": data, "tokenizer_config.json": b'{"eos_token": "a"}'}
        tokenizer = Tokenizer.from_source(self.source(data, files))
        short = tokenizer.encode("the a " * 5)
        assert len(short) > 4
        long = tokenizer.encode("the a " * 50)
        assert long[: len(short) - 1] == short[:-1]
        assert tokenizer.encode("the a " * 5) == short  # now by the library

    def test_damage_is_an_error_of_the_model(self) -> None:
        damaged = bytearray(table_of(trained().to_str().encode()))
        damaged[-1] ^= 1
        source = SimpleNamespace(
            path=Path("model"), config={}, sidecar_files=dict, token_table=lambda: memoryview(damaged)
        )
        with pytest.raises(CheckpointError, match="^model: the token table is damaged"):
            Tokenizer.from_source(source)  # type: ignore[arg-type]

    def test_added_tokens_have_every_flag(self) -> None:
        """Else the comparisons above say less than they seem to."""
        flags = ("special", "lstrip", "rstrip", "single_word", "normalized")
        assert all({getattr(token, flag) for token in ADDED} == {False, True} for flag in flags)
        assert isinstance(with_everything().normalizer, normalizers.Sequence)
