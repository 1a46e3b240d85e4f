"""What a conversion refuses before it begins: what kbit could not run afterwards."""

from __future__ import annotations

from kbit.checkpoint.source import CheckpointSource
from kbit.host.notes import note


def check_runnable(source: CheckpointSource) -> None:
    """Refuse now what kbit could not run after the conversion, and tell what is odd about its tokenizer.

    Raises:
        CheckpointError, UnsupportedError: tensors are missing or wrong, or no run could read the tokenizer.
    """
    from kbit.models.check import check_tensors
    from kbit.models.families import spec_from_config

    spec = spec_from_config(source.config, where=f"config of {source.path}")
    check_tensors(source, spec)
    _check_tokenizer(source, spec.vocab_size)


def _check_tokenizer(source: CheckpointSource, vocabulary: int) -> None:
    """The files that are copied: refuse those that no run could read, and tell what is odd about others."""
    from kbit.text.tokenizer import Tokenizer

    files = source.sidecar_files()
    if "tokenizer.json" not in files:
        note(f"{source.path}: there is no tokenizer.json, so kbit can convert this model, but not run it on text")
        return
    tokens = Tokenizer.from_source(source, files).vocab_size
    if tokens > vocabulary:
        note(
            f"{source.path}: the tokenizer has {tokens:,} tokens, the model {vocabulary:,}: a text with one of the "
            "others will be refused"
        )
