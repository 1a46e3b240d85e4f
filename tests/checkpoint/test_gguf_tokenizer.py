"""Byte-level BPE tokenizer files rebuilt from GGUF metadata, against transformers' conversion and published ids.

Where transformers 5.23's GGUF conversion differs, and who is right:

- `smollm`: transformers has no entry for this pre-tokenizer and splits like GPT-2, so that "  12" keeps two spaces
  apart ("Ġ", "Ġ", "1", "2") and " ½" becomes "ĠÂ", "½". SmolLM's own tokenizer.json is Digits(individual) followed
  by ByteLevel, and llama.cpp applies `\\p{N}` before GPT-2's pattern for LLAMA_VOCAB_PRE_TYPE_SMOLLM: digits are cut out
  first ("ĠĠ", "1", "2"). kbit follows these two. The tests set that pre-tokenizer in transformers' tokenizer and
  demand equal ids; on WikiText-2 the uncorrected one differs in one line ("4 ½ months").
- `qwen2`: transformers' GGUF conversion and llama.cpp leave out the NFC normalization of Qwen2's tokenizer.json;
  kbit keeps it. Compared with transformers' Qwen2Tokenizer class, which has it.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from gguf_tokenizer_cases import TRICKY, Metadata, byte_level, our_ids, random_texts, their_ids, through_transformers
from tokenizers import pre_tokenizers

from kbit.checkpoint.gguf.header import read_header
from kbit.checkpoint.gguf.pretokenizers import PRE_TOKENIZERS
from kbit.checkpoint.gguf.tokenizer import sidecars_from_header


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
    ("bloom", "It's 12, (a|b) c।", ["It's", " 12", ", (", "a", "|", "b", ")", " c", "।"]),
    ("starcoder", "x=10", ["x", "=", "1", "0"]),
    ("minerva-7b", "x10 y", ["x", "1", "0", " y"]),
    # punctuation runs, GPT-2, number runs, groups of three digits
    ("default", "Well... it's 1234567!", ["Well", "...", " it", "'", "s", " ", "123", "456", "7", "!"]),
    # line breaks, words and punctuation with one space before, Chinese and Korean, digits
    ("deepseek-coder", "a b\n漢字x, 12", ["a", " b", "\n", "漢字", "x", ",", " ", "1", "2"]),
    # letters with two cases and punctuation with one space before, spaces at the end, Chinese, digits
    ("deepseek-llm", "a b\n汉字x, 12  ", ["a", " b", "\n", "汉字", "x", ",", " ", "1", "2", "  "]),
    ("deepseek-llm", "\u0e01 \u01bbz", ["\u0e01", " \u01bb", "z"]),
    # digits by threes, Chinese and Japanese, punctuation before a word
    ("deepseek-v3", "x 1234 漢かな .foo a'll", ["x", " ", "123", "4", " ", "漢かな", " .", "foo", " a", "'ll"]),
    ("hunyuan-dense", "1234", ["123", "4"]),
    ("youtu", "iPhone12「あ」", ["i", "Phone", "1", "2", "「", "あ", "」"]),
    ("command-r", "a 123", ["a", " ", "1", "2", "3"]),
    ("glm4", "a 12345 I'LL", ["a", " ", "123", "45", " I", "'LL"]),
    ("minimax-m2", "HTTPServer's 1234", ["HTTPServer's", " ", "123", "4"]),
    ("exaone4", "a 123  b's", ["a", " 123", " ", " b", "'s"]),
    ("seed-coder", "f(x)\n  12!\n", ["f", "(x", ")", "\n", " ", " ", "1", "2", "!", "\n"]),
    ("qwen2", "a 123 I'LL\n\n b", ["a", " ", "1", "2", "3", " I", "'LL", "\n\n", " b"]),
    # marks among letters
    ("qwen35", "cafe\u0301s 12", ["cafe\u0301s", " ", "1", "2"]),
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


def test_gemma4_equals_transformers_own_class(tmp_path: Path) -> None:
    """Byte pairs of text whose spaces are "▁", bytes for what the vocabulary has not; runs of line breaks are apart."""
    transformers = pytest.importorskip("transformers")
    characters = ["\u2581", "\n", *"abcdefghijklmnopqrstuvwxyzHIT0123456789.,!?'()éо"]
    merges = [
        ("\u2581", "t"),
        ("h", "e"),
        ("\u2581t", "he"),
        ("i", "n"),
        ("in", "g"),
        ("\n", "\n"),
        ("\u2581", "\u2581"),
    ]
    merges += [("\u2581\u2581", "\u2581\u2581"), ("1", "2"), ("l", "l"), ("H", "e"), ("\n\n", "\n")]
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<turn|>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *characters, *(a + b for a, b in merges)]
    types = [3] * len(special) + [6] * 256 + [1] * (len(characters) + len(merges))
    metadata = Metadata(
        "gemma4",
        tokens,
        token_type=types,
        merges=[" ".join(pair) for pair in merges],
        bos_token_id=2,
        eos_token_id=1,
        unknown_token_id=3,
        padding_token_id=0,
        add_bos_token=True,
        add_space_prefix=False,
    )
    metadata.template = "{{ bos_token }}<turn|>"
    ours = metadata.tokenizer(tmp_path)
    theirs = transformers.GemmaTokenizer(vocab={text: index for index, text in enumerate(tokens)}, merges=merges)
    for text in [*TRICKY, *random_texts(200), "Hello the thing\n\n\n  12 in\n the"]:
        if "<" in text:
            continue
        found = ours.encode(text)
        assert found.ids == [2, *theirs(text, add_special_tokens=False).input_ids], text
        assert ours.decode(found.ids) == text
    assert json.loads(metadata.sidecars(tmp_path)["generation_config.json"])["eos_token_id"] == [1, 5]


@pytest.mark.parametrize("name", ["falcon", "mpt", "refact"])
def test_published_ids(name: str, data_dir: Path) -> None:
    """Texts and ids that llama.cpp tests its own tokenizers with."""
    path = data_dir / "tokenizers" / f"ggml-vocab-{name}.gguf"
    made = tokenizers.Tokenizer.from_buffer(sidecars_from_header(read_header(path), 2048)["tokenizer.json"])
    texts = Path(f"{path}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    wanted = [[int(number) for number in line.split()] for line in Path(f"{path}.out").read_text().splitlines()]
    assert len(wanted) > 40
    assert [made.encode(text, add_special_tokens=False).ids for text in texts[: len(wanted)]] == wanted
