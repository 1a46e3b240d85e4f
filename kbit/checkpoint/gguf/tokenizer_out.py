"""Tokenizer files as GGUF metadata: what `kbit.checkpoint.gguf.tokenizer` reads, written.

Two kinds of BPE: byte-level, whose way of splitting text has a name in GGUF (`pretokenizers`), and SentencePiece's,
with "▁" for spaces and bytes as tokens; its scores, which tokenizer.json does not keep, are the order of merges.
Unigram and WordPiece are in `pieces_out`. Whether the metadata means the same is found out: it is read back and both
tokenizers must agree on texts that tell tokenizers apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kbit.checkpoint.gguf.pieces_out import token_types, unigram_keys, wordpiece_keys
from kbit.checkpoint.gguf.pretokenizers import DIGITS, GPT2, PRE_TOKENIZERS, PreTokenizer
from kbit.host.errors import UnsupportedError
from kbit.host.notes import note

if TYPE_CHECKING:
    import tokenizers

    from kbit.checkpoint.gguf.writing import Value

_NORMAL, _UNKNOWN, _BYTE = 1, 2, 6
_SPACE = "\u2581"
_INSTEAD = "export plain floats with --to safetensors"
# Of names that split alike the one that converters write.
_PREFERRED = ("gpt-2", "smollm", "llama-bpe", "qwen2")
# Ends of a turn and of a message, which have keys of their own beside the end of text.
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>")
_MESSAGE_END = "<|eom_id|>"
_MOST_ADDED = 8
# Special tokens of BERT: as a checkpoint names them and as GGUF does, and their usual texts.
_BERT_TOKENS = {
    ("cls", "cls", "bos"): "[CLS]",
    ("sep", "seperator"): "[SEP]",
    ("unk", "unknown"): "[UNK]",
    ("pad", "padding"): "[PAD]",
    ("mask", "mask"): "[MASK]",
}

# Spaces, line ends, digits, case, accents, scripts, combining marks, emoji, code: what tells tokenizers apart.
PROBES = (
    "", " ", "Hello, world!", "  two  spaces ", "\n\n\n \t x\r\n", "3 33 333 3333 33333 3.14 ½ ² Ⅷ ٣٤",
    "I've 'told he's THERE, 'RE you SURE? WE'LL a'lL", "camelCase HTTPServer XMLHttpRequest2 ÀÉ x86_64",
    "naïve café Ångström e\u0301 Ελληνικά русский עברית العربية हिन्दी កាន់តែ 漢字かな交じり文 한국어",
    "🚀 (normal) 😶\u200d🌫️ 👩‍👩‍👧 🇩🇪", "def f(x):\n    return {'a': [1, 2]}  # x\n\n\tpass\n",
    "https://example.org/a?b=c&d=e#f <b>tags</b> $x^2+y$ ~|`@ ------======= ``````", "\u00a0a\u3000b\u200bc\ufeff",
)  # fmt: skip


def tokenizer_metadata(
    tokenizer: tokenizers.Tokenizer,
    size: int,
    where: str,
    *,
    bos: int | None,
    eos: list[int],
    pad: int | None,
    unknown: int | None,
    templates: Mapping[str, str],
    named: Mapping[str, str] | None = None,
    types: int = 0,
) -> dict[str, Value]:
    """Metadata keys of a tokenizer.

    Args:
        tokenizer: with all its added tokens.
        size: tokens of the model's vocabulary.
        where: the checkpoint, for errors.
        bos, pad, unknown: ids, if there are.
        eos: ids that end a generation, the tokenizer's own first.
        templates: of chats, by name.
        named: special tokens by their names ("cls_token"), which WordPiece has.
        types: how many kinds of tokens the model tells apart, likewise.

    Raises:
        UnsupportedError: a tokenizer that the metadata cannot say.
    """
    parsed = json.loads(tokenizer.to_str())
    model = parsed["model"]
    if model["type"] not in ("BPE", "Unigram", "WordPiece"):
        raise UnsupportedError(f"{where}: kbit writes no {model['type']} tokenizer as GGUF; {_INSTEAD}")
    if tokenizer.get_vocab_size() > size:
        raise UnsupportedError(
            f"{where}: the tokenizer has {tokenizer.get_vocab_size()} tokens, the model's vocabulary {size}; {_INSTEAD}"
        )
    tokens = [tokenizer.id_to_token(index) or f"[PAD{index}]" for index in range(size)]
    added = tokenizer.get_added_tokens_decoder()
    if model["type"] == "WordPiece":
        keys = wordpiece_keys(tokenizer, parsed, size, types, where) | _of_bert(tokenizer, named or {})
        return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    if model["type"] == "Unigram":
        unknown = model["unk_id"]
        keys = unigram_keys(tokenizer, parsed, size, where)
    elif _is_sentencepiece(parsed):
        keys = _sentencepiece(tokenizer, parsed, tokens, unknown, where)
    else:
        keys = {"model": "gpt2", "pre": _pre(parsed, where), "tokens": tokens}
        keys["token_type"] = token_types(tokenizer, size, None)
        keys["merges"] = [f"{left} {right}" for left, right in _merges(parsed)]
    # What only a configuration calls padding may be a word: written, it would not be one any more.
    keys |= _specials(tokens, bos, eos, pad if pad in added else None, unknown, where)
    begins, ends = _frame(tokenizer, bos, eos[0] if eos else None, where)
    keys |= {"add_bos_token": begins, "add_eos_token": ends}
    found = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    others = {name: text for name, text in templates.items() if name != "default"}
    if "default" in templates:
        found["tokenizer.chat_template"] = templates["default"]
    if others:
        found["tokenizer.chat_templates"] = list(others)
        found |= {f"tokenizer.chat_template.{name}": text for name, text in others.items()}
    return found


def _sentencepiece(
    tokenizer: tokenizers.Tokenizer, parsed: Mapping[str, Any], tokens: list[str], unknown: int | None, where: str
) -> dict[str, Value]:
    types = token_types(tokenizer, len(tokens), None)
    for index, text in enumerate(tokens):
        if types[index] == _NORMAL and len(text) == 6 and text.startswith("<0x"):
            types[index] = _BYTE
    if unknown is not None:
        types[unknown] = _UNKNOWN
    keys: dict[str, Value] = {"model": "llama", "pre": "default", "tokens": tokens}
    return keys | {
        "scores": _scores(tokens, _merges(parsed)),
        "token_type": types,
        "add_space_prefix": _prefix(parsed, where),
    }


def _of_bert(tokenizer: tokenizers.Tokenizer, named: Mapping[str, str]) -> dict[str, Value]:
    """Ids of BERT's special tokens. (What begins a text is llama.cpp's bos.)"""
    found: dict[str, Value] = {}
    for names, text in _BERT_TOKENS.items():
        index = tokenizer.token_to_id(named.get(f"{names[0]}_token", text))
        if index is not None:
            found |= {f"{name}_token_id": index for name in names[1:]}
    return found


def check_same(ours: tokenizers.Tokenizer, theirs: tokenizers.Tokenizer, where: str) -> None:
    """Raise where a tokenizer and what its metadata reads as differ in what they join, or on a text.

    Raises:
        UnsupportedError: they do; the line names the text.
    """
    merged = [set(_merges(json.loads(each.to_str()))) for each in (ours, theirs)]
    if merged[0] != merged[1]:
        left, right = sorted(merged[0] ^ merged[1])[0]
        raise UnsupportedError(
            f"{where}: as GGUF metadata the tokenizer would join {left!r} and {right!r} otherwise; {_INSTEAD}"
        )
    added = [{token.content for token in each.get_added_tokens_decoder().values()} for each in (ours, theirs)]
    texts = [*PROBES]
    for token in (*sorted(added[0] ^ added[1])[:_MOST_ADDED], *sorted(added[0])[:_MOST_ADDED]):
        texts += [f"a{token}b", f" {token} c", 2 * token]
    for text in texts:
        if ours.encode(text).ids != theirs.encode(text).ids:
            raise UnsupportedError(
                f"{where}: as GGUF metadata the tokenizer would split {text!r} otherwise; {_INSTEAD}"
            )


def _merges(parsed: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges = parsed["model"].get("merges", ())  # (of BPE alone)
    pairs = (each.split(" ", 1) if isinstance(each, str) else each for each in merges)
    return [(left, right) for left, right in pairs]


def _is_sentencepiece(parsed: Mapping[str, Any]) -> bool:
    return bool(parsed["model"].get("byte_fallback")) and not any(
        each["type"] == "ByteLevel" for each in _steps(parsed["pre_tokenizer"], "pretokenizers")
    )


def _steps(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """What a part of a tokenizer does, one after another."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for each in part[key] for step in _steps(each, key)]
    return [part]


def _pre(parsed: Mapping[str, Any], where: str) -> str:
    """The name of the way in which text is split."""
    patterns: list[str] = []
    for step in _steps(parsed["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Digits" and step["individual_digits"]:
            patterns.append(DIGITS)
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            patterns.append(step["pattern"].get("Regex", ""))
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            patterns += [GPT2] if step["use_regex"] else []
        else:
            raise UnsupportedError(f"{where}: GGUF has no name for a pre-tokenizer with {step['type']}; {_INSTEAD}")
    normalizers = [step["type"] for step in _steps(parsed["normalizer"], "normalizers")]
    rules = PreTokenizer(tuple(patterns), bool(parsed["model"].get("ignore_merges")), nfc=normalizers == ["NFC"])
    for name in (*_PREFERRED, *PRE_TOKENIZERS):
        known = PRE_TOKENIZERS[name]
        same = (known.patterns, known.ignore_merges, known.nfc) == (rules.patterns, rules.ignore_merges, rules.nfc)
        if same and normalizers in ([], ["NFC"]):
            return name
    raise UnsupportedError(
        f"{where}: GGUF has no name that kbit knows for a pre-tokenizer that splits by {str(patterns)[:120]}; "
        f"{_INSTEAD}"
    )


def _prefix(parsed: Mapping[str, Any], where: str) -> bool:
    """Whether a space is put before text."""
    steps = _steps(parsed["normalizer"], "normalizers")
    kinds = [step["type"] for step in steps]
    if parsed["pre_tokenizer"] is not None or kinds not in (["Prepend", "Replace"], ["Replace"]):
        raise UnsupportedError(
            f"{where}: kbit writes no SentencePiece tokenizer that normalizes by {', '.join(kinds) or 'nothing'} and "
            f"then splits as GGUF; {_INSTEAD}"
        )
    return bool(kinds[0] == "Prepend")


def _scores(tokens: list[str], merges: list[tuple[str, str]]) -> list[float]:
    """The earlier a token is first made, the higher its score; what no merge makes is last."""
    first: dict[str, int] = {}
    for left, right in merges:
        first.setdefault(left + right, len(first))
    return [-float(first.get(text, len(first))) for text in tokens]


def _specials(
    tokens: list[str], bos: int | None, eos: list[int], pad: int | None, unknown: int | None, where: str
) -> dict[str, Value]:
    """Ids of special tokens."""
    found: dict[str, Value] = {}
    for name, index in (("bos", bos), ("eos", eos[0] if eos else None), ("unknown", unknown), ("padding", pad)):
        if index is not None:
            found[f"{name}_token_id"] = index
    left = eos[1:]
    turn = next((index for text in _TURN_ENDS for index in left if tokens[index] == text), None)
    message = next((index for index in left if tokens[index] == _MESSAGE_END), None)
    turn = next((index for index in left if index != message), None) if turn is None else turn
    for name, end in (("eot", turn), ("eom", message)):
        if end is not None:
            found[f"{name}_token_id"] = end
            left = [index for index in left if index != end]
    if left:
        note(f"{where}: GGUF has no key for ends beside three: {', '.join(tokens[index] for index in left)} left out")
    return found


def _frame(tokenizer: tokenizers.Tokenizer, bos: int | None, eos: int | None, where: str) -> tuple[bool, bool]:
    """Whether a text gets a token before and after it."""
    inner, whole = (tokenizer.encode("a", add_special_tokens=flag).ids for flag in (False, True))
    for begins in (False, True):
        for ends in (False, True):
            before, after = [bos] if begins else [], [eos] if ends else []
            if [*before, *inner, *after] == whole and None not in (*before, *after):
                return begins, ends
    raise UnsupportedError(f"{where}: the tokenizer adds more to a text than its first and last token; {_INSTEAD}")
