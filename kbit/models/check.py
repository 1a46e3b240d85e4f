"""Does a checkpoint hold the model its configuration describes? Asked of headers first, before anything is read.

Without torch, so that planning and `kbit info` stay quick; only comparing a tied head with the embedding reads data.
"""

from __future__ import annotations

from collections.abc import Collection

from kbit.checkpoint.compare import same_values
from kbit.checkpoint.source import CheckpointSource
from kbit.checkpoint.surplus import harmless
from kbit.host.errors import CheckpointError, UnsupportedError
from kbit.models.canonical import check_canonical
from kbit.models.config_values import shown
from kbit.models.spec import ModelSpec


def check_tensors(
    source: CheckpointSource, spec: ModelSpec, *, read_data: bool = True, ignored: Collection[str] = ()
) -> None:
    """Raise unless the checkpoint holds exactly what the spec needs.

    Surplus tensors that a rule of `kbit.checkpoint.surplus` names are left out. A tied head that is stored again must
    equal the embedding (of a Hugging Face folder the reader has seen to that); only then is data read.

    Args:
        source: the checkpoint.
        spec: of its configuration.
        ignored: names of tensors that may be there, too.
        read_data: False leaves the values of such a head unchecked.

    Raises:
        CheckpointError: a missing, misshapen or surplus tensor, or a tied head that differs from the embedding; a
            checkpoint that was not opened as canonical tensors (`kbit.models.canonical`).
    """
    check_canonical(source)
    where, expected = str(source.path), spec.expected_tensors()
    embedding, head = f"{spec.names.embedding}.weight", f"{spec.names.head}.weight"
    missing = [name for name in expected if name not in source.tensors]
    if missing:
        raise CheckpointError(
            f"{where}: {_some(missing)} missing: the checkpoint is incomplete, or its config.json is another model's"
        )
    for name, shape in expected.items():
        found = tuple(source.tensors[name].shape)
        if found != shape:
            raise CheckpointError(f"{where}: {name} has shape {found}, but config.json asks for {shape}")
    surplus = [name for name, info in source.tensors.items() if name not in expected and harmless(info) is None]
    stored_again = spec.tied_embeddings and head in surplus
    if stored_again:
        surplus.remove(head)
    surplus = [name for name in surplus if name not in ignored]
    if surplus:
        raise CheckpointError(
            f"{where}: {_some(surplus)} not part of a {spec.family} model as config.json describes it; leaving them "
            "out would change the model, so correct config.json or the checkpoint"
        )
    if stored_again and not (
        source.tensors[head].shape == source.tensors[embedding].shape
        and (not read_data or same_values(source, embedding, head))
    ):
        raise CheckpointError(
            f"{where}: tie_word_embeddings is true, but {head} differs from {embedding}: set tie_word_embeddings "
            f"to false to use {head}, or remove it from the checkpoint"
        )


def check_continues(spec: ModelSpec, where: str) -> None:
    """Raise where a model predicts no next token.

    Raises:
        UnsupportedError: naming the commands that run it.
    """
    if spec.task is not None:
        commands = {"mask": "fill or embed", "sequence": "classify", "tokens": "classify", "span": "answer"}
        raise UnsupportedError(
            f"{where}: this {spec.family} model predicts no next token, so it cannot go on with a text or be measured "
            f"by that; use kbit {commands.get(spec.task.kind, 'embed')}"
        )


def _some(names: list[str]) -> str:
    """Up to three names, for a message."""
    listed = ", ".join(name if name.isprintable() and len(name) < 120 else shown(name) for name in names[:3])
    if len(names) == 1:
        return f"1 tensor ({listed}) is"
    return f"{len(names)} tensors ({listed}{', ...' if len(names) > 3 else ''}) are"
