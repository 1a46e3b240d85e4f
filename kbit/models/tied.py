"""Checkpoints of tied models that store their one matrix as the head: safetensors keeps a shared tensor once, under the
name that it comes to last."""

from __future__ import annotations

from kbit.checkpoint.source import CheckpointSource, StoredSource
from kbit.host.errors import KbitError
from kbit.host.notes import note
from kbit.models.families import spec_from_config
from kbit.models.renamed import RenamedSource


def embedded(source: CheckpointSource) -> CheckpointSource:
    """The checkpoint with that matrix as its embedding; itself, where it has one, or is not tied."""
    if source.config.get("tie_word_embeddings") is not True or not isinstance(source, StoredSource):
        return source
    try:
        names = spec_from_config(source.config, where=f"config of {source.path}").names
    except KbitError:
        return source  # who reads it says what is wrong
    head, embedding = f"{names.head}.weight", f"{names.embedding}.weight"
    # (Under a longer name, or without the model's prefix, the embedding is there too.)
    if head not in source.tensors or any(
        name.endswith(embedding) or embedding.endswith(f".{name}") for name in source.tensors
    ):
        return source
    note(f"{source.path}: {head} is stored and {embedding} is not; they are one matrix, as config.json says")
    kept = {name: name for name in source.tensors if name != head}
    return RenamedSource(source, {**kept, embedding: head})
