"""What each matrix of a model weighs, how far its codes are from the weights, and how much that hurts: one row a
matrix."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from kbit.host.errors import UsageError

if TYPE_CHECKING:
    import torch

    from kbit.checkpoint.source import CheckpointSource
    from kbit.evaluate.sensitivity import Sensitivity
    from kbit.formats.codec import Codec

# The first number between dots in a name is the layer: "model.layers.11.mlp.up_proj.weight".
_LAYER = re.compile(r"^(?P<before>.*?)\.(?P<layer>[0-9]+)\.(?P<kind>.+?)(?:\.weight)?$")
# How matrices follow each other in a layer, by parts of their names.
_ORDER = ("q_proj", "k_proj", "v_proj", "qkv", "o_proj", "gate_proj", "gate_up", "up_proj", "down_proj")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class MatrixRow:
    """One linear matrix.

    Attributes:
        name: as the checkpoint names it.
        layer: index of its layer.
        kind: its place in the layer, such as "self_attn.q_proj".
        shape: (N out, K in).
        stored_as: how the file holds it.
        bits_per_weight: as stored, scales included.
        errors: squared error relative to the squared weights, by format.
        kl_per_error: KL divergence in nats per token for each unit of relative squared error
            (kbit.evaluate.sensitivity), or None where it was not measured.
        kl_per_error_stderr: its standard error.
    """

    name: str
    layer: int
    kind: str
    shape: tuple[int, int]
    stored_as: str
    bits_per_weight: float
    errors: dict[str, float] = field(default_factory=dict)
    kl_per_error: float | None = None
    kl_per_error_stderr: float | None = None

    def damage(self, format: str) -> float | None:
        """KL divergence in nats per token that this matrix's error alone causes, predicted; None where not known."""
        error = self.errors.get(format)
        return None if error is None or self.kl_per_error is None else self.kl_per_error * error

    def to_dict(self) -> dict[str, Any]:
        """For JSON, predicted damage included."""
        return {**asdict(self), "kl_predicted": {format: self.damage(format) for format in self.errors}}


@dataclass(frozen=True)
class LayerTable:
    """All linear matrices of a model.

    Attributes:
        model: its name: text from outside.
        rows: by layer, then in the file's order.
        formats: those tried, or the one stored; the keys of every row's `errors`.
        against: what errors are measured against, for people.
        text: what the sensitivities were measured on, for people; None where they were not.
    """

    model: str
    rows: tuple[MatrixRow, ...]
    formats: tuple[str, ...]
    against: str
    text: str | None

    @property
    def layers(self) -> list[int]:
        """Layers, rising."""
        return sorted({row.layer for row in self.rows})

    @property
    def kinds(self) -> list[str]:
        """Places in a layer, in the order in which a layer uses them; those unheard of come last, as in the file."""
        kinds = dict.fromkeys(row.kind for row in self.rows)

        def place(kind: str) -> int:
            return next((index for index, part in enumerate(_ORDER) if part in kind), len(_ORDER))

        return sorted(kinds, key=place)

    def total_damage(self, format: str) -> float | None:
        """The predicted KL divergence of the whole model: the sum over matrices; None where not all are known."""
        parts = [row.damage(format) for row in self.rows]
        known = [part for part in parts if part is not None]
        return sum(known) if known and len(known) == len(parts) else None


def linear_rows(source: CheckpointSource) -> list[MatrixRow]:
    """The linear matrices of a checkpoint from its headers alone, without errors and sensitivities.

    Raises:
        UsageError: it has none inside numbered layers.
    """
    from kbit.quantizers.roles import roles_of

    rows, roles = [], roles_of(source)
    for info in source.tensors.values():
        match = _LAYER.match(info.name)
        if match is not None and roles[info.name] == "linear" and info.numel:
            rows.append(
                MatrixRow(
                    info.name,
                    int(match["layer"]),
                    match["kind"],
                    (info.shape[0], info.shape[1]),
                    info.stored_as,
                    8 * info.nbytes / info.numel,
                )
            )
    if not rows:
        raise UsageError(
            f"{source.path}: has no matrices in numbered layers to draw; kbit info --tensors lists its tensors"
        )
    return sorted(rows, key=lambda row: row.layer)


def measure_errors(
    source: CheckpointSource,
    rows: Sequence[MatrixRow],
    formats: Sequence[Codec],
    reference: CheckpointSource | None = None,
    progress: Progress | None = None,
) -> list[MatrixRow]:
    """The rows with errors: of formats tried on the weights, or of what is stored against a reference's weights.

    Args:
        formats: to try, rounding to nearest; ignored with a reference.
        reference: the model that `source` was made of; then the one entry of `errors` is named "stored".

    Raises:
        UsageError: a matrix that the reference lacks, or has in another shape.
        KbitError: weights that cannot be read, or are NaN or infinite.
    """
    done = []
    for index, row in enumerate(rows):
        weight = source.read(row.name)
        if reference is None:
            errors = {str(format): _error(_rounded(weight, row, format), weight) for format in formats}
        else:
            other = reference.tensors.get(row.name)
            if other is None or tuple(other.shape) != row.shape:
                shape = "not there" if other is None else f"{tuple(other.shape)}"
                raise UsageError(
                    f"{row.name} is {row.shape} in {source.path}, but {shape} in {reference.path}: give the model that "
                    "it was made of to --reference"
                )
            errors = {"stored": _error(weight, reference.read(row.name))}
        done.append(replace(row, errors=errors))
        if progress is not None:
            progress(index + 1, len(rows))
    return done


def with_sensitivity(rows: Sequence[MatrixRow], found: Sequence[Sensitivity]) -> list[MatrixRow]:
    """The rows with what kbit.evaluate.sensitivity measured; rows that it does not know stay as they are."""
    by_name = {entry.name: entry for entry in found}
    return [
        row
        if row.name not in by_name
        else replace(row, kl_per_error=by_name[row.name].kl_per_error, kl_per_error_stderr=by_name[row.name].stderr)
        for row in rows
    ]


def _rounded(weight: torch.Tensor, row: MatrixRow, format: Codec) -> torch.Tensor:
    """What a format's codes stand for."""
    return format.encode(lambda start, stop: weight[start:stop], row.shape, name=row.name).dequantize()


def _error(ours: torch.Tensor, weight: torch.Tensor) -> float:
    """||ours - weight||^2 / ||weight||^2; 0 for a matrix of zeros kept as it is."""
    square = float(weight.double().square().sum())
    difference = float((ours.double() - weight.double()).square().sum())
    return difference / square if square else (0.0 if difference == 0 else float("inf"))
