"""Byte-level tokenizers for tests of token tables, and the comparison of one with the library's own."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import tokenizers
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from kbit.text.table_tokenizer import TableTokenizer
from kbit.text.token_table import build_table, open_table
from kbit.text.tokenizer import Tokenizer

PATTERN = r"'s|'t| ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
ADDED = [
    AddedToken("<s>", special=True, normalized=False),
    AddedToken("<both>", lstrip=True, rstrip=True, normalized=False),
    AddedToken("<left>", lstrip=True, special=True, normalized=True),
    AddedToken("<RIGHT>", rstrip=True, normalized=True),
    AddedToken("word", single_word=True, normalized=False),
    AddedToken("the", normalized=True),  # also a token of the model
    AddedToken("<s><s>", normalized=False),
]


def trained(merges: int = 200, **options: Any) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer with random merges of bytes and of earlier merges, so that merges overlap a lot."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate(alphabet)}
    for token in ("the", "theĠthe"):  # tokens that no merge makes
        vocab[token] = len(vocab)
    generator = random.Random(0)
    parts = ["t", "h", "e", "a", "Ġ", "Ã", "©", "ä", "½", "ł", "1", "2", "Ċ"]
    pairs: list[tuple[str, str]] = []
    while len(pairs) < merges:
        pair = (generator.choice(parts), generator.choice(parts))
        joined = pair[0] + pair[1]
        if len(joined) <= 12 and pair not in pairs:
            vocab.setdefault(joined, len(vocab))
            parts.append(joined)
            pairs.append(pair)
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs, **options))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def with_everything() -> tokenizers.Tokenizer:
    """A normalizer that changes lengths, added tokens with every flag, and tokens around the text."""
    tokenizer = trained()
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.add_tokens(ADDED)
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<s> <s> $A <s>", pair="<s> $A $B:1", special_tokens=[("<s>", start)]),
        ]
    )
    return tokenizer


def whole_tokens() -> tokenizers.Tokenizer:
    """Llama 3's rule: a word that is a token is taken whole."""
    return trained(ignore_merges=True)


def unsplit() -> tokenizers.Tokenizer:
    """Whole texts are words; an old file's merges in one string."""
    state = json.loads(trained().to_str())
    state["pre_tokenizer"] = json.loads(pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False).__getstate__())
    state["model"]["merges"] = [" ".join(pair) for pair in state["model"]["merges"]]
    return tokenizers.Tokenizer.from_str(json.dumps(state))


SYNTHETIC: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "plain": trained,
    "everything": with_everything,
    "whole tokens": whole_tokens,
    "unsplit": unsplit,
    "no merges": lambda: trained(0),
}

# Texts in which merges compete, and markup.
PIECES = [
    *"the a12\n\r\t.!é漢🙂",
    "the",
    "theĠthe",
    " the",
    "word",
    " word ",
    "aé",
    "'s",
    "E\u0301",
    "\u00a0",
    "\u1100\u1161",
]
MARKUP = [*(token.content for token in ADDED), "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<right>", "<tool_call>"]


def texts() -> st.SearchStrategy[str]:
    """Unicode of all kinds, mixed with pieces that make merges compete and with special tokens."""
    pieces = st.sampled_from([*PIECES, *MARKUP]) | st.text(max_size=6)
    return st.lists(pieces, max_size=30).map("".join)


Complete = Callable[[tokenizers.Tokenizer], bool]


def nothing(full: tokenizers.Tokenizer) -> bool:
    return False


def table_of(data: bytes, complete: Complete = nothing) -> bytes:
    table = build_table(data, complete)
    assert table is not None
    return table


class Pair:
    """The library's tokenizer of a tokenizer.json, and the one of its table, which may load nothing else."""

    def __init__(self, data: bytes, table: bytes | None = None, complete: Complete = nothing) -> None:
        def refuse() -> tokenizers.Tokenizer:
            raise AssertionError("tokenizer.json was parsed")

        self.theirs = tokenizers.Tokenizer.from_buffer(data)
        complete(self.theirs)
        self.ours = TableTokenizer(open_table(memoryview(table or table_of(data, complete)), "table"), refuse)

    def check_text(self, text: str) -> None:
        for special in (False, True):
            ids = self.theirs.encode(text, add_special_tokens=special).ids
            assert self.ours.encode(text, add_special_tokens=special).ids == ids
            for skip in (False, True):
                self.check_ids(ids, skip)

    def check_ids(self, ids: list[int], skip: bool) -> None:
        expected = self.theirs.decode(ids, skip_special_tokens=skip)
        assert self.ours.decode(ids, skip_special_tokens=skip) == expected
        streamed = [self._stream(backend, ids[:200], skip) for backend in (self.ours, self.theirs)]
        assert streamed[0] == streamed[1]

    @staticmethod
    def _stream(backend: Any, ids: list[int], skip: bool) -> list[str]:
        stream = Tokenizer(backend).stream(skip_special_tokens=skip)
        return [*(stream.push(i) for i in ids), stream.finish()]

    def check_vocabulary(self) -> None:
        for added in (False, True):
            assert self.ours.get_vocab(added) == self.theirs.get_vocab(added)
            assert self.ours.get_vocab_size(added) == self.theirs.get_vocab_size(added)
        for token_id in range(self.theirs.get_vocab_size() + 300):
            assert self.ours.id_to_token(token_id) == self.theirs.id_to_token(token_id)
        for token in [*self.theirs.get_vocab(), "", "no such token", "漢字"]:
            assert self.ours.token_to_id(token) == self.theirs.token_to_id(token)
        ours, theirs = (backend.get_added_tokens_decoder() for backend in (self.ours, self.theirs))
        assert {i: repr(t) for i, t in ours.items()} == {i: repr(t) for i, t in theirs.items()}
