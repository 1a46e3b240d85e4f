"""Canonical tensors: one matrix a linear, rows in rotate-half order, norm weights as they multiply.

Families publish otherwise (`Layout`): q, k and v in one matrix, pairs of rotated features side by side, norms as what
is added to 1. Such a checkpoint is read through a `CanonicalSource`, and nothing above it knows. `kbit quantize` writes
what it reads: canonical tensors, with MARK in the configuration, so that they are not converted again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from kbit.checkpoint.shard import stored_format
from kbit.checkpoint.source import CANONICAL as MARK
from kbit.checkpoint.source import CheckpointSource, PackedStacks, StoredSource, TensorInfo
from kbit.host.errors import CheckpointError, KbitError, UnsupportedError
from kbit.models.canonical_pieces import Piece, pieces_of
from kbit.models.families import FAMILIES, spec_from_config
from kbit.models.family import family_of
from kbit.models.layout import Layout
from kbit.models.params import parameters
from kbit.models.renamed import RenamedSource, renamed
from kbit.models.spec import ModelSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kbit.formats.quant_format import QuantFormat
    from kbit.formats.stored import AnyStored, StoredMatrix


def canonical(source: CheckpointSource) -> CheckpointSource:
    """A checkpoint as canonical tensors: itself, where its tensors are.

    A configuration that describes no model that kbit runs is left to whoever reads it, and complains.

    Raises:
        CheckpointError: a fused tensor of another shape than its parts make up.
    """
    try:
        family = family_of(FAMILIES, source.config, f"config of {source.path}")
        renames = bool(family.layout.prefix or family.layout.renamed or family.layout.unused)
        if not family.layout.changes and not renames:
            return source
        spec = spec_from_config(source.config, where=f"config of {source.path}")
    except KbitError:
        return source
    if renames and isinstance(source, StoredSource):
        source = renamed(source, family.layout, _stored_names(spec, family.layout))
    if not family.layout.changes or source.config.get(MARK) is True:
        return source
    if not isinstance(source, StoredSource):
        raise UnsupportedError(
            f"{source.path}: a {family.model_type} model is read from files, and canonical elsewhere"
        )
    return CanonicalSource(source, spec, family.layout)


def origin(source: CheckpointSource, name: str) -> str:
    """The published tensor that a tensor of `canonical` is, or is a part of."""
    if isinstance(source, CanonicalSource):
        return source.origin(name)
    return source.origin(name) if isinstance(source, RenamedSource) else name


def _stored_names(spec: ModelSpec, layout: Layout) -> set[str]:
    """Names of a model's tensors, and of those that are published for several of them."""
    templates = (*layout.fused, *layout.grouped)
    fused = {template.format(layer=layer) for template in templates for layer in range(spec.layers)}
    stacks = {template.format(layer=layer) for template in layout.stacked for layer in range(spec.layers)}
    return {*spec.expected_tensors(), *stacks, *(f"{name}.{end}" for name in fused for end in ("weight", "bias"))}


def check_canonical(source: CheckpointSource) -> None:
    """Raise where a checkpoint's tensors are still as they were published, though its family's differ.

    Raises:
        CheckpointError: they are, and would be taken for others.
    """
    family = family_of(FAMILIES, source.config, f"config of {source.path}")
    if family.layout.changes and source.config.get(MARK) is not True:
        raise CheckpointError(
            f"{source.path}: {MARK} is not set, so the tensors are as {family.model_type} models are published; open "
            "the checkpoint with kbit.models.opening.open_model"
        )


class CanonicalSource(StoredSource):
    """A published checkpoint as canonical tensors. Closes what it reads from.

    Args:
        source: the published one.
        spec: the model.
        layout: its family's.

    Raises:
        CheckpointError: a fused tensor of another shape than its parts make up.
    """

    def __init__(self, source: StoredSource, spec: ModelSpec, layout: Layout) -> None:
        self.path = source.path
        self.config = {**source.config, MARK: True}
        self._source = source
        self._layout = layout
        self._pieces = pieces_of(source, spec, layout)
        norms = [p for p in parameters(spec) if p.role == "norm" and p.name not in source.tensors]
        self._ones = {p.name: p.shape for p in norms} if layout.plain_norms else {}
        self._left_out = (*_further_layers(source, spec, layout), *_keys_not_read(source, spec))
        self._infos = self._described(spec)

    def _described(self, spec: ModelSpec) -> dict[str, TensorInfo]:
        shapes, infos = spec.expected_tensors(), dict(self._source.tensors)
        for left_out in (*(piece.stored for piece in self._pieces.values()), *self._left_out):
            infos.pop(left_out, None)
        for name, piece in self._pieces.items():
            info = self._source.tensors[piece.stored]
            alone = piece.stored == name and piece.places is None and not piece.run
            shape = info.shape if alone else (shapes[name][0], *info.shape[1:])
            if piece.expert is not None or piece.flat:
                shape = shapes[name] if piece.expert is not None else _flat(info.shape, len(shapes[name]))
            elif piece.transposed and len(info.shape) == 2:
                shape = (info.shape[1] if piece.stored == name else shapes[name][0], info.shape[0])
            made = replace(info, name=name, shape=shape)
            if piece.format is not None:
                made = replace(made, stored_as=piece.format)
            if piece.offset:
                infos[name] = replace(made, stored_as="F32", nbytes=4 * made.numel)
            else:
                infos[name] = replace(made, nbytes=-(-info.nbytes * made.numel // max(1, info.numel)))
        ones = {name: TensorInfo(name, shape, "F32", 0, self.path) for name, shape in self._ones.items()}
        return {**infos, **ones}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read_array_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        import numpy as np

        if name in self._ones:
            return np.ones(stop - start, dtype=np.float32)
        piece = self._pieces.get(name)
        if piece is None:
            return self._source.read_array_rows(name, start, stop)
        if piece.expert is not None:
            whole = self._source.read_array_rows(piece.stored, piece.expert, piece.expert + 1)[0]
            rows = whole.T if piece.transposed else whole
            found: NDArray[np.float32] = rows[piece.first + piece.step * start :: piece.step][: stop - start]
            return np.ascontiguousarray(found)
        if piece.transposed:
            columns = self._source.tensors[piece.stored].shape[0]
            matrix = self._source.read_array_rows(piece.stored, 0, columns)
            return np.ascontiguousarray(matrix[:, piece.first + start : piece.first + stop].T)
        if piece.flat:
            if len(self._infos[name].shape) == 1:
                row = self._source.read_array_rows(piece.stored, 0, 1)
                return np.ascontiguousarray(row.reshape(-1)[start:stop])
            rows_read = self._source.read_array_rows(piece.stored, start, stop)
            return np.ascontiguousarray(rows_read.reshape(stop - start, -1))
        if piece.scattered and start < stop:
            # All that lies between the first and the last.
            places = piece.rows(start, stop)
            first, last = int(places.min()), int(places.max())
            values = self._source.read_array_rows(piece.stored, first, last + 1)
            return np.ascontiguousarray(values[places - first])
        values = self._source.read_array_rows(piece.stored, piece.first + start, piece.first + stop)
        return values + np.float32(piece.offset) if piece.offset else values

    def read_stored(self, name: str) -> AnyStored:
        if name not in self._pieces and name not in self._ones:
            return self._source.read_stored(name)
        from kbit.formats.quant_format import QuantFormat
        from kbit.formats.stored import KINDS, DenseMatrix, StoredMatrix, narrowed

        if name in self._ones:
            return DenseMatrix(self.read_array_rows(name, 0, self._ones[name][0]), "fp32")
        info, piece = self._infos[name], self._pieces[name]
        if piece.format is not None:
            return self._packed(name, piece)
        if stored_format(info) is not None:
            by_row = piece.expert is None and not piece.transposed and not piece.offset
            whole = self._source.read_stored(piece.stored) if by_row else None
            if isinstance(whole, StoredMatrix) and isinstance(whole.format, QuantFormat):
                rows = _of_rows(whole, whole.format, piece.rows(0, info.shape[0]))
                if rows is not None:
                    return rows
            raise UnsupportedError(
                f"{self.path}: {name} is part of {self._pieces[name].stored}, which is packed ({info.stored_as}); kbit "
                "takes such tensors apart only where they are not: convert the original 16-bit checkpoint"
            )
        values, kind = self.read_array_rows(name, 0, info.shape[0]), KINDS.get(info.stored_as, "fp32")
        return DenseMatrix(narrowed(values, kind), kind)

    def _packed(self, name: str, piece: Piece) -> StoredMatrix:
        """Some rows of one of several packed matrices."""
        import numpy as np

        assert isinstance(self._source, PackedStacks)
        assert piece.expert is not None
        whole, shape = self._source.read_packed(piece.stored, piece.expert), self._infos[name].shape
        rows = slice(piece.first, piece.first + piece.step * shape[0], piece.step)
        parts = {suffix: np.ascontiguousarray(part[rows]) for suffix, part in whole.parts.items()}
        return replace(whole, shape=(shape[0], shape[1]), parts=parts)

    def origin(self, name: str) -> str:
        """The published tensor that one of these is, or is a part of."""
        piece = self._pieces.get(name)
        return origin(self._source, name if piece is None else piece.stored)

    def sidecar_files(self) -> Mapping[str, bytes]:
        return self._source.sidecar_files()

    def token_table(self) -> memoryview | None:
        return self._source.token_table()

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self._source.fingerprint()} {self._layout}".encode()).hexdigest()

    def close(self) -> None:
        self._source.close()


def _flat(shape: tuple[int, ...], axes: int) -> tuple[int, ...]:
    """A published shape with one axis, the last, or with two."""
    if axes == 1:
        return shape[1:] if shape[:1] == (1,) else shape
    return shape[0], math.prod(shape[1:])


def _of_rows(whole: StoredMatrix, format: QuantFormat, places: NDArray[np.int64]) -> StoredMatrix | None:
    """Some rows of a packed matrix, or None where not all of its parts are by row."""
    if format.double_quant or any(len(part) != whole.shape[0] for part in whole.parts.values()):
        return None
    parts = {suffix: part[places] for suffix, part in whole.parts.items()}
    return replace(whole, shape=(len(places), whole.shape[1]), parts=parts)


def _further_layers(source: CheckpointSource, spec: ModelSpec, layout: Layout) -> tuple[str, ...]:
    """Tensors of layers beyond the model's own, where the configuration says that there are some."""
    count = source.config.get(layout.more_layers) if layout.more_layers is not None else None
    if type(count) is not int or not 0 < count <= spec.layers:
        return ()
    # A layer's first norm shows what stands before its number.
    before = str(spec.names.attention_norm).partition("{layer}")[0]
    beginnings = tuple(f"{before}{spec.layers + index}." for index in range(count))
    return tuple(name for name in source.tensors if name.startswith(beginnings))


def _keys_not_read(source: CheckpointSource, spec: ModelSpec) -> tuple[str, ...]:
    """Tensors of keys and values in layers that attend to another one's: some models are published with them."""
    names = [name for name in (spec.names.k, spec.names.v, spec.names.k_norm) if name is not None]
    unread = [layer for layer in range(spec.layers) if spec.shape(layer).source != layer]
    found = (f"{name.format(layer=layer)}.{end}" for layer in unread for name in names for end in ("weight", "bias"))
    return tuple(name for name in found if name in source.tensors)
