"""Text to token ids and back, as the checkpoint's tokenizer files say.

The work is done by the `tokenizers` library; this module reads the files around it: special tokens, beginning of
sequence, end of sequence, chat templates. Where files disagree, the rules are those of transformers (named below).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from kbit.checkpoint.readers.hf_folder import SENTENCEPIECE_NAMES, TEMPLATES
from kbit.host.errors import CheckpointError, UnsupportedError, UsageError, one_line
from kbit.text.added_tokens import add_tokens_of_files, read_json, token_settings, token_strings
from kbit.text.backend import TokenizerBackend, decode, library_errors, load_backend
from kbit.text.detokenizer import DetokenizerStream
from kbit.text.piece_tokenizer import PieceTokenizer, has_pieces
from kbit.text.sentencepiece import t5_tokenizer

if TYPE_CHECKING:
    import tokenizers

    from kbit.checkpoint.source import CheckpointSource


# T5's tokenizer where there is no tokenizer.json (mT5's are published so), and how many extra tokens it has.
_T5_PIECES = "spiece.model"
_T5_EXTRA = {"t5": 100, "mt5": 0, "umt5": 0}
_MOST_EXTRA = 10000


class Tokenizer:
    """A checkpoint's tokenizer.

    Attributes:
        bos_id: id of the beginning-of-sequence token, or None.
        eos_ids: ids that end a generation: the tokenizer's eos_token, and generation_config.json's eos_token_id
            (one or several), or where that is absent config.json's.
        pad_id: id of the padding token, or None.
        special_tokens: special token strings by name ("bos_token": "<s>"), for chat templates; only those that are set.
        chat_templates: Jinja sources by name; a single template is called "default".
    """

    def __init__(
        self,
        backend: TokenizerBackend,
        *,
        bos_id: int | None = None,
        eos_ids: frozenset[int] = frozenset(),
        pad_id: int | None = None,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        # A tokenizer.json may carry the truncation and padding of its training run: neither may touch a prompt.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.bos_id = bos_id
        self.eos_ids = eos_ids
        self.pad_id = pad_id
        self.special_tokens = dict(special_tokens or {})
        self.chat_templates = dict(chat_templates or {})
        added = backend.get_added_tokens_decoder()
        self._skip_ids = frozenset(index for index, token in added.items() if token.special)
        self._byte_fallback = _has_byte_fallback(backend)

    @classmethod
    def from_source(cls, source: CheckpointSource, files: Mapping[str, bytes] | None = None) -> Tokenizer:
        """Reads a checkpoint's tokenizer files.

        Args:
            source: the checkpoint. Where it has a token table, that does the work and tokenizer.json is not parsed; the
                table has the tokens of the other files (`kbit.text.added_tokens`).
            files: its `sidecar_files`, where these have been read already: then only its config is looked at.

        Raises:
            UnsupportedError: there is no tokenizer.json, or its model is one the `tokenizers` library does not know.
            CheckpointError: a file is not what its name says.
        """
        files = source.sidecar_files() if files is None else files
        where = str(source.path)
        table = source.token_table()
        backend: TokenizerBackend
        if table is None:
            pieces = "tokenizer.json" not in files and has_pieces(files)
            kind = source.config.get("model_type")
            backend = PieceTokenizer(files, where) if pieces else library_tokenizer(files, where, kind)
        else:
            from kbit.text.table_tokenizer import TableTokenizer
            from kbit.text.token_table import open_table

            backend = TableTokenizer(
                open_table(table, f"{where}: the token table"), lambda: library_tokenizer(files, where)
            )
        settings = token_settings(files, where)
        generation = read_json(files, "generation_config.json", where)
        named = token_strings(settings)

        def token_id(name: str) -> int | None:
            if name in named:
                return backend.token_to_id(named[name])
            for config in (generation, source.config):
                ids = _ids(config.get(f"{name}_id"), f"{name}_id", where)
                if ids and backend.id_to_token(ids[0]) is not None:
                    return ids[0]
            return None

        eos = _ids(generation.get("eos_token_id"), "eos_token_id", where)
        eos = eos or _ids(source.config.get("eos_token_id"), "eos_token_id", where)
        named_eos = backend.token_to_id(named["eos_token"]) if "eos_token" in named else None
        return cls(
            backend,
            bos_id=token_id("bos_token"),
            eos_ids=frozenset(eos if named_eos is None else [*eos, named_eos]),
            pad_id=token_id("pad_token"),
            special_tokens=named,
            chat_templates=_read_templates(files, settings, where),
        )

    def with_templates_of(self, files: Mapping[str, bytes], where: str) -> Tokenizer:
        """The same tokenizer with the chat templates among some files: itself, where there are none.

        Args:
            files: as `CheckpointSource.sidecar_files` has them.
            where: for errors.

        Raises:
            CheckpointError: a template that cannot be read.
        """
        found = _read_templates(files, read_json(files, "tokenizer_config.json", where), where)
        if not found:
            return self
        other = copy(self)
        other.chat_templates = found
        return other

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. A model's logits may have more columns (padding)."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def has_vocabulary_of(self, other: Tokenizer) -> bool:
        """Whether the same ids are the same tokens in both, added ones included."""
        ours, theirs = (tokenizer._backend.get_vocab(with_added_tokens=True) for tokenizer in (self, other))
        return ours == theirs

    def token_id(self, token: str) -> int | None:
        """The id of a token written as the vocabulary has it ("<|endoftext|>"), or None."""
        return self._backend.token_to_id(token)

    def token_name(self, token: int) -> str | None:
        """A token as the vocabulary has it, or None."""
        return self._backend.id_to_token(token)

    def tokens(self) -> dict[str, int]:
        """Every token as the vocabulary has it, added ones included, with its id."""
        return self._backend.get_vocab(with_added_tokens=True)

    def special_texts(self) -> dict[int, str]:
        """How the special tokens, which texts are shown without, are written, by id."""
        return {index: self._backend.id_to_token(index) or "" for index in self._skip_ids}

    def library_json(self) -> str:
        """The tokenizer.json of all this, for other programs that have the `tokenizers` library.

        Raises:
            UnsupportedError: the tokenizer is not one of the library's.
        """
        return self._backend.to_str()

    @property
    def chat_template(self) -> str | None:
        """The template named "default", or the only one, or None."""
        if len(self.chat_templates) == 1:
            return next(iter(self.chat_templates.values()))
        return self.chat_templates.get("default")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Special tokens written out in the text ("<|im_start|>") become their ids, as in transformers. Whether BOS is
        added is for the post-processor of tokenizer.json alone to say: transformers 5 ignores add_bos_token of
        tokenizer_config.json beside a tokenizer.json, whether true or false.

        Args:
            text: any Unicode text; "" gives [] or, with a tokenizer that adds it, the BOS token alone.
            add_special_tokens: add what the tokenizer adds around a text, BOS above all. False for the output of a
                chat template, which has written these tokens itself.

        Raises:
            UsageError: the text has lone surrogates (bytes that were not UTF-8 where it came from).
            CheckpointError: the vocabulary cannot express it (it names an unknown token it does not have).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the text is not valid Unicode at character {error.start} ({text[error.start]!r}): pass it as UTF-8"
            ) from None
        with library_errors("tokenizer.json cannot encode this text", remedy=""):
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids outside the vocabulary give nothing, invalid bytes give U+FFFD."""
        known = [i for i in ids if i >= 0]
        return decode(self._backend, known, skip_special_tokens=skip_special_tokens)

    def stream(self, context: Sequence[int] = (), skip_special_tokens: bool = True) -> DetokenizerStream:
        """A new incremental decoder; `context` are ids before the first pushed one (see DetokenizerStream)."""
        skip = self._skip_ids if skip_special_tokens else frozenset()
        return DetokenizerStream(self._backend, skip, self._byte_fallback, context)


def has_library_tokenizer(files: Mapping[str, bytes], model_type: object) -> bool:
    """Whether `library_tokenizer` reads these files."""
    return "tokenizer.json" in files or (_T5_PIECES in files and model_type in _T5_EXTRA)


def library_tokenizer(files: Mapping[str, bytes], where: str, model_type: object = None) -> tokenizers.Tokenizer:
    """The library's tokenizer of a checkpoint's files, with all added tokens.

    Args:
        files: a checkpoint's sidecar files.
        where: the checkpoint, for errors.
        model_type: its configuration's.

    Raises:
        UnsupportedError: there is no tokenizer.json, nor T5's SentencePiece file.
        CheckpointError: a file is not what its name says.
    """
    data = files.get("tokenizer.json")
    if data is None and has_library_tokenizer(files, model_type):
        extra = token_settings(files, where).get("extra_ids")
        extra = extra if type(extra) is int and 0 <= extra <= _MOST_EXTRA else _T5_EXTRA[str(model_type)]
        backend = t5_tokenizer(files[_T5_PIECES], extra, f"{where}: {_T5_PIECES}")
        add_tokens_of_files(backend, files, where)
        return backend
    if data is None:
        older = [(name, "a sentencepiece model") for name in SENTENCEPIECE_NAMES if name in files]
        older += [("vocab.json", "an older tokenizer's")] if {"vocab.json", "merges.txt"} <= files.keys() else []
        for name, what in older:
            raise UnsupportedError(
                f"{where}: {name} is {what}, kbit reads tokenizer.json: convert it once with transformers: python -c "
                f'\'from transformers import AutoTokenizer as T; T.from_pretrained("{where}").save_pretrained'
                f'("{where}")\''
            )
        raise UnsupportedError(f"{where}: there is no tokenizer.json: copy it from the model's original repository")
    backend = load_backend(data, f"{where}: tokenizer.json")
    add_tokens_of_files(backend, files, where)
    return backend


def _has_byte_fallback(backend: TokenizerBackend) -> bool:
    decoder = backend.decoder
    if decoder is None:
        return False
    state = json.loads(decoder.__getstate__())
    parts = state.get("decoders", [state]) if isinstance(state, dict) else []
    return any(part.get("type") == "ByteFallback" for part in parts)


def _ids(value: object, key: str, where: str) -> list[int]:
    """Ids of a config entry that is null, one id or a list of ids; negative ones mean "none" and are dropped."""
    if value is None:
        return []
    ids = []
    for entry in value if isinstance(value, list) else [value]:
        if not isinstance(entry, int) or isinstance(entry, bool):
            raise CheckpointError(f"{where}: {key} is {one_line(value)}: expected a token id or a list of token ids")
        if entry >= 0:
            ids.append(entry)
    return ids


def _read_templates(files: Mapping[str, bytes], settings: Mapping[str, Any], where: str) -> dict[str, str]:
    """Chat templates by name. As in transformers, files of their own stand before tokenizer_config.json."""
    own = {"chat_template.jinja": "default"}
    own |= {name: PurePosixPath(name).stem for name in files if name.startswith(f"{TEMPLATES}/")}
    found = {}
    for file, called in own.items():
        if file in files:
            try:
                found[called] = files[file].decode("utf-8")
            except UnicodeDecodeError as error:
                raise CheckpointError(f"{where}: {file} is not UTF-8: {one_line(error)}") from None
    if found:
        return found
    value = settings.get("chat_template")
    if value is None:
        value = read_json(files, "chat_template.json", where).get("chat_template")
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, dict):
        value = [{"name": name, "template": template} for name, template in value.items()]
    templates = {}
    for entry in value if isinstance(value, list) else [value]:
        name = entry.get("name") if isinstance(entry, dict) else None
        template = entry.get("template") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not isinstance(template, str):
            raise CheckpointError(f"{where}: chat_template is neither text nor a list of named templates")
        templates[name] = template
    return templates
