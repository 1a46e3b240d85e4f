"""A checkpoint's tokenizer as GGUF metadata (`kbit.checkpoint.gguf.tokenizer_out`), and whether it reads the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbit.checkpoint.gguf.tokenizer_out import check_same, tokenizer_metadata
from kbit.checkpoint.source import CheckpointSource
from kbit.host.notes import note
from kbit.text.added_tokens import token_settings, token_strings
from kbit.text.tokenizer import Tokenizer, has_library_tokenizer, library_tokenizer

if TYPE_CHECKING:
    import tokenizers

    from kbit.checkpoint.gguf.writing import Value


def tokenizer_keys(source: CheckpointSource, size: int, types: int = 0) -> dict[str, Value]:
    """Metadata keys of a checkpoint's tokenizer; of a checkpoint without one, what says so.

    Args:
        source: the checkpoint.
        size: tokens of the model's vocabulary.
        types: how many kinds of tokens the model tells apart.

    Raises:
        UnsupportedError: a tokenizer that the metadata cannot say.
        CheckpointError: a file is not what its name says.
    """
    files = source.sidecar_files()
    if not has_library_tokenizer(files, source.config.get("model_type")):
        note(f"{source.path}: there is no tokenizer.json, so the GGUF file has no tokenizer")
        return {"tokenizer.ggml.model": "none"}
    tokenizer, backend = Tokenizer.from_source(source, files), _backend(source)
    named = token_strings(token_settings(files, str(source.path)))
    own = backend.token_to_id(named["eos_token"]) if "eos_token" in named else None
    ends = sorted(tokenizer.eos_ids)
    return tokenizer_metadata(
        backend,
        size,
        str(source.path),
        bos=tokenizer.bos_id,
        eos=[index for index in dict.fromkeys([own, *ends]) if index is not None],
        pad=tokenizer.pad_id,
        unknown=backend.token_to_id(named["unk_token"]) if "unk_token" in named else None,
        templates=tokenizer.chat_templates,
        named=named,
        types=types,
    )


def check_tokenizer(source: CheckpointSource, written: CheckpointSource) -> None:
    """Raise where what was written reads as another tokenizer.

    Raises:
        UnsupportedError: it does.
    """
    if has_library_tokenizer(source.sidecar_files(), source.config.get("model_type")):
        check_same(_backend(source), _backend(written), str(source.path))


def _backend(source: CheckpointSource) -> tokenizers.Tokenizer:
    backend = library_tokenizer(source.sidecar_files(), str(source.path), source.config.get("model_type"))
    backend.no_truncation()
    backend.no_padding()
    return backend
