"""Hugging Face tokenizer files rebuilt from GGUF metadata.

Three kinds of vocabulary beside WordPiece (`wordpiece`) and T5's (`unigram`): `gpt2` (byte-level BPE with merges; how
text is split comes from `tokenizer.ggml.pre`, see `pretokenizers`), `llama` (SentencePiece BPE: tokens with scores,
bytes as <0xNN> tokens), and `gemma4` (such tokens with merges; runs of line breaks are apart). The result is a
tokenizer.json that the `tokenizers` library loads without any code of this module.

SentencePiece joins the adjacent pair whose joined token has the highest score, the leftmost on ties. Byte-pair
merges express the same: every split of a token into two tokens is a merge, ranked by the token's score.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from kbit.checkpoint.gguf.metadata import GGUFHeader, quoted
from kbit.checkpoint.gguf.pretokenizers import DIGITS, PRE_TOKENIZERS
from kbit.checkpoint.gguf.unigram import unigram
from kbit.checkpoint.gguf.wordpiece import wordpiece_files
from kbit.host.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "\u2581"  # SentencePiece's visible space

# SentencePiece trains tokens of at most 16 to 64 characters; the limit bounds the work per token.
_MAX_SPM_TOKEN = 256

# Control tokens that end a turn in some chat format. One that the file's own chat template writes ends generation
# too, because converters do not always store it (Llama 3 files name <|end_of_text|>, but turns end with <|eot_id|>).
_TURN_ENDS = frozenset(
    {"<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>", "<|eom_id|>", "<turn|>"}
)


def sidecars_from_header(header: GGUFHeader, context: int) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and generation_config.json for a GGUF file.

    Args:
        header: the parsed header.
        context: the model's context length in tokens (`model_max_length`).

    Returns:
        File contents by name; empty when the file carries no tokenizer.

    Raises:
        CheckpointError: the vocabulary contradicts itself.
        UnsupportedError: a tokenizer model or pre-tokenizer kbit does not know.
    """
    model = header.string("tokenizer.ggml.model")
    if model is None or model in ("none", "no_vocab"):
        return {}
    if model == "bert":
        return wordpiece_files(header, context)
    kinds = {"gpt2": _byte_level, "llama": _sentencepiece, "gemma4": _gemma4, "t5": _unigram}
    if model not in kinds:
        raise UnsupportedError(
            f"{header.path}: tokenizer model {quoted(model)} is not supported in GGUF files; supported are "
            "gpt2 (byte-level BPE), llama (SentencePiece), gemma4, t5 (unigram) and bert (WordPiece)"
        )
    vocab = _Vocabulary(header, model)
    tokenizer = kinds[model](vocab)
    _add_special_tokens(tokenizer, vocab)
    _add_template(tokenizer, vocab)

    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": vocab.add_bos,
        "add_eos_token": vocab.add_eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    for name, token_id in (("bos", vocab.bos), ("eos", vocab.eos), ("unk", vocab.unk), ("pad", vocab.pad)):
        if token_id is not None:
            config[f"{name}_token"] = vocab.tokens[token_id]
    templates = _chat_templates(header)
    if templates:
        named = [{"name": name, "template": text} for name, text in templates.items()]
        config["chat_template"] = templates["default"] if list(templates) == ["default"] else named

    generation: dict[str, Any] = {}
    if vocab.bos is not None:
        generation["bos_token_id"] = vocab.bos
    ends = _end_ids(vocab, templates.get("default", ""))
    if ends:
        generation["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    start = header.integer(f"{header.string('general.architecture')}.decoder_start_token_id")
    if start is not None:
        generation["decoder_start_token_id"] = start
    if vocab.pad is not None:
        generation["pad_token_id"] = vocab.pad
    files = {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2) + "\n",
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
    }
    return {name: text.encode() for name, text in files.items()}


class _Vocabulary:
    """The tokenizer's metadata, checked.

    Attributes:
        tokens: token texts by id; ids: the reverse.
        types: token types by id (normal, unknown, control, user-defined, unused, byte).
        bos, eos, unk, pad: special token ids or None.
        add_bos, add_eos: what encoding adds.
        pre: name of the pre-tokenizer ("" for SentencePiece).
    """

    def __init__(self, header: GGUFHeader, model: str) -> None:
        self.header = header
        tokens = header.strings("tokenizer.ggml.tokens")
        if not tokens:
            header.fail("metadata key 'tokenizer.ggml.tokens' is missing or empty", "convert the model again")
        # Empty texts stand for unused ids and get distinct names, as in llama.cpp.
        self.tokens = [text or f"[EMPTY_{index}]" for index, text in enumerate(tokens)]
        self.ids: dict[str, int] = {}
        for index, text in enumerate(self.tokens):
            first = self.ids.setdefault(text, index)
            if first != index:
                header.fail(f"token {quoted(text)} appears twice in the vocabulary (ids {first} and {index})")
        types = header.integers("tokenizer.ggml.token_type")
        if types is not None and len(types) != len(tokens):
            header.fail(f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
        self.types = types or [_NORMAL] * len(tokens)

        sentencepiece = model in ("llama", "t5")
        self.pre = self._pre_tokenizer() if model == "gpt2" else ""
        self.bos = self.special("bos", "<s>" if model == "llama" else None)
        self.eos = self.special("eos", "</s>" if sentencepiece else None)
        self.unk = self.special("unknown", "<unk>" if sentencepiece else None)
        self.pad = self.special("padding", "<pad>" if model == "t5" else None)
        bos_default = PRE_TOKENIZERS[self.pre].add_bos if model == "gpt2" else model != "t5"
        if self.bos is None and "tokenizer.ggml.bos_token_id" in header:  # there is none, it says
            bos_default = False
        add_bos = header.flag("tokenizer.ggml.add_bos_token")
        self.add_bos = bos_default if add_bos is None else add_bos
        add_eos = header.flag("tokenizer.ggml.add_eos_token")
        self.add_eos = model == "t5" if add_eos is None else add_eos
        for name, wanted, token_id in (("bos", self.add_bos, self.bos), ("eos", self.add_eos, self.eos)):
            if wanted and token_id is None:
                header.fail(f"text should get a {name} token, but 'tokenizer.ggml.{name}_token_id' is missing or none")

    def _pre_tokenizer(self) -> str:
        name = self.header.string("tokenizer.ggml.pre")
        if name is None:
            self.header.fail(
                "metadata key 'tokenizer.ggml.pre' is missing, so how text is split into words is unknown",
                "convert the model again with a current converter (files from before May 2024 lack this key)",
            )
        if name not in PRE_TOKENIZERS:
            raise UnsupportedError(
                f"{self.header.path}: pre-tokenizer {quoted(name)} is not supported; known are "
                f"{', '.join(PRE_TOKENIZERS)}"
            )
        return name

    def special(self, name: str, default: str | None) -> int | None:
        """The id under tokenizer.ggml.<name>_token_id, without that key the id of the token spelled `default`."""
        key = f"tokenizer.ggml.{name}_token_id"
        if key not in self.header:
            return None if default is None else self.ids.get(default)
        return self.header.token_id(key, len(self.tokens))

    def merges(self) -> list[tuple[str, str]] | None:
        """tokenizer.ggml.merges as pairs, each of whose parts and whole are tokens; None when absent."""
        lines = self.header.strings("tokenizer.ggml.merges")
        if lines is None:
            return None
        pairs = []
        for index, line in enumerate(lines):
            # The first character may itself be a space (llama.cpp searches from the second one, too).
            cut = line.find(" ", 1)
            left, right = line[: max(cut, 0)], line[cut + 1 :]
            if not (left in self.ids and right in self.ids and left + right in self.ids):
                self.header.fail(f"merge {index} of the tokenizer, {quoted(line)}, does not join two tokens to a third")
            pairs.append((left, right))
        return pairs


def _byte_level(vocab: _Vocabulary) -> Tokenizer:
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

    merges = vocab.merges()
    if merges is None:
        vocab.header.fail("metadata key 'tokenizer.ggml.merges' is missing", "convert the model again")
    rules = PRE_TOKENIZERS[vocab.pre]
    tokenizer = _build(vocab, models.BPE, merges=merges, ignore_merges=rules.ignore_merges)
    if rules.nfc:
        tokenizer.normalizer = normalizers.NFC()
    splits: list[Any] = [
        pre_tokenizers.Digits(individual_digits=True)
        if pattern == DIGITS
        else pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        for pattern in rules.patterns
    ]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(vocab: _Vocabulary) -> Tokenizer:
    from tokenizers import decoders, models, normalizers

    header = vocab.header
    for key in ("tokenizer.ggml.remove_extra_whitespaces", "tokenizer.ggml.precompiled_charsmap"):
        if header.count(key) or (key in header and header.value(key) is True):
            raise UnsupportedError(f"{header.path}: a SentencePiece vocabulary with {key} is not supported")
    unk = None if vocab.unk is None else vocab.tokens[vocab.unk]
    tokenizer = _build(
        vocab, models.BPE, merges=_merges_from_scores(vocab), unk_token=unk, fuse_unk=True, byte_fallback=True
    )
    prefix = header.flag("tokenizer.ggml.add_space_prefix")
    # Like llama.cpp, the space goes before every stretch of text, so also after each special token.
    space = normalizers.Replace(" ", _SPACE)
    back: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix is None or prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), space])
        back.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = space
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer


def _gemma4(vocab: _Vocabulary) -> Tokenizer:
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

    merges = vocab.merges()
    if merges is None:
        vocab.header.fail("metadata key 'tokenizer.ggml.merges' is missing", "convert the model again")
    unk = None if vocab.unk is None else vocab.tokens[vocab.unk]
    tokenizer = _build(vocab, models.BPE, merges=merges, unk_token=unk, fuse_unk=True, byte_fallback=True)
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\n]+|\n+"), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _unigram(vocab: _Vocabulary) -> Tokenizer:
    return unigram(vocab.header, vocab.tokens, vocab.types, vocab.unk)


def _merges_from_scores(vocab: _Vocabulary) -> list[tuple[str, str]]:
    """Merges that make byte-pair encoding join what SentencePiece joins (see the module's docstring)."""
    header, ids = vocab.header, vocab.ids
    scores = header.numbers("tokenizer.ggml.scores")
    if scores is None:
        merges = vocab.merges()
        if merges is None:
            header.fail("metadata key 'tokenizer.ggml.scores' is missing", "convert the model again")
        return merges
    if len(scores) != len(vocab.tokens):
        header.fail(f"tokenizer.ggml.scores has {len(scores)} entries for {len(vocab.tokens)} tokens")
    # Control, unknown and byte tokens never come out of joining text.
    joinable = {
        text for text, kind in zip(vocab.tokens, vocab.types, strict=True) if kind not in (_UNKNOWN, _CONTROL, _BYTE)
    }
    found: list[tuple[float, int, int, str, str]] = []
    for text in joinable:
        score = scores[ids[text]]
        if not math.isfinite(score):
            header.fail(f"token {quoted(text)} has the score {score}")
        if len(text) > _MAX_SPM_TOKEN:
            header.fail(f"token {ids[text]} of the SentencePiece vocabulary has {len(text)} characters")
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in joinable and right in joinable:
                found.append((-score, ids[text], -cut, left, right))
    # Among the splits of one token the longest left part goes first: it is what leftmost joining leaves behind.
    found.sort()
    return [(left, right) for _, _, _, left, right in found]


def _build(vocab: _Vocabulary, model: Any, **options: Any) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer(model(vocab=vocab.ids, **options))
    except Exception as error:  # the library raises plain Exception for a vocabulary it does not accept
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{vocab.header.path}: the tokenizer's vocabulary is not usable ({reason[:200]}); convert the model again"
        ) from error


def _add_special_tokens(tokenizer: Tokenizer, vocab: _Vocabulary) -> None:
    """Control and unknown tokens are special, user-defined ones just stay whole; all match the text as written."""
    from tokenizers import AddedToken

    special_ids = {vocab.bos, vocab.eos, vocab.unk, vocab.pad}
    added = [
        AddedToken(text, normalized=False, special=kind != _USER_DEFINED or index in special_ids)
        for index, (text, kind) in enumerate(zip(vocab.tokens, vocab.types, strict=True))
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) or index in special_ids
    ]
    tokenizer.add_tokens(added)


def _add_template(tokenizer: Tokenizer, vocab: _Vocabulary) -> None:
    from tokenizers import processors

    bos = vocab.tokens[vocab.bos] if vocab.add_bos and vocab.bos is not None else None
    eos = vocab.tokens[vocab.eos] if vocab.add_eos and vocab.eos is not None else None
    if bos is None and eos is None:
        return
    # Pieces as lists, because in a template string a token with a space or a ":" would be read as two items.
    single = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    pair = [*single, *([f"{bos}:1"] if bos else []), "$B:1", *([f"{eos}:1"] if eos else [])]
    special = [(text, vocab.ids[text]) for text in dict.fromkeys(filter(None, (bos, eos)))]
    try:
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    except Exception as error:  # the library's only exception type
        raise CheckpointError(
            f"{vocab.header.path}: special tokens {', '.join(map(quoted, filter(None, (bos, eos))))} "
            "are not usable; convert the model again"
        ) from error


def _chat_templates(header: GGUFHeader) -> dict[str, str]:
    """Chat templates by name; the unnamed one is called "default"."""
    templates: dict[str, str] = {}
    default = header.string("tokenizer.chat_template")
    if default is not None:
        templates["default"] = default
    for name in header.strings("tokenizer.chat_templates") or []:
        text = header.string(f"tokenizer.chat_template.{name}")
        if text is None:
            header.fail(f"metadata key {quoted('tokenizer.chat_template.' + name)} is missing")
        templates[name] = text
    return templates


def _end_ids(vocab: _Vocabulary, template: str) -> list[int]:
    """Ids that end generation: eos, end of turn, end of message, and turn ends that the chat template writes."""
    ids = [vocab.eos, vocab.special("eot", None), vocab.special("eom", None)]
    for text in sorted(_TURN_ENDS):
        index = vocab.ids.get(text)
        if index is not None and vocab.types[index] == _CONTROL and text in template:
            ids.append(index)
    return [index for index in dict.fromkeys(ids) if index is not None]
