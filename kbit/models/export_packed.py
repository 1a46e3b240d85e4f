"""Writing a model as compressed-tensors reads it: codes as they are, where its formats have them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kbit.checkpoint.packed import compressed_tensors_out as layout
from kbit.checkpoint.planned_shards import StoredWeight
from kbit.checkpoint.shard import stored_format
from kbit.checkpoint.source import StoredSource
from kbit.checkpoint.writer import DEFAULT_SHARD_BYTES, CheckpointWriter
from kbit.formats.codec import Part
from kbit.formats.grids import Grid, NotOnGrid, Terms, rounded_to, terms_of
from kbit.formats.stored import KINDS, StoredMatrix, rounded, widened
from kbit.formats.stored_planes import StoredPlanes
from kbit.host.errors import KbitError, UnsupportedError, UsageError
from kbit.models.check import check_tensors
from kbit.models.export import DTYPES, float_pieces, published_config, relative_error
from kbit.models.families import FAMILIES, spec_from_config
from kbit.models.family import family_of
from kbit.models.published import PublishedTensor, StackedTensor, published_tensors

_MOST_NAMED = 3
_VALUES_AT_ONCE = 1 << 22
# Relative, of what is written with the codes and scales it has: a few of float32's roundings.
_LARGEST_ERROR = 2.0**-20


@dataclass(frozen=True)
class ExportedPacked:
    """What was written.

    Attributes:
        nbytes: of the weights.
        packed, rounded, plain: how many matrices were written as codes, how many of these were rounded to
            `requantize`, and how many tensors are floats.
        error: root mean square of what changed, relative to the values; 0.0: nothing did.
    """

    nbytes: int
    packed: int
    rounded: int
    plain: int
    error: float


@dataclass(frozen=True)
class _Entry:
    """What becomes of a published tensor.

    Attributes:
        tensor: which.
        kind: of its floats; "" where it is packed.
        grid: where it is packed.
        rounds: to that grid; else it lies there.
    """

    tensor: PublishedTensor | StackedTensor
    kind: str = ""
    grid: Grid | None = None
    rounds: bool = False

    @property
    def module(self) -> str:
        return self.tensor.name.removesuffix(".weight")

    def stored(self) -> StoredWeight:
        name, shape = self.tensor.name, self.tensor.shape
        if self.grid is None:
            return StoredWeight(name, {name: Part(DTYPES[self.kind][0], shape)})
        return StoredWeight(name, layout.parts(self.module, self.grid, (shape[0], shape[1])))


def export_compressed_tensors(
    source: StoredSource,
    out: Path,
    *,
    dtype: str | None = None,
    requantize: str | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    resume: bool = True,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ExportedPacked:
    """Write a model as compressed-tensors' folders are (vLLM, transformers), its quantized linear layers as codes.

    The codes of integers with a scale for each row or block (kbit's own, GPTQ's, AWQ's, GGUF's Q4_0, Q5_0, Q8_0, Q3_K
    and Q6_K), of MXFP4, NVFP4 and FP8 are written as they are. Embeddings, and a head on no such grid, become floats.

    Args:
        source: an open model (`kbit.models.opening`).
        out: folder to create.
        dtype: of floats, and of the scales of integers and FP8, one of DTYPES; None: every tensor's own, which loses
            nothing.
        requantize: the grid (`Grid.parse`) to which linear layers are rounded that lie on none.
        shard_bytes, resume, overwrite, progress: see `kbit.models.export.export_safetensors`.

    Raises:
        UnsupportedError: linear layers that lie on no grid, without `requantize`; layers that the format has not.
        UsageError: a grid that cannot be, or nothing to pack.
        KbitError: values that the type cannot hold, or that are not finite; the folder cannot be written.
    """
    where = f"config of {source.path}"
    family, spec = family_of(FAMILIES, source.config, where), spec_from_config(source.config, where=where)
    if spec.task is not None or spec.encoder is not None:
        raise UnsupportedError(f"{source.path}: {spec.family} models are exported with --to safetensors only")
    target = None if requantize is None else Grid.parse(requantize)
    check_tensors(source, spec)
    entries = _plan(source, published_tensors(spec, family.layout), dtype, target)
    weights = [entry.stored() for entry in entries]
    grids = {entry.module: entry.grid for entry in entries if entry.grid is not None}
    identity = json.dumps(["compressed-tensors", source.fingerprint(), dtype, requantize, shard_bytes])
    plan_id = hashlib.sha256(identity.encode()).hexdigest()
    squares = [0.0, 0.0]
    with CheckpointWriter(out, weights, plan_id, shard_bytes=shard_bytes, resume=resume, overwrite=overwrite) as writer:
        done, total = 0, sum(weight.nbytes for weight in weights)
        for entry, weight in zip(entries, weights, strict=True):
            if weight.name not in writer.done:
                writer.write(weight.name, _bytes(source, entry, squares))
            done += weight.nbytes
            if progress is not None:
                progress(done, total)
        kinds = {entry.kind for entry in entries if entry.grid is None}
        kind = dtype or (kinds.pop() if len(kinds) == 1 else "fp32")
        config = published_config(source, family, DTYPES[kind][2])
        config["quantization_config"] = layout.section(grids, _unpacked(entries, f"{spec.names.head}.weight"))
        writer.finish(config, source.sidecar_files(), {"exported": "compressed-tensors"})
        rounds = sum(entry.rounds for entry in entries)
        return ExportedPacked(writer.nbytes, len(grids), rounds, len(entries) - len(grids), relative_error(squares))


def _plan(
    source: StoredSource, tensors: tuple[PublishedTensor | StackedTensor, ...], dtype: str | None, target: Grid | None
) -> list[_Entry]:
    """What becomes of every tensor; all that cannot be written is found before anything is."""
    entries, refused, final = [], [], False
    for tensor in tensors:
        try:
            entries.append(_entry(source, tensor, dtype, target))
        except NotOnGrid as reason:
            refused.append(f"{tensor.name}, which {reason}")
            final = final or reason.final
    if refused:
        more = f" (and {len(refused) - _MOST_NAMED} more)" if len(refused) > _MOST_NAMED else ""
        remedy = "round them with --requantize int8-row or another format, or " if not final else ""
        raise UnsupportedError(
            f"{source.path}: compressed-tensors has no format for {'; '.join(refused[:_MOST_NAMED])}{more}: {remedy}"
            "write plain floats with --to safetensors"
        )
    if all(entry.grid is None for entry in entries):
        raise UsageError(
            f"{source.path}: no linear layer is quantized: name a format with --requantize int8-row (or another), or "
            "write plain floats with --to safetensors"
        )
    return entries


def _entry(
    source: StoredSource, tensor: PublishedTensor | StackedTensor, dtype: str | None, target: Grid | None
) -> _Entry:
    """What becomes of a tensor.

    Raises:
        NotOnGrid: it is a linear layer's, is to be packed and cannot.
    """
    parts = (
        [part.parameter for part in tensor.parts]
        if isinstance(tensor, PublishedTensor)
        else [parameter for expert in tensor.experts for parameter in expert]
    )
    formats = {stored_format(source.tensors[parameter.name]) for parameter in parts}
    role, packed = parts[0].role, formats != {None}
    if dtype is not None:
        plain = _Entry(tensor, dtype)
    else:
        kinds = {KINDS.get(source.tensors[parameter.name].stored_as, "fp32") for parameter in parts}
        plain = _Entry(tensor, kinds.pop() if len(kinds) == 1 else "fp32")
    if role not in ("linear", "head") or not (packed or (role == "linear" and target is not None)):
        return plain
    if isinstance(tensor, PublishedTensor) and len(tensor.shape) != 2:
        return plain
    if isinstance(tensor, StackedTensor):
        raise NotOnGrid("holds all experts of a layer, which compressed-tensors packs one by one", final=True)
    if tensor.transposed:
        raise NotOnGrid("is published as (inputs, outputs), which compressed-tensors does not pack", final=True)
    columns = tensor.shape[1]
    try:
        if None in formats:
            raise NotOnGrid("is quantized in part only" if packed else "is not quantized")
        terms = _terms(source, tensor)
        grid = _whole_rows(terms.grid, columns)
        layout.check_grid(grid, columns)
        layout.check_scales(terms)
    except NotOnGrid:
        if role == "head":
            return plain
        if target is None:
            raise
        grid = _whole_rows(target, columns)
        layout.check_grid(grid, columns)
        return _Entry(tensor, grid=_with_kind(grid, dtype), rounds=True)
    return _Entry(tensor, grid=_with_kind(grid, dtype))


def _whole_rows(grid: Grid, columns: int) -> Grid:
    """A block of more than a row is a row."""
    return replace(grid, block=0) if grid.kind != "e2m1" and grid.block > columns else grid


def _with_kind(grid: Grid, dtype: str | None) -> Grid:
    return grid if dtype is None or grid.kind == "e2m1" else replace(grid, scale_kind=dtype)


def _terms(source: StoredSource, tensor: PublishedTensor) -> Terms:
    """Scales of a published matrix, rows in its order.

    Raises:
        NotOnGrid: a part is on no grid, or on another than the others.
    """
    found = [terms_of(_matrix(source, part.parameter.name)) for part in tensor.parts]
    if len({terms.grid for terms in found}) > 1:
        raise NotOnGrid("holds matrices of several formats")
    order = tensor.order()
    zeros = [terms.zeros for terms in found if terms.zeros is not None]
    scales = np.concatenate([terms.scales for terms in found])[order]
    return Terms(found[0].grid, scales, np.concatenate(zeros)[order] if zeros else None)


def _matrix(source: StoredSource, name: str) -> StoredMatrix:
    stored = source.read_stored(name)
    if not isinstance(stored, StoredMatrix):
        raise NotOnGrid("is held dequantized")
    return stored


def _bytes(source: StoredSource, entry: _Entry, squares: list[float]) -> dict[str, Any]:
    """The stored arrays of a tensor, by name."""
    tensor = entry.tensor
    if entry.grid is None:
        return {tensor.name: float_pieces(source, tensor, entry.kind, squares)}
    assert isinstance(tensor, PublishedTensor)
    if entry.rounds:
        values = np.concatenate([rows.numpy() for rows in tensor.rows(source, _VALUES_AT_ONCE)])
        if not np.isfinite(values).all():
            raise KbitError(f"{source.path}: {tensor.name} holds NaN or infinity: mend the source")
        terms, codes = rounded_to(values, entry.grid)
    else:
        parts = [StoredPlanes.of(_matrix(source, part.parameter.name)).codes() for part in tensor.parts]
        terms, codes = replace(_terms(source, tensor), grid=entry.grid), np.concatenate(parts)[tensor.order()]
    kept = widened(rounded(terms.scales, entry.grid.scale_kind), entry.grid.scale_kind)
    if not np.isfinite(kept).all():
        raise KbitError(
            f"{source.path}: {tensor.name} has scales up to {float(terms.scales.max()):.3g}, which "
            f"{entry.grid.scale_kind} cannot hold: use --dtype bf16 or fp32"
        )
    changed = _squares(source, tensor, replace(terms, scales=kept), codes)
    exact = not entry.rounds and np.array_equal(kept, terms.scales)
    if exact and changed[0] > _LARGEST_ERROR**2 * changed[1]:
        raise RuntimeError(f"{tensor.name}: its codes do not stand for its values")
    squares[0] += changed[0]
    squares[1] += changed[1]
    try:
        found = layout.arrays(entry.module, terms, codes)
    except NotOnGrid as reason:
        raise UnsupportedError(
            f"{source.path}: {tensor.name} {reason}; write plain floats with --to safetensors"
        ) from None
    return {name: [_memory(values)] for name, values in found.items()}


def _memory(values: NDArray[Any]) -> memoryview:
    return values.reshape(-1).view(np.uint8).data


def _squares(
    source: StoredSource, tensor: PublishedTensor, terms: Terms, codes: NDArray[np.uint8]
) -> tuple[float, float]:
    """Sums of squares: of what the written values differ by from those that the model has, and of these."""
    first, changed, whole = 0, 0.0, 0.0
    for rows in _runs(source, tensor):
        last = first + len(rows)
        zeros = None if terms.zeros is None else terms.zeros[first:last]
        written = replace(terms, scales=terms.scales[first:last], zeros=zeros).values(codes[first:last])
        changed += float(np.square(written - rows, dtype=np.float64).sum())
        whole += float(np.square(rows, dtype=np.float64).sum())
        first = last
    return changed, whole


def _runs(source: StoredSource, tensor: PublishedTensor) -> Iterator[NDArray[np.float32]]:
    for rows in tensor.rows(source, _VALUES_AT_ONCE):
        yield rows.numpy()


def _unpacked(entries: list[_Entry], head: str) -> list[str]:
    """Linear layers that are not packed, the head among them where it is the embedding."""
    plain = [
        entry.module
        for entry in entries
        if isinstance(entry.tensor, PublishedTensor)
        and entry.grid is None
        and len(entry.tensor.shape) == 2
        and entry.tensor.parts[0].parameter.role in ("linear", "router")
    ]
    packed = {entry.tensor.name for entry in entries if entry.grid is not None}
    return plain if head in packed else [*plain, head.removesuffix(".weight")]
