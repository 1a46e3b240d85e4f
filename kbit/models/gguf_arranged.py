"""Tensors of a GGUF file in which canonical ones do not lie one after another: reading them, the other way round.

Where canonical tensors lie in the file's is asked of the reader (`kbit.checkpoint.gguf.locating`), for tensors whose
shapes it expects by the metadata that is to be written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kbit.checkpoint.gguf.config import expected_of_layer
from kbit.checkpoint.gguf.delta_nets import delta_config
from kbit.checkpoint.gguf.experts import expert_config
from kbit.checkpoint.gguf.header import parse_header
from kbit.checkpoint.gguf.keys import Keys
from kbit.checkpoint.gguf.latent import latent_config
from kbit.checkpoint.gguf.locating import located
from kbit.checkpoint.gguf.metadata import GGUFHeader, GGUFTensor
from kbit.checkpoint.gguf.names import Architecture, Dimensions
from kbit.checkpoint.gguf.reading import Located
from kbit.checkpoint.gguf.types import GGML_TYPES
from kbit.checkpoint.gguf.writing import header_bytes
from kbit.host.errors import UnsupportedError
from kbit.models.gguf_metadata import bias_parts
from kbit.models.spec import ModelSpec

if TYPE_CHECKING:
    from kbit.checkpoint.gguf.writing import Value

_F32 = 4  # bytes, of which places are counted in


@dataclass(frozen=True)
class Arranged:
    """A tensor of the file.

    Attributes:
        name, shape: there.
        held: the canonical tensors in it, and where, as if it were float32 and began the file.
    """

    name: str
    shape: tuple[int, ...]
    held: tuple[Located, ...]

    @property
    def moves(self) -> bool:
        """Whether more than rows are moved, so that codes do not stay what they are."""
        return any(each.transposed or each.piece.decays for each in self.held)

    @property
    def plain(self) -> bool:
        """Whether it is canonical tensors one after another."""
        at = 0
        for each in self.held:
            piece = each.piece
            moved = each.head_dim or piece.rows is not None or piece.columns is not None
            if moved or each.transposed or piece.decays or piece.tensor.offset != at:
                return False
            at += piece.tensor.nbytes
        return True

    @property
    def columns(self) -> int:
        """Of a row; 1 of a vector."""
        return 1 if len(self.shape) == 1 else self.shape[-1]

    def put(self, out: NDArray[Any], each: Located, rows: NDArray[Any]) -> None:
        """Put a canonical tensor in its place.

        Args:
            out: the file's tensor, (rows, columns), where a column may be a block of values.
            each: one of `held`.
            rows: what it holds, (rows, columns).
        """
        count, first = len(rows), each.tensor.offset // (_F32 * self.columns)
        if each.transposed:
            heads, columns, within = each.tensor.shape
            lying = rows.reshape(heads, within, columns).swapaxes(1, 2)
            out[:] = lying.reshape(out.shape)
            return
        if each.piece.decays:
            rows = -np.exp(rows)
        if each.head_dim:
            rows = _side_by_side(rows, each)
        order, columns_order = each.piece.rows, each.piece.columns
        places = np.arange(count) if order is None else order.places(count)
        if columns_order is not None:
            block = self.columns // out.shape[1]
            at = columns_order.places(self.columns)[::block] // block
            moved = np.empty_like(rows)
            moved[:, at] = rows
            rows = moved
        out[first + places] = rows


def _side_by_side(rows: NDArray[Any], each: Located) -> NDArray[Any]:
    """Canonical rows of whole heads as the file has them: what turns after what does not, its pairs side by side."""
    heads = rows.reshape(-1, each.head_dim, *rows.shape[1:])
    turned, half = heads[:, : each.rotated], each.rotated // 2
    pairs = turned[:, np.arange(each.rotated) // 2 + half * (np.arange(each.rotated) % 2)]
    others = heads[:, each.rotated :]
    parts = [others[:, : each.aside], pairs, others[:, each.aside :]]
    return np.ascontiguousarray(np.concatenate(parts, axis=1).reshape(rows.shape))


def arranged(spec: ModelSpec, arch: Architecture, metadata: Mapping[str, Value], where: str) -> Iterator[Arranged]:
    """The tensors of a file, in order; arguments and errors as of `kbit.models.gguf_entries.entries_of`."""
    header = parse_header(header_bytes(metadata), Path(where))
    keys = Keys(header, arch)
    declared = spec.expected_tensors()
    shapes, config = _expected(spec, arch, keys, set(declared))
    lost = dict.fromkeys(declared)
    for name, shape in shapes.items():
        tensor = GGUFTensor(name, shape, GGML_TYPES[0], 0, _F32 * prod(shape))
        held = located(arch, config, name, tensor, header)
        unknown = [each.piece.name for each in held if each.piece.name not in declared]
        if unknown and arch.special is None:
            raise UnsupportedError(
                f"{where}: GGUF files of the {arch.name} architecture have {unknown[0]}, which this {spec.family} "
                "model has not; export plain floats with --to safetensors"
            )
        if unknown or not held:
            continue
        for each in held:
            lost.pop(each.piece.name, None)
        yield Arranged(name, shape, tuple(held))
    if lost:
        raise UnsupportedError(
            f"{where}: GGUF files of the {arch.name} architecture have no place for {next(iter(lost))}; export plain "
            "floats with --to safetensors"
        )


class _Held(dict[str, GGUFTensor]):
    """Tensors of a file, of which those are there that hold something of the model."""

    def __init__(self, arch: Architecture, config: Mapping[str, Any], header: GGUFHeader, names: set[str]) -> None:
        super().__init__()
        self._place, self._names = (arch, config, header), names

    def __contains__(self, name: object) -> bool:
        arch, config, header = self._place
        held = located(arch, config, str(name), GGUFTensor(str(name), (1, 1, 1), GGML_TYPES[0], 0, _F32), header)
        return bool(held) and all(each.piece.name in self._names for each in held)


def _expected(
    spec: ModelSpec, arch: Architecture, keys: Keys, declared: set[str]
) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """The tensors that a reader expects, with their shapes, and what it takes them apart by."""
    described: dict[str, Any] = {}
    if arch.experts is not None:
        described |= expert_config(keys, arch.experts)
    if arch.latent:
        described |= latent_config(keys)
    if arch.delta is not None:
        described |= delta_config(keys, spec.layers)
    each = [spec.shape(layer) for layer in range(spec.layers)]
    dims = [
        Dimensions(spec.hidden_size, one.width, spec.heads, one.kv_heads, one.head_dim, spec.vocab_size) for one in each
    ]
    biases = bias_parts(spec)
    shapes = dims[0].expected_global(arch, spec.tied_embeddings, spec.position_rows)
    for layer, sizes in enumerate(dims):
        shapes |= expected_of_layer(arch, sizes, layer, biases, described)
    config = {
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.intermediate_size,
        "partial_rotary_factor": spec.rope.dim / spec.head_dim,
        "num_kv_shared_layers": sum(one.source != layer for layer, one in enumerate(each)),
        **described,
    }
    if spec.scan is not None:
        config |= {"mamba_n_heads": spec.scan.heads, "mamba_d_head": spec.scan.value_dim}
        config |= {"mamba_n_groups": spec.scan.groups, "mamba_d_state": spec.scan.key_dim}
    if arch.special is not None:
        there = _Held(arch, config, keys.header, declared)
        shapes |= arch.special.more(keys, dims[0], spec.layers, there)
    return shapes, config
