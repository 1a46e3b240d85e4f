"""Does a checkpoint hold the model its configuration describes? Asked of headers first, before anything is read.

Without torch, so that planning and `kbit info` stay quick; only comparing a tied head with the embedding reads data.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from kbit.checkpoint.compare import same_values
from kbit.checkpoint.source import CheckpointSource
from kbit.checkpoint.surplus import harmless
from kbit.host.errors import CheckpointError, UnsupportedError
from kbit.models.canonical import check_canonical
from kbit.models.config_values import shown
from kbit.models.spec import ModelSpec
from kbit.models.task_heads import HIDDEN


class NeedsSourceError(UnsupportedError):
    """An encoder-decoder, where a text is to be gone on with."""


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
    copies = {f"{name}.weight" for name in spec.names.copies} & set(surplus)
    ignored = {*ignored, *copies, *_optional(source, spec)}
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

    for copy in sorted(copies):
        if source.tensors[copy].shape != source.tensors[embedding].shape or (
            read_data and not same_values(source, embedding, copy)
        ):
            raise CheckpointError(
                f"{where}: {copy} differs from {embedding}, which a {spec.family} model shares between encoder and "
                "decoder: remove it from the checkpoint, or get the published one"
            )


def stored_spec(source: CheckpointSource, spec: ModelSpec) -> ModelSpec:
    """A model as it is stored: without the head on its hidden states that its configuration names, where the checkpoint
    lacks some of it, as all-mpnet-base-v2 does."""
    whole = spec.encoder is not None or spec.expected_tensors().keys() <= source.tensors.keys()
    if whole:
        return spec
    headless = replace(spec, task=HIDDEN)
    return headless if headless.expected_tensors().keys() <= source.tensors.keys() else spec


def _optional(source: CheckpointSource, spec: ModelSpec) -> set[str]:
    """Tensors that an encoder-decoder may have: what is added to its logits, and copies of computed tables.

    Raises:
        CheckpointError: what is added to logits has another shape.
    """
    stacks = [stack for stack in (spec, spec.encoder) if stack is not None and stack.sinusoids is not None]
    found = {f"{stack.names.positions}.weight" for stack in stacks}
    bias = spec.names.logit_bias
    if bias is None:
        return found
    shape = source.tensors[bias].shape if bias in source.tensors else None
    if shape not in (None, (1, spec.vocab_size), (spec.vocab_size,)):
        raise CheckpointError(
            f"{source.path}: {bias} has shape {shape}, but config.json asks for (1, {spec.vocab_size})"
        )
    return {*found, bias}


def check_continues(spec: ModelSpec, where: str, instead: str | None = None) -> None:
    """Raise where a model predicts no next token.

    Args:
        spec: what it is.
        where: it is.
        instead: what to do with such models, where that is not to run or measure them.

    Raises:
        UnsupportedError: naming the commands that run it; NeedsSourceError of an encoder-decoder.
    """
    if instead is not None and (spec.encoder is not None or spec.task is not None):
        raise UnsupportedError(f"{where}: a {spec.family} model does not go on with texts; {instead}")
    if spec.encoder is not None:
        raise NeedsSourceError(
            f"{where}: a {spec.family} model writes a text that belongs to another one, and goes on with none: use "
            "kbit translate, kbit summarize or kbit run, and kbit eval --data PAIRS.tsv"
        )
    if spec.task is not None:
        embedding = "embed, and kbit eval --tasks stsb"
        commands = {"mask": f"fill or {embedding}", "sequence": "classify", "tokens": "classify", "span": "answer"}
        raise UnsupportedError(
            f"{where}: this {spec.family} model predicts no next token, so it cannot go on with a text or be measured "
            f"by that; use kbit {commands.get(spec.task.kind, embedding)}"
        )


def _some(names: list[str]) -> str:
    """Up to three names, for a message."""
    listed = ", ".join(name if name.isprintable() and len(name) < 120 else shown(name) for name in names[:3])
    if len(names) == 1:
        return f"1 tensor ({listed}) is"
    return f"{len(names)} tensors ({listed}{', ...' if len(names) > 3 else ''}) are"
