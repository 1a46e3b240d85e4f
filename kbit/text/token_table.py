"""A byte-level BPE tokenizer in a form that is ready as soon as it is mapped.

Parsing a tokenizer.json of 150,000 tokens and merges takes the `tokenizers` library longer than everything else a
model's start takes. A token table holds the vocabulary and the merges as arrays with hash tables beside them, used in
place; and beside them one small JSON text: the same tokenizer with nothing but the bytes and the added tokens as its
vocabulary, and without merges. The library loads that in a millisecond and does with it everything that comes before
and after the merges (added tokens, normalizer, pre-tokenizer, post-processor, decoder).

Layout, little-endian: a header (`_HEADER`), then without gaps

    texts         UTF-8 of all tokens of the model, one after the other, written as in tokenizer.json
    ends          (tokens,) uint32: where each ends in texts
    token_slots   (2^k,) uint32: hash table, 1 + id by token
    merges        (merges, 3) uint32 by rank: left id, right id, id of both joined
    merge_slots   (2^k,) uint32: hash table, 1 + rank by (left, right)
    json          the small tokenizer

The hash functions are those of kernels/cpu/text/byte_pairs.cpp; a change there or here needs another `_VERSION`.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from kbit.host.errors import CheckpointError
from kbit.text.backend import library_errors, load_backend

if TYPE_CHECKING:
    import tokenizers

    from kbit._native import BytePairs

_MAGIC = b"kbit-tok"
_VERSION = 1
_IGNORE_MERGES = 1
# magic, version, CRC-32 of all that follows the header, bytes of each section in order, flags
_HEADER = struct.Struct("<8sII6QI4x")
_SECTIONS = ("texts", "ends", "token_slots", "merges", "merge_slots", "json")

# Characters of the bytes that valid UTF-8 never contains: some vocabularies have no token for them.
_NEVER_IN_UTF8 = frozenset(map(chr, (0xC0, 0xC1, *range(0xF5, 0x100))))


@dataclass(frozen=True)
class TokenTable:
    """An opened table.

    Attributes:
        pairs: the vocabulary and merges, read in place.
        small: the JSON of the tokenizer of bytes and added tokens.
    """

    pairs: BytePairs
    small: bytes


def build_table(
    tokenizer_json: bytes, complete: Callable[[tokenizers.Tokenizer], bool] = lambda tokenizer: False
) -> bytes | None:
    """The table of a tokenizer.json, or None where it would not give exactly what the library gives.

    Args:
        tokenizer_json: the file.
        complete: adds to the library's tokenizer what other files name, and says whether that changed it
            (`kbit.text.added_tokens`); the table has it then.

    Inside are byte-level BPE tokenizers (GPT-2's, Llama 3's, Qwen's and their kin): a ByteLevel pre-tokenizer comes
    last and the decoder is ByteLevel. Outside are other models, dropout, byte fallback and marks within words.
    """
    try:
        full = load_backend(tokenizer_json, "tokenizer.json")
        changed = complete(full)
    except CheckpointError:
        return None  # for whoever loads the tokenizer itself to report
    state: dict[str, Any] = json.loads(full.to_str() if changed else tokenizer_json)
    model = state["model"]
    if not (_is_plain_byte_level(state) and _is_dense(model["vocab"])):
        return None
    merges = _merges(model)
    if merges is None:
        return None
    added = {token.content: _id(full, token.content) for token in full.get_added_tokens_decoder().values()}
    small = small_tokenizer(state, added)
    try:
        with library_errors("tokenizer.json"):
            alike = _splits_alike(small, full)
    except CheckpointError:
        return None
    if not alike:
        return None
    return _pack(model["vocab"], merges, small, bool(model.get("ignore_merges")))


def open_table(table: memoryview, name: str) -> TokenTable:
    """A table that `build_table` made; it is read in place and must stay mapped.

    Args:
        table: its bytes, at any alignment.
        name: what to call it in errors.

    Raises:
        CheckpointError: it is damaged, or of another version.
    """
    from kbit._native import BytePairs

    try:
        table = table.cast("B")
        magic, version, checksum, *sizes, flags = _HEADER.unpack_from(table)
    except (struct.error, TypeError) as error:
        raise CheckpointError(f"{name} is no token table: {error}") from None
    if magic != _MAGIC or version != _VERSION:
        raise CheckpointError(f"{name} is no token table of version {_VERSION}")
    body = table[_HEADER.size :]
    if sum(sizes) != len(body) or zlib.crc32(body) != checksum:
        raise CheckpointError(f"{name} is damaged: its checksum differs")
    ends = list(accumulate(sizes))
    parts = {key: body[end - size : end] for key, size, end in zip(_SECTIONS, sizes, ends, strict=True)}
    small = bytes(parts.pop("json"))
    try:
        return TokenTable(BytePairs(**parts, ignore_merges=bool(flags & _IGNORE_MERGES)), small)
    except RuntimeError as error:
        raise CheckpointError(f"{name} is damaged: {error}") from None


def small_tokenizer(state: Mapping[str, Any], extra: Mapping[str, int]) -> bytes:
    """tokenizer.json of the same tokenizer with the bytes and some more tokens as its vocabulary, and without merges.

    It splits texts into the same words and gives each byte of a word its id.

    Args:
        state: a parsed tokenizer.json, the whole one's or a small one's.
        extra: tokens and their ids: those that are added tokens must be among them.
    """
    from tokenizers import pre_tokenizers

    vocab = state["model"]["vocab"]
    kept = {char: vocab[char] for char in sorted(pre_tokenizers.ByteLevel.alphabet()) if char in vocab}
    plain = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    model: dict[str, Any] = {"type": "BPE", **plain, **flags, "vocab": {**kept, **extra}, "merges": []}
    # A tokenizer.json may carry the truncation and padding of its training run.
    return json.dumps({**state, "truncation": None, "padding": None, "model": model}).encode()


def _is_plain_byte_level(state: Mapping[str, Any]) -> bool:
    model: Mapping[str, Any] = state["model"]
    splitter, decoder = state.get("pre_tokenizer"), state.get("decoder")
    while isinstance(splitter, dict) and splitter.get("type") == "Sequence" and splitter["pretokenizers"]:
        splitter = splitter["pretokenizers"][-1]
    return (
        model.get("type") == "BPE"
        and not any(model.get(key) for key in ("dropout", "byte_fallback"))
        and not any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix"))
        and all(isinstance(part, dict) and part.get("type") == "ByteLevel" for part in (splitter, decoder))
        and _knows_bytes(state)
    )


def _knows_bytes(state: Mapping[str, Any]) -> bool:
    """Whether the small tokenizer finds the same characters of a word in its vocabulary as the whole one."""
    from tokenizers import pre_tokenizers

    model, added = state["model"], {token["content"] for token in state["added_tokens"]}
    missing = {*pre_tokenizers.ByteLevel.alphabet()} - _NEVER_IN_UTF8 - model["vocab"].keys()
    # Both leave out a character that has no token, and join what stands beside it; but not if there is an unknown token
    # to stand for it, a token with this character in it may be taken whole, or an added token is this character.
    return not missing or (model.get("unk_token") is None and not model.get("ignore_merges") and not missing & added)


def _is_dense(vocab: Mapping[str, int]) -> bool:
    return sorted(vocab.values()) == list(range(len(vocab)))


def _merges(model: Mapping[str, Any]) -> list[int] | None:
    """(left, right, joined) of all merges in one list, or None where one is not of the two known spellings."""
    vocab: Mapping[str, int] = model["vocab"]
    found: list[int] = []
    for merge in model["merges"]:
        if isinstance(merge, str):
            if merge.startswith("#version"):
                continue  # the library skips these lines of old files and does not count them
            merge = merge.split(" ")
        if len(merge) != 2 or not (merge[0] in vocab and merge[1] in vocab and merge[0] + merge[1] in vocab):
            return None
        left, right = merge
        found += (vocab[left], vocab[right], vocab[left + right])
    return found


def _id(tokenizer: tokenizers.Tokenizer, token: str) -> int:
    token_id = tokenizer.token_to_id(token)
    assert token_id is not None
    return token_id


def _splits_alike(small: bytes, full: tokenizers.Tokenizer) -> bool:
    """Whether the small tokenizer has the full one's added tokens, and its post-processor gives a text once."""
    ours = load_backend(small, "the small tokenizer")
    added = ({i: repr(token) for i, token in t.get_added_tokens_decoder().items()} for t in (ours, full))
    if next(added) != next(added):
        return False
    # The library goes on hiding a token that was special once; its JSON does not say so.
    hidden = [{i for i in full.get_added_tokens_decoder() if not t.decode([i])} for t in (ours, full)]
    if hidden[0] != hidden[1]:
        return False
    bare = load_backend(json.dumps({**json.loads(small), "post_processor": None}).encode(), "the small tokenizer")
    around = ours.num_special_tokens_to_add(is_pair=False)
    return len(ours.encode("a").ids) == len(bare.encode("a").ids) + around


def _pack(vocab: Mapping[str, int], merges: list[int], small: bytes, ignore_merges: bool) -> bytes:
    from kbit._native import fill_merge_slots, fill_token_slots

    tokens = [token.encode() for token in sorted(vocab, key=vocab.__getitem__)]
    texts = b"".join(tokens)
    ends = _numbers(list(accumulate(map(len, tokens))))
    pairs = _numbers(merges)
    token_slots, merge_slots = _slots(len(tokens)), _slots(len(merges) // 3)
    fill_token_slots(memoryview(texts), memoryview(ends), memoryview(token_slots))
    fill_merge_slots(memoryview(pairs), memoryview(merge_slots))
    sections: list[bytes | bytearray] = [texts, ends, token_slots, pairs, merge_slots, small]
    body = b"".join(sections)
    flags = _IGNORE_MERGES if ignore_merges else 0
    return _HEADER.pack(_MAGIC, _VERSION, zlib.crc32(body), *map(len, sections), flags) + body


def _numbers(values: list[int]) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def _slots(entries: int) -> bytearray:
    """Free slots for a hash table: at most two thirds of them will be taken."""
    return bytearray(4 << (entries * 3 // 2 + 1).bit_length())
