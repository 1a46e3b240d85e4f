"""Tokenizer files rebuilt from GGUF metadata, against transformers' conversion and independent implementations.

Where transformers 5.23's GGUF conversion differs, and who is right:

- `smollm`: transformers has no entry for this pre-tokenizer and splits like GPT-2, so that "  12" keeps two spaces
  apart ("Ġ", "Ġ", "1", "2") and " ½" becomes "ĠÂ", "½". SmolLM's own tokenizer.json is Digits(individual) followed
  by ByteLevel, and llama.cpp applies `\\p{N}` before GPT-2's pattern for LLAMA_VOCAB_PRE_TYPE_SMOLLM: digits are cut out
  first ("ĠĠ", "1", "2"). kbit follows these two. The tests set that pre-tokenizer in transformers' tokenizer and
  demand equal ids; on WikiText-2 the uncorrected one differs in one line ("4 ½ months").
- `qwen2`: transformers' GGUF conversion and llama.cpp leave out the NFC normalization of Qwen2's tokenizer.json;
  kbit keeps it. Compared with transformers' Qwen2Tokenizer class, which has it.
- SentencePiece: transformers adds the leading space only at the start of the text, kbit and llama.cpp (and Llama 2's
  own tokenizer.json) before every stretch of text between special tokens.
"""

from __future__ import annotations

import heapq
import json
import random
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from tokenizers import pre_tokenizers

from kbit.checkpoint.gguf_header import read_header
from kbit.checkpoint.gguf_pretokenizers import PRE_TOKENIZERS
from kbit.checkpoint.gguf_tokenizer import sidecars_from_header
from kbit.errors import CheckpointError, KbitError, UnsupportedError

TRICKY = [
    "",
    " ",
    "Hello, world!",
    "I'll say it's fine; we've SEEN IT'S don't, they'RE.",
    "  leading, multiple   spaces and trailing   ",
    "digits 1 12 123 1234567 3.14 1,000,000 x86_64 (2024-05-31) ½ ² Ⅷ ٣٤",
    "tabs\tand\t\tmore\n\nblank lines\r\nwindows \n indented",
    "Ünïcödé naïve café déjà vu Ångström Ελληνικά русский עברית العربية हिन्दी 漢字かな交じり文 한국어",
    "emoji 🙂👩‍👩‍👧🏳️‍🌈!? 🇩🇪",
    "def f(x):\n    return {'a': [1, 2]}  # comment\n\n\tpass\n",
    "camelCase HTTPServer iPhone XMLHttpRequest2 ÀÉ",
    "https://example.org/a?b=c&d=e#f <b>tags</b> $x^2+y$ ~|`@",
    "\u00a0non\u3000breaking\u200bzero\ufeff",
]


def random_texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    pieces = [*"ab cZ09 \n\t\r'.,!  é漢字🙂٣²Ⅷſ", "'s", "'LL", " 123", "\u3000", "ing", " the", "<|im_start|>", "</s>"]
    return ["".join(rng.choices(pieces, k=rng.randint(1, 40))) for _ in range(count)]


class Metadata:
    """Tokenizer metadata to be written as a GGUF file (with one tensor of no meaning)."""

    def __init__(self, model: str, tokens: list[str], **keys: Any) -> None:
        self.keys: dict[str, Any] = {"model": model, "tokens": tokens, **keys}
        self.template: str | None = None
        self.named: dict[str, str | None] = {}  # None: listed, but not there

    def write(self, path: Path) -> Path:
        writer = gguf.GGUFWriter(path, "llama")
        for name, value in self.keys.items():
            key = f"tokenizer.ggml.{name}"
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            elif value is not None:
                writer.add_array(key, value)
        if self.template is not None:
            writer.add_string("tokenizer.chat_template", self.template)
        if self.named:
            writer.add_array("tokenizer.chat_templates", list(self.named))
            for name, text in ((name, text) for name, text in self.named.items() if text is not None):
                writer.add_string(f"tokenizer.chat_template.{name}", text)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def sidecars(self, folder: Path) -> dict[str, bytes]:
        return sidecars_from_header(read_header(self.write(folder / "t.gguf")), 2048)

    def tokenizer(self, folder: Path) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_buffer(self.sidecars(folder)["tokenizer.json"])


def byte_level(pre: str | None = "gpt-2", **keys: Any) -> Metadata:
    """A small byte-level vocabulary: the 256 bytes, some English merges, and a few special tokens at the end."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = []
    for merge in (
        "Ġ t", "h e", "Ġt he", "i n", "in g", "Ġ Ġ", "ĠĠ ĠĠ", "1 2", "12 3", "Ċ Ċ", "Ġ 1", "Ã ©", "' s", "' L", ". ,",
    ):  # fmt: skip
        tokens.append(merge.replace(" ", ""))
        merges.append(merge)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>"]
    types = [1] * len(tokens) + [3, 3, 3, 4]
    first = len(tokens)
    keys = {"bos_token_id": first + 1, "eos_token_id": first + 2, "pre": pre, **keys}
    return Metadata("gpt2", [*tokens, *special], token_type=types, merges=merges, **keys)


def through_transformers(path: Path) -> Any:
    """transformers' own conversion of a GGUF file's tokenizer."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)


def their_ids(theirs: Any, text: str) -> list[int]:
    return list(theirs(text, add_special_tokens=False)["input_ids"])


def our_ids(ours: tokenizers.Tokenizer, text: str, special: bool = False) -> list[int]:
    return list(ours.encode(text, add_special_tokens=special).ids)


# --- SmolLM2 -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> tokenizers.Tokenizer:
    start = time.perf_counter()
    files = sidecars_from_header(read_header(smollm2_gguf), 8192)
    print(f"\ntokenizer files of {smollm2_gguf.name}: {time.perf_counter() - start:.3f} s")
    return tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])


def test_smollm2_equals_published_ids(smollm2: tokenizers.Tokenizer) -> None:
    """Ids that other projects publish for SmolLM2's tokenizer."""
    expected = {
        "Hello, we can use": [19556, 28, 392, 416, 722],
        "The capital of France is": [504, 3575, 282, 4649, 314],
        "\n": [198],
        "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
        "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
        "  multiple   spaces": [216, 2701, 256, 5600],
    }
    assert {text: our_ids(smollm2, text) for text in expected} == expected


def test_smollm2_equals_transformers(smollm2: tokenizers.Tokenizer, smollm2_gguf: Path, data_dir: Path) -> None:
    """WikiText, chat markup, and random mixtures; see the module's docstring for the one correction."""
    theirs = through_transformers(smollm2_gguf)
    wikitext = (data_dir / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8")[:100_000]
    assert our_ids(smollm2, wikitext) == their_ids(theirs, wikitext)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    chat = "<|im_start|>user\nWhat is 7 * 191?<|im_end|>\n<|im_start|>assistant\n"
    for text in [wikitext, chat, *TRICKY, *random_texts(400)]:
        ids = our_ids(smollm2, text)
        assert ids == their_ids(theirs, text), repr(text[:80])
        assert smollm2.decode(ids, skip_special_tokens=False) == text


def test_smollm2_files(smollm2_gguf: Path) -> None:
    files = sidecars_from_header(read_header(smollm2_gguf), 8192)
    config = json.loads(files["tokenizer_config.json"])
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_max_length"] == 8192
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == (
        "<|im_start|>", "<|im_end|>", "<|im_end|>",
    )  # fmt: skip
    assert config["chat_template"].startswith("{% for message in messages %}")
    assert json.loads(files["generation_config.json"]) == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


# --- byte-level BPE ------------------------------------------------------------------------------------------------

# Pre-tokenizers that transformers' GGUF conversion states too (it splits all others like GPT-2).
STATED_BY_TRANSFORMERS = [
    "gpt-2", "phi-2", "llama3", "llama-v3", "llama-bpe", "falcon3", "midm-2.0", "dbrx", "smaug-bpe",
    "deepseek-r1-qwen", "megrez", "tekken", "gpt-4o",
]  # fmt: skip


@pytest.mark.parametrize("pre", STATED_BY_TRANSFORMERS)
def test_pre_tokenizers_equal_transformers(pre: str, tmp_path: Path) -> None:
    """The pieces themselves (more telling than ids, which hide a split that no merge crosses), and the ids.

    `ignore_merges` has no effect here: every token of the vocabulary can be reached by merges."""
    metadata = byte_level(pre)
    ours = metadata.tokenizer(tmp_path)
    theirs = through_transformers(tmp_path / "t.gguf")
    for text in [*TRICKY, *random_texts(150)]:
        pieces = [piece for piece, _ in ours.pre_tokenizer.pre_tokenize_str(text)]
        assert pieces == [piece for piece, _ in theirs.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        assert our_ids(ours, text) == their_ids(theirs, text)


PIECES: list[tuple[str, str, list[str]]] = [
    # digits alone, GPT-2 for the rest
    ("smollm", "a 123  45's", ["a", " ", "1", "2", "3", "  ", "4", "5", "'s"]),
    ("starcoder", "x=10", ["x", "=", "1", "0"]),
    ("minerva-7b", "x10 y", ["x", "1", "0", " y"]),
    # punctuation runs, GPT-2, number runs, groups of three digits
    ("default", "Well... it's 1234567!", ["Well", "...", " it", "'", "s", " ", "123", "456", "7", "!"]),
    # line breaks, words and punctuation with one space before, Chinese and Korean, digits
    ("deepseek-coder", "a b\n漢字x, 12", ["a", " b", "\n", "漢字", "x", ",", " ", "1", "2"]),
    ("seed-coder", "f(x)\n  12!\n", ["f", "(x", ")", "\n", " ", " ", "1", "2", "!", "\n"]),
    ("qwen2", "a 123 I'LL\n\n b", ["a", " ", "1", "2", "3", " I", "'LL", "\n\n", " b"]),
    ("llama-bpe", "a 12345 I'LL", ["a", " ", "123", "45", " I", "'LL"]),
    ("tekken", "iPhone 12 a/b", ["i", "Phone", " ", "1", "2", " a", "/b"]),
    ("gpt-4o", "HTTPServer's 1234", ["HTTPServer's", " ", "123", "4"]),
]


@pytest.mark.parametrize(("pre", "text", "pieces"), PIECES, ids=[pre for pre, _, _ in PIECES])
def test_pieces_worked_out_by_hand(pre: str, text: str, pieces: list[str], tmp_path: Path) -> None:
    """From the patterns of the models' tokenizer.json files and llama.cpp's table, by hand."""
    found = byte_level(pre).tokenizer(tmp_path).pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in found] == pieces


def test_every_known_pre_tokenizer_builds_and_round_trips(tmp_path: Path) -> None:
    for pre in PRE_TOKENIZERS:
        ours = byte_level(pre).tokenizer(tmp_path)
        for text in TRICKY:
            assert ours.decode(our_ids(ours, text)) == text


def test_qwen2_equals_transformers_own_class(tmp_path: Path) -> None:
    """Including text that is not in normal form C."""
    transformers = pytest.importorskip("transformers")
    metadata = byte_level("qwen2")
    ours = metadata.tokenizer(tmp_path)
    vocab = {token: index for index, token in enumerate(metadata.keys["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata.keys["merges"]]
    theirs = transformers.Qwen2Tokenizer(vocab=vocab, merges=merges)
    for text in [*TRICKY, "Cafe\u0301 \u1100\u1161 \u212b", *random_texts(100)]:
        text = text.replace("<|im_start|>", "")  # that class knows only <|endoftext|>
        assert our_ids(ours, text) == their_ids(theirs, text), repr(text)


def test_ignore_merges_takes_whole_tokens(tmp_path: Path) -> None:
    """Llama 3 has tokens that no merge reaches; a piece that is such a token is still one token."""
    metadata = byte_level("llama-bpe")
    metadata.keys["tokens"].append("Ġzebra")
    metadata.keys["token_type"].append(1)
    last = len(metadata.keys["tokens"]) - 1
    assert our_ids(metadata.tokenizer(tmp_path), "a zebra")[1:] == [last]
    metadata.keys["pre"] = "smaug-bpe"
    assert last not in our_ids(metadata.tokenizer(tmp_path), "a zebra")


def test_special_and_user_defined_tokens_stay_whole(tmp_path: Path) -> None:
    metadata = byte_level()
    ours = metadata.tokenizer(tmp_path)
    tokens = metadata.keys["tokens"]
    ids = our_ids(ours, "in<|im_start|>in<tool>in<|im_end|>")
    assert [tokens[index] for index in ids] == ["in", "<|im_start|>", "in", "<tool>", "in", "<|im_end|>"]
    # Control tokens are special, user-defined ones are text.
    assert ours.decode(ids, skip_special_tokens=True) == "inin<tool>in"
    assert ours.get_vocab_size() == len(tokens)


@pytest.mark.parametrize(
    ("pre", "keys", "expected"),
    [
        ("gpt-2", {}, ["in"]),
        ("gpt-2", {"add_bos_token": True}, ["<|im_start|>", "in"]),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, ["<|im_start|>", "in", "<|im_end|>"]),
        ("gpt-2", {"add_eos_token": True}, ["in", "<|im_end|>"]),
        ("llama-bpe", {}, ["<|im_start|>", "in"]),  # llama.cpp's default for Llama 3
        ("llama-bpe", {"add_bos_token": False}, ["in"]),
    ],
)
def test_bos_and_eos(pre: str, keys: dict[str, Any], expected: list[str], tmp_path: Path) -> None:
    ours = byte_level(pre, **keys).tokenizer(tmp_path)
    assert ours.encode("in").tokens == expected
    assert ours.encode("in", add_special_tokens=False).tokens == ["in"]


def test_pairs_get_their_special_tokens(tmp_path: Path) -> None:
    ours = byte_level(add_bos_token=True, add_eos_token=True).tokenizer(tmp_path)
    encoding = ours.encode("in", "ing")
    assert encoding.tokens == ["<|im_start|>", "in", "<|im_end|>", "<|im_start|>", "ing", "<|im_end|>"]
    assert encoding.type_ids == [0, 0, 0, 1, 1, 1]


def test_files_open_as_a_hugging_face_folder(tmp_path: Path) -> None:
    """transformers reads the three files back with the same ids and the same special tokens."""
    transformers = pytest.importorskip("transformers")
    metadata = byte_level("llama-bpe")
    metadata.template = "{{ bos_token }}{{ messages[0]['content'] }}<|im_end|>"
    files = metadata.sidecars(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    ours = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
    for text in [*TRICKY, *random_texts(50)]:
        assert list(theirs(text)["input_ids"]) == our_ids(ours, text, special=True)
    assert (theirs.bos_token, theirs.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert theirs.apply_chat_template([{"role": "user", "content": "in"}], tokenize=False) == "<|im_start|>in<|im_end|>"


@pytest.mark.parametrize(
    ("keys", "template", "expected"),
    [
        ({}, None, "<|im_end|>"),
        ({"eot_token_id": 271}, None, ["<|im_end|>", "<|endoftext|>"]),
        ({"eos_token_id": 271}, None, "<|endoftext|>"),
        # The template ends turns with <|im_end|>: it ends generation although the metadata names another token.
        ({"eos_token_id": 271}, "{{ messages }}<|im_end|>", ["<|endoftext|>", "<|im_end|>"]),
        ({"eos_token_id": 271, "eom_token_id": 272}, None, ["<|endoftext|>", "<|im_start|>"]),
    ],
)
def test_ids_that_end_generation(
    keys: dict[str, Any], template: str | None, expected: str | list[str], tmp_path: Path
) -> None:
    metadata = byte_level(**keys)
    metadata.template = template
    tokens = metadata.keys["tokens"]
    assert tokens[271] == "<|endoftext|>"
    ids = json.loads(metadata.sidecars(tmp_path)["generation_config.json"])["eos_token_id"]
    assert (tokens[ids] if isinstance(ids, int) else [tokens[index] for index in ids]) == expected


def test_named_chat_templates(tmp_path: Path) -> None:
    metadata = byte_level()
    metadata.template, metadata.named = "plain", {"tool_use": "tools"}
    config = json.loads(metadata.sidecars(tmp_path)["tokenizer_config.json"])
    assert config["chat_template"] == [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tools"},
    ]


def test_empty_tokens_keep_their_ids(tmp_path: Path) -> None:
    metadata = byte_level()
    metadata.keys["tokens"][100] = ""
    lost = metadata.tokenizer(tmp_path).id_to_token(100)
    assert lost == "[EMPTY_100]"


# --- SentencePiece -------------------------------------------------------------------------------------------------


def sentencepiece_ids(tokens: list[str], scores: list[float], types: list[int], text: str) -> list[int]:
    """SentencePiece's BPE as published (and as llama.cpp runs it): join the adjacent pair whose joined token scores
    highest, leftmost first on ties; what is no token in the end becomes bytes. `text` has no special tokens."""
    ids = {token: index for index, token in enumerate(tokens) if types[index] in (1, 4, 5)}
    symbols = list("▁" + text.replace(" ", "▁")) if text else []
    after: list[int | None] = [index + 1 for index in range(len(symbols))]
    before: list[int | None] = [index - 1 for index in range(len(symbols))]
    if symbols:
        after[-1] = before[0] = None
    queue: list[tuple[float, int, int, int]] = []

    def offer(left: int | None, right: int | None) -> None:
        if left is not None and right is not None and symbols[left] + symbols[right] in ids:
            joined = symbols[left] + symbols[right]
            heapq.heappush(queue, (-scores[ids[joined]], left, right, len(joined)))

    for index in range(1, len(symbols)):
        offer(index - 1, index)
    while queue:
        _, left, right, size = heapq.heappop(queue)
        if not symbols[left] or not symbols[right] or len(symbols[left] + symbols[right]) != size:
            continue
        symbols[left], symbols[right] = symbols[left] + symbols[right], ""
        after[left] = after[right]
        following = after[left]
        if following is not None:
            before[following] = left
        offer(before[left], left)
        offer(left, following)
    result = []
    for symbol in filter(None, symbols):
        if symbol in ids:
            result.append(ids[symbol])
        else:
            result += [tokens.index(f"<0x{byte:02X}>") for byte in symbol.encode()]
    return result


@pytest.fixture(scope="module")
def tinystories(data_dir: Path) -> Metadata:
    """stories260K's SentencePiece vocabulary of 512 tokens (llama2.c's tok512.bin) as GGUF metadata."""
    raw = (data_dir / "models" / "stories260K" / "tok512.bin").read_bytes()
    position, tokens, scores = 4, [], []
    while position < len(raw):
        score, size = struct.unpack_from("<fi", raw, position)
        tokens.append(raw[position + 8 : position + 8 + size].decode("utf-8"))
        scores.append(score)
        position += 8 + size
    # llama2.c writes spaces for SentencePiece's visible space, and line breaks around the control tokens.
    tokens = [token.replace(" ", "▁") for token in tokens]
    tokens[1], tokens[2] = "<s>", "</s>"
    types = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)]
    keys = {"scores": scores, "token_type": types}
    return Metadata("llama", tokens, **keys, bos_token_id=1, eos_token_id=2, unknown_token_id=0)


def test_sentencepiece_equals_the_algorithm(tinystories: Metadata, data_dir: Path, tmp_path: Path) -> None:
    ours = tinystories.tokenizer(tmp_path)
    keys = tinystories.keys
    stories = (data_dir / "tinystories" / "sample.txt").read_text(encoding="utf-8")[:60_000]
    texts = [*stories.split("\n\n"), *TRICKY, *(text.replace("</s>", "") for text in random_texts(300)), "aaaa" * 9]
    for text in texts:
        expected = sentencepiece_ids(keys["tokens"], keys["scores"], keys["token_type"], text)
        assert our_ids(ours, text) == expected, repr(text[:80])
        assert ours.decode(expected) == text


def test_sentencepiece_equals_transformers(tinystories: Metadata, data_dir: Path, tmp_path: Path) -> None:
    """On text without special tokens; texts that start with a space are left to the test above, since transformers'
    Metaspace adds no second one."""
    path = tinystories.write(tmp_path / "t.gguf")
    theirs = through_transformers(path)
    ours = tinystories.tokenizer(tmp_path)
    stories = (data_dir / "tinystories" / "sample.txt").read_text(encoding="utf-8")[:30_000]
    for text in [stories, *TRICKY]:
        if not text.startswith(" "):
            assert our_ids(ours, text) == their_ids(theirs, text), repr(text[:80])


def test_sentencepiece_special_tokens(tinystories: Metadata, tmp_path: Path) -> None:
    """BOS by default; a space before each stretch of text; bytes and the unknown token's text stay text."""
    ours = tinystories.tokenizer(tmp_path)
    assert ours.encode("the").ids[0] == 1
    between = ours.encode("the</s>the", add_special_tokens=False)
    assert between.tokens == ["▁the", "</s>", "▁the"]
    spelled = ours.encode("<0x0A>", add_special_tokens=False)
    assert tinystories.keys["tokens"].index("<0x0A>") not in spelled.ids
    assert our_ids(ours, "\n")[-1] == tinystories.keys["tokens"].index("<0x0A>")


def test_sentencepiece_without_space_prefix(tinystories: Metadata, tmp_path: Path) -> None:
    metadata = Metadata("llama", tinystories.keys["tokens"], **{
        name: value for name, value in tinystories.keys.items() if name not in ("model", "tokens")
    }, add_space_prefix=False, add_bos_token=False)  # fmt: skip
    ours = metadata.tokenizer(tmp_path)
    assert ours.encode("the dog").tokens[0] != "▁the"
    assert ours.decode(ours.encode("the dog").ids) == "the dog"
    assert ours.decode(ours.encode(" the").ids) == " the"


# --- what is refused -----------------------------------------------------------------------------------------------


def change(**keys: Any) -> Callable[[Metadata], None]:
    def edit(metadata: Metadata) -> None:
        metadata.keys.update(keys)

    return edit


def spm(edit: Callable[[Metadata], None]) -> Callable[[Metadata], None]:
    def convert(metadata: Metadata) -> None:
        metadata.keys = {
            "model": "llama",
            "tokens": ["<unk>", "<s>", "</s>", "a", "b", "ab"],
            "scores": [0.0, 0.0, 0.0, -1.0, -2.0, -3.0],
            "token_type": [2, 3, 3, 1, 1, 1],
        }
        edit(metadata)

    return convert


REFUSED: dict[str, tuple[Callable[[Metadata], None], type[KbitError], str]] = {
    "another model": (change(model="t5"), UnsupportedError, "tokenizer model 't5' is not supported"),
    "unknown pre-tokenizer": (change(pre="new-one"), UnsupportedError, "pre-tokenizer 'new-one' is not supported; known"),
    "no pre-tokenizer": (change(pre=None), CheckpointError, "'tokenizer.ggml.pre' is missing"),
    "no tokens": (change(tokens=None), CheckpointError, "'tokenizer.ggml.tokens' is missing or empty"),
    "no merges": (change(merges=None), CheckpointError, "'tokenizer.ggml.merges' is missing"),
    "tokens of another type": (change(tokens=[1, 2]), CheckpointError, "should be an array of strings"),
    "duplicate token": (
        lambda metadata: metadata.keys["tokens"].__setitem__(5, metadata.keys["tokens"][4]),
        CheckpointError,
        "appears twice in the vocabulary (ids 4 and 5)",
    ),
    "too few types": (change(token_type=[1, 1]), CheckpointError, "token_type has 2 entries for 275 tokens"),
    "merge without space": (change(merges=["ab"]), CheckpointError, "merge 0 of the tokenizer, 'ab', does not join"),
    "merge to no token": (change(merges=["a b"]), CheckpointError, "merge 0 of the tokenizer, 'a b', does not join"),
    "eos outside": (change(eos_token_id=275), CheckpointError, "'tokenizer.ggml.eos_token_id' is 275, outside 0 to 274"),
    "eot outside": (change(eot_token_id=999), CheckpointError, "'tokenizer.ggml.eot_token_id' is 999, outside"),
    "bos wanted but unnamed": (
        change(add_bos_token=True, bos_token_id=None), CheckpointError, "'tokenizer.ggml.bos_token_id' is missing",
    ),
    "flag of another type": (change(add_bos_token="yes"), CheckpointError, "should be true or false"),
    "template missing": (
        lambda metadata: metadata.named.update({"tool\nuse": None}),
        CheckpointError,
        "'tokenizer.chat_template.tool\\nuse' is missing",
    ),
    "no scores": (spm(change(scores=None)), CheckpointError, "'tokenizer.ggml.scores' is missing"),
    "too few scores": (spm(change(scores=[0.5])), CheckpointError, "scores has 1 entries for 6 tokens"),
    "score not a number": (
        spm(change(scores=[0.0, 0.0, 0.0, 0.0, 0.0, float("nan")])), CheckpointError, "token 'ab' has the score nan",
    ),
    "endless token": (
        spm(change(tokens=["<unk>", "<s>", "</s>", "a", "b", "a" * 300])), CheckpointError, "has 300 characters",
    ),
    "collapsing whitespace": (
        spm(change(remove_extra_whitespaces=True)), UnsupportedError, "remove_extra_whitespaces is not supported",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_tokenizers_are_named(case: str, tmp_path: Path) -> None:
    edit, error, words = REFUSED[case]
    metadata = byte_level()
    edit(metadata)
    with pytest.raises(error, match=re.escape(words)) as caught:
        metadata.sidecars(tmp_path)
    message = str(caught.value)
    assert "t.gguf" in message
    assert "\n" not in message


def test_a_file_without_tokenizer_has_no_files(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert sidecars_from_header(read_header(tmp_path / "t.gguf"), 2048) == {}
