"""The tensors of a GGUF file that a model is written to: their names and shapes, and which canonical ones they hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kbit.checkpoint.gguf.config import expected_of_layer
from kbit.checkpoint.gguf.experts import expert_rows
from kbit.checkpoint.gguf.metadata import GGUFTensor
from kbit.checkpoint.gguf.names import Architecture, Dimensions, canonical_names, part_of
from kbit.checkpoint.gguf.t5 import T5
from kbit.checkpoint.gguf.types import GGML_TYPES
from kbit.checkpoint.gguf.writing import NewTensor
from kbit.host.errors import UnsupportedError
from kbit.models.gguf_arranged import Arranged, arranged
from kbit.models.gguf_encoders import encoder_tensors
from kbit.models.gguf_metadata import bias_parts
from kbit.models.spec import ModelSpec

if TYPE_CHECKING:
    from kbit.checkpoint.gguf.writing import Value


@dataclass(frozen=True)
class Entry:
    """A tensor of the file.

    Attributes:
        tensor: its name, shape and type.
        parts: canonical tensors whose rows (or which, of experts) it holds, in order.
        head, turned: rows of a head whose pairs are to lie side by side, and how many do; 0: rows stay in order.
        rounds: to the type.
        arranged: where its parts are in it, if not one after another.
    """

    tensor: NewTensor
    parts: tuple[str, ...]
    head: int = 0
    turned: int = 0
    rounds: bool = False
    arranged: Arranged | None = None


def entries_of(spec: ModelSpec, arch: Architecture, metadata: Mapping[str, Value], where: str) -> Iterator[Entry]:
    """The tensors of a file, all as float32.

    Args:
        spec: the model.
        arch: what it is written as.
        metadata: of the file.
        where: the model, for errors.

    Raises:
        UnsupportedError: a tensor that the model has and the file has no place for, or the other way round.
    """
    if arch.encoder or arch is T5:
        return _encoder_entries(spec, arch, where)
    plain = arch.special is None and not arch.latent and arch.delta is None
    return _entries(spec, arch, where) if plain else _arranged_entries(spec, arch, metadata, where)


def _entries(spec: ModelSpec, arch: Architecture, where: str) -> Iterator[Entry]:
    """The tensors of the file, without their types."""
    dims = Dimensions(
        spec.hidden_size, spec.intermediate_size, spec.heads, spec.kv_heads, spec.head_dim, spec.vocab_size
    )
    biases = bias_parts(spec)
    experts = _expert_sizes(spec, arch, where)
    shapes = dims.expected_global(arch, spec.tied_embeddings, spec.position_rows)
    for layer in range(spec.layers):
        shapes |= expected_of_layer(arch, dims, layer, biases, experts)
    declared = spec.expected_tensors()
    for name, shape in shapes.items():
        stored = GGUFTensor(name, shape, GGML_TYPES[0], 0, 0)
        rows = [] if arch.experts is None else expert_rows(arch.experts, name, stored)
        parts = tuple(each for each, _ in rows) or tuple(canonical_names(arch, name))
        unknown = [part for part in parts if part not in declared]
        if unknown:
            raise UnsupportedError(_lacks(where, arch, unknown[0], spec))
        permuted = arch.interleaved and part_of(name) in ("attn_q", "attn_k")
        head, turned = (spec.head_dim, spec.rope.dim) if permuted else (0, 0)
        yield Entry(NewTensor(name, shape, "F32"), parts, head, turned)


def _encoder_entries(spec: ModelSpec, arch: Architecture, where: str) -> Iterator[Entry]:
    declared = spec.expected_tensors()
    left = set(declared)
    for name, shape, parts in encoder_tensors(spec, arch):
        left -= set(parts)
        unknown = [part for part in parts if part not in declared]
        if unknown:
            raise UnsupportedError(_lacks(where, arch, unknown[0], spec))
        yield Entry(NewTensor(name, shape, "F32"), parts)
    if left:
        raise UnsupportedError(
            f"{where}: GGUF files of the {arch.name} architecture have no place for {min(left)}; export plain floats "
            "with --to safetensors"
        )


def _lacks(where: str, arch: Architecture, name: str, spec: ModelSpec) -> str:
    return (
        f"{where}: GGUF files of the {arch.name} architecture have {name}, which this {spec.family} model has not; "
        "export plain floats with --to safetensors"
    )


def _arranged_entries(
    spec: ModelSpec, arch: Architecture, metadata: Mapping[str, Value], where: str
) -> Iterator[Entry]:
    """The tensors of a file that has more of them than canonical ones one after another."""
    for each in arranged(spec, arch, metadata, where):
        parts = tuple(held.piece.name for held in each.held)
        yield Entry(NewTensor(each.name, each.shape, "F32"), parts, arranged=None if each.plain else each)


def _expert_sizes(spec: ModelSpec, arch: Architecture, where: str) -> dict[str, Any]:
    """What `expected_experts` asks of a configuration."""
    experts, tensors = spec.experts, arch.experts
    if experts is None or tensors is None:
        return {}
    dense = experts.layers.count(False)
    if any(experts.layers[:dense]) or (dense and not tensors.leading):
        raise UnsupportedError(
            f"{where}: GGUF files of the {arch.name} architecture have experts in "
            f"{'all layers but the first' if tensors.leading else 'all layers'}; export plain floats with --to "
            "safetensors"
        )
    found = {tensors.count: experts.routing.experts, tensors.width: experts.width, "first_k_dense_replace": dense}
    if tensors.shared_width is not None or tensors.switch is not None:
        return {**found, tensors.shared_width or "shared_expert_intermediate_size": experts.shared_width}
    return {**found, "n_shared_experts": experts.shared_width // experts.width}
