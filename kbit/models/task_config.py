"""What a configuration says of an encoder: its tables of positions and types, and the head on its hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kbit.host.errors import CheckpointError
from kbit.host.notes import note
from kbit.models.config_values import ConfigValues, shown
from kbit.models.task_heads import TaskHead

if TYPE_CHECKING:
    from kbit.models.family import Family

_MAX_LABELS = 1 << 20
_MAX_TYPES = 1 << 16
_PROBLEMS = {
    "single_label_classification": "single",
    "multi_label_classification": "multi",
    "regression": "regression",
}


@dataclass(frozen=True)
class PositionTable:
    """Rows of a table of positions (0: none), and which is position 0."""

    rows: int
    first: int


def position_table(family: Family, values: ConfigValues, max_positions: int) -> PositionTable:
    """The table of positions of a family that has one.

    Raises:
        CheckpointError: max_position_embeddings leaves no position.
    """
    if family.names.positions is None and family.sinusoids is None:
        return PositionTable(0, 0)
    first = family.first_position
    if first == "pad":
        first = values.integer("pad_token_id", 0, max_positions) + 1
    if first >= max_positions:
        raise values.error("max_position_embeddings", f"more than {first}, the row of the first token")
    return PositionTable(max_positions + family.extra_positions, first)


def token_types(family: Family, values: ConfigValues) -> int:
    """Rows of the table of token types, 0 where the family has none."""
    return 0 if family.names.types is None else values.integer("type_vocab_size", 1, _MAX_TYPES)


def read_task(family: Family, values: ConfigValues, activations: Mapping[str, str], norm_bias: bool) -> TaskHead | None:
    """The head that `architectures` names, or the family's own.

    Args:
        family: the model's.
        values: its configuration.
        activations: names of activations.
        norm_bias: whether the model's norms have biases.

    Raises:
        CheckpointError: a senseless value.
    """
    named = values.values.get("architectures") or ()
    task = next((family.heads[name] for name in named if name in family.heads), family.task)
    if task is None or task.kind == "hidden":
        return task
    if task.activation == "config":
        key = "classifier_activation" if "classifier_activation" in family.defaults else family.activation
        task = replace(task, activation=values.choice(key, {**activations, **family.activations}))
    if "classifier_bias" in family.defaults:
        task = replace(task, dense_bias=values.boolean("classifier_bias"), norm_bias=norm_bias)
    if task.kind == "mask":
        if "decoder_bias" in family.defaults and not values.boolean("decoder_bias"):
            return replace(task, out_bias=None)
        # (A matrix of its own has a bias of its own, and the one beside it is read by nothing.)
        tied = values.boolean("tie_word_embeddings")
        return task if tied else replace(task, out_bias=f"{family.names.head}.bias")
    if "classifier_pooling" in family.defaults and task.kind == "sequence":
        mean = values.choice("classifier_pooling", {"cls": "cls", "mean": "mean"}) == "mean"
        task = replace(task, pooling="mean" if mean else "cls")
    labels = 2 if task.kind == "span" else len(labels_of(values.values, values.where))
    named = values.raw("id2label")
    if isinstance(named, Mapping) and len(named) != labels and task.kind != "span":
        note(f"{values.where}: num_labels is {labels}, but id2label names {len(named)}: they are called LABEL_0, ...")
    return replace(task, labels=labels, problem=_problem(values, labels) if task.kind == "sequence" else "single")


def labels_of(config: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The names of a classifier's labels, in the order of its outputs (`id2label`; LABEL_0, ... where it has none).

    Where `num_labels` is another number, that counts, as in transformers: its old versions wrote the two default labels
    beside it.

    Raises:
        CheckpointError: id2label does not name every label once; num_labels is senseless.
    """
    values = ConfigValues(config, {"num_labels": 2}, where)
    named = values.raw("id2label")
    if named is None:
        return tuple(f"LABEL_{index}" for index in range(values.integer("num_labels", 1, _MAX_LABELS)))
    if not isinstance(named, Mapping) or set(named) != {str(index) for index in range(len(named))} or not named:
        raise CheckpointError(f'{where}: id2label is {shown(named)}; it should name the labels "0", "1", ...')
    if config.get("num_labels") not in (None, len(named)):
        count = values.integer("num_labels", 1, _MAX_LABELS)
        return tuple(f"LABEL_{index}" for index in range(count))
    return tuple(str(named[str(index)]) for index in range(len(named)))


def _problem(values: ConfigValues, labels: int) -> Any:
    """What labels mean; where nothing says it, one label holds or not (as of rerankers), and of several one does: as in
    transformers' pipelines."""
    if values.raw("problem_type") is None:
        return "multi" if labels == 1 else "single"
    return values.choice("problem_type", _PROBLEMS)
