"""How words are split by a pre-tokenizer's name, as models' tokenizer.json do. (By llama.cpp, whose ids are the same but
where said: `tools/judges/pretokenizers.py`.)"""

from __future__ import annotations

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from kbit.checkpoint.gguf.pretokenizers import DIGITS, PRE_TOKENIZERS
from kbit.checkpoint.gguf.tokenizer_out import PROBES, tokenizer_metadata

TEXT = "He'S 12345 x==y; naïve 漢字かな 👍🏽\n\n  end"
# What a text is cut into, of names whose rules no test of a vocabulary has.
PIECES = {
    "falcon-h1": ["He", "'S", " ", "123", "45", " x", "==", "y", ";", " naïve", " 漢字かな", " 👍🏽\n\n", " ", " end"],
    "stablelm2": ["He", "'S", *" 12345", " x", "==", "y", ";", " naïve", " 漢字かな", " 👍🏽\n\n", " ", " end"],
    "ufakzeka": ["He", "'S", *" 12345", " x", "==", "y", ";", " naïve", " 漢字かな", " 👍🏽\n\n", " ", " end"],
    "minicpm5": ["He", "'S", " ", "123", "45", " x", "==", "y", ";", " naïve", " 漢字かな", " 👍🏽\n\n", " ", " end"],
    "bailingmoe": ["He", "'S", *" 12345", " x", "==", "y", ";", " naïve", " 漢字かな", " 👍🏽\n\n", " ", " end"],
    "exaone-moe": ["He", "'S", *" 12345", " x", "==", "y", ";", " naïve 漢字かな", " 👍🏽\n", "\n", " ", " end"],
    "tiny_aya": ["He'S", " ", "12", "345", " x", "==", "y", ";", " naïve", " 漢字かな", " 👍🏽\n\n", " ", " end"],
    "laguna": ["He", "'S", *" 12345", " x", "==", "y", ";", " naïve", " 漢字かな", " 👍🏽", "\n\n", " ", " end"],
    "spark2_5": ["He", "'S", " ", *"12345", " x", "==", "y", ";", " naïve", " ", "漢字かな", " 👍🏽", "\n", "\n", " ", " end"],
    "kimi-k2": ["He'S", " ", "123", "45", " x", "==", "y", ";", " naïve", " ", "漢字", "かな", " 👍🏽\n\n", " ", " end"],
    "jais-2": ["He", "'S", " ", "123", "45", " x", "==", "y", ";", " naïve", " 漢字かな", " 👍🏽\n\n", " ", " end"],
    "viking": ["He'S", " ", *"12345", " x==y;", " naïve", " 漢字かな", " 👍🏽", "\n\n ", " end"],
}  # fmt: skip


@pytest.mark.parametrize("name", PIECES)
def test_pieces(name: str) -> None:
    pieces = [TEXT]
    for pattern in PRE_TOKENIZERS[name].patterns:
        step = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        pieces = [part for piece in pieces for part, _ in step.pre_tokenize_str(piece)]
    assert pieces == PIECES[name]


def test_a_vocabulary_that_joins_neither_digits_nor_punctuation_is_read_by_other_rules() -> None:
    """Without a difference: what no merge joins, a longer piece does not either."""
    own = [pre_tokenizers.Punctuation("isolated"), pre_tokenizers.Digits(individual_digits=True)]
    space = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence([*own, space])
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator([TEXT, *PROBES] * 3, trainer)
    rules = PRE_TOKENIZERS["falcon-h1"]
    other = Tokenizer.from_str(made.to_str())
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in rules.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    other.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    for text in ("3 33 333, 3.14!", "x == y; f(x)", "漢字かな 👍🏽 12345", "camelCase (2025-11-30)"):
        assert other.encode(text).ids == made.encode(text).ids


@pytest.mark.parametrize("name", ["stablelm2", "kimi-k2", "tiny_aya", "viking", "minicpm5"])
def test_rules_are_written_by_a_name_that_means_them(name: str) -> None:
    """Perhaps another one's, of the same rules."""
    from tokenizers import normalizers

    rules = PRE_TOKENIZERS[name]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(
        models.BPE({text: index for index, text in enumerate(letters)}, [], ignore_merges=rules.ignore_merges)
    )
    splits = [
        pre_tokenizers.Digits(individual_digits=True)
        if pattern == DIGITS
        else pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        for pattern in rules.patterns
    ]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    if rules.nfc:
        made.normalizer = normalizers.NFC()
    keys = tokenizer_metadata(made, 256, "m", bos=None, eos=[], pad=None, unknown=None, templates={})
    written = PRE_TOKENIZERS[str(keys["tokenizer.ggml.pre"])]
    assert (written.patterns, written.nfc, written.ignore_merges) == (rules.patterns, rules.nfc, rules.ignore_merges)
