"""Writing a model as a GGUF file: llama.cpp's names, order of rows and settings; codes where a type has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kbit.checkpoint.gguf.blocks_out import ROUNDED, Form, decoded, encode, form_of
from kbit.checkpoint.gguf.names import Architecture, part_of
from kbit.checkpoint.gguf.source import GGUFSource
from kbit.checkpoint.gguf.types import GGML_TYPES
from kbit.checkpoint.gguf.writing import GGUFWriter, NewTensor, check_output_file
from kbit.checkpoint.shard import stored_format
from kbit.checkpoint.source import StoredSource
from kbit.formats.grids import NotOnGrid
from kbit.formats.stored import StoredMatrix, rounded, widened
from kbit.formats.stored_planes import StoredPlanes
from kbit.host.errors import KbitError, UnsupportedError, UsageError
from kbit.models import gguf_metadata as settings
from kbit.models.check import check_tensors
from kbit.models.families import spec_from_config
from kbit.models.gguf_encoders import (
    dense_modules,
    encoder_architecture,
    encoder_metadata,
    is_encoder,
    vector_keys,
)
from kbit.models.gguf_entries import Entry, entries_of
from kbit.models.gguf_factors import MultipliedSource, without_factors
from kbit.models.gguf_tokenizer import check_tokenizer, tokenizer_keys
from kbit.models.spec import ModelSpec

if TYPE_CHECKING:
    from kbit.checkpoint.gguf.writing import Value

_KINDS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
_FLOATS = {name: kind for kind, name in _KINDS.items()}
# What llama.cpp multiplies in float32.
_ALWAYS_F32 = frozenset(
    {
        "ffn_gate_inp", "ffn_gate_inp_shexp", "position_embd", "ssm_conv1d", "ssm_norm", "conv", "token_types",
        "attn_rel_b",
    }
)  # fmt: skip
# general.file_type (llama.h, llama_ftype) by the type of most matrices; 1024: guessed from tensors.
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32, "MXFP4": 38}
_MOST_NAMED = 3
_VALUES_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class ExportedGGUF:
    """What was written.

    Attributes:
        nbytes: of the file.
        types: how many tensors of each type there are.
        rounded: how many were rounded to `requantize`.
        error: root mean square of what changed, relative to the values; 0.0: nothing did.
    """

    nbytes: int
    types: dict[str, int]
    rounded: int
    error: float


def export_gguf(
    source: StoredSource,
    out: Path,
    *,
    dtype: str | None = None,
    requantize: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ExportedGGUF:
    """Write a model as llama.cpp reads it. Of a GGUF file all tensors and keys are copied, parts joined.

    Args:
        source: an open model (`kbit.models.opening`).
        out: the file to create.
        dtype: of matrices that are floats, "fp32", "fp16" or "bf16"; None: each one's own, which loses nothing.
        requantize: type (`ROUNDED`) to which matrices are rounded that are not dense and that no type holds, and linear
            layers that are dense.
        overwrite: replace a GGUF file.
        progress: called as (bytes done, bytes in all).

    Raises:
        UnsupportedError: a family, setting or tokenizer that GGUF cannot say; matrices that no type holds, without
            `requantize`.
        UsageError: an impossible type, or something in the way.
        KbitError: values that are not finite, there or in the type; the file cannot be written.
    """
    check_output_file(out, overwrite=overwrite)
    if requantize not in (None, *ROUNDED):
        raise UsageError(f"--requantize {requantize}: kbit rounds to {', '.join(ROUNDED)}")
    where = str(source.path)
    if isinstance(source, GGUFSource):
        if dtype is not None or requantize is not None:
            raise UsageError(f"{where}: a GGUF file is copied as it is: leave out --dtype and --requantize")
        return _copy(source, out, overwrite, progress)
    spec = spec_from_config(source.config, where=f"config of {where}")
    check_tensors(source, spec)
    spec, factors = without_factors(spec)
    source = MultipliedSource(source, factors) if factors else source
    if is_encoder(spec):
        arch = encoder_architecture(spec, where)
        described = encoder_metadata(spec, arch, source)
    else:
        arch = settings.architecture_of(spec, where)
        if arch.qk_optional and spec.names.q_norm is None:
            arch = replace(arch, qk_norm=None)
        described = settings.metadata(spec, arch)
    beside = {name: np.array(values, dtype=np.float32) for name, values in settings.rope_tensors(spec).items()}
    if arch.beside:
        dense = dense_modules(source, arch)
        described |= {f"{arch.name}.{key}": value for key, value in vector_keys(source, dense).items()}
        beside |= dense
    wanted = entries_of(spec, arch, described, where)
    entries = [_typed(entry, source, dtype, requantize) for entry in wanted]
    refused = [entry for entry in entries if isinstance(entry, NotOnGrid)]
    if refused:
        more = f" (and {len(refused) - _MOST_NAMED} more)" if len(refused) > _MOST_NAMED else ""
        rounding = f"round them with --requantize Q8_0 (or {', '.join(ROUNDED[1:])}), or "
        raise UnsupportedError(
            f"{where}: GGUF has no type for {'; '.join(map(str, refused[:_MOST_NAMED]))}{more}: "
            f"{'' if any(reason.final for reason in refused) else rounding}write plain floats with --to safetensors"
        )
    planned = [entry for entry in entries if isinstance(entry, Entry)]
    tensors = [NewTensor(name, values.shape, "F32") for name, values in beside.items()]
    tensors += [entry.tensor for entry in planned]
    most = _most(planned)
    keys: dict[str, Value] = {
        "general.architecture": arch.name,
        "general.type": "model",
        "general.name": source.path.stem or spec.family,
        "general.file_type": _FILE_TYPES.get(most, 1024),
        "general.quantization_version": 2,
        **described,
        **tokenizer_keys(source, spec.vocab_size, spec.types),
    }
    squares = [0.0, 0.0]
    with GGUFWriter(out, keys, tensors, overwrite=overwrite) as writer:
        for name, values in beside.items():
            writer.write(name, [values.tobytes()])
        _check_file(writer.partial, source, spec, arch)
        done, total = 0, sum(tensor.nbytes for tensor in tensors)
        for entry in planned:
            write = _bytes if entry.arranged is None else _arranged_bytes
            writer.write(entry.tensor.name, write(source, entry, squares))
            done += entry.tensor.nbytes
            if progress is not None:
                progress(done, total)
        writer.finish()
        error = (squares[0] / squares[1]) ** 0.5 if squares[1] else 0.0
        return ExportedGGUF(writer.nbytes, _counted(tensors), sum(entry.rounds for entry in planned), error)


def _most(entries: list[Entry]) -> str:
    """The type of most of the matrices' bytes."""
    bytes_of: dict[str, int] = {}
    for entry in entries:
        if len(entry.tensor.shape) > 1:
            bytes_of[entry.tensor.type] = bytes_of.get(entry.tensor.type, 0) + entry.tensor.nbytes
    return max(bytes_of, key=lambda name: bytes_of[name])


def _counted(tensors: list[NewTensor]) -> dict[str, int]:
    found: dict[str, int] = {}
    for tensor in tensors:
        found[tensor.type] = found.get(tensor.type, 0) + 1
    return found


def _check_file(path: Path, source: StoredSource, spec: ModelSpec, arch: Architecture) -> None:
    """Reads the header back: it must describe the same model, and the same tokenizer."""
    with GGUFSource(path) as written:
        found = spec_from_config(written.config, where=f"config of {path}")
        settings.check_same(spec, found, arch, str(source.path))
        check_tokenizer(source, written)


def _typed(entry: Entry, source: StoredSource, dtype: str | None, requantize: str | None) -> Entry | NotOnGrid:
    """An entry with its type; or what cannot be written, and why."""
    tensor, infos = entry.tensor, [source.tensors[part] for part in entry.parts]
    if len(tensor.shape) == 1 or not tensor.name.endswith(".weight") or part_of(tensor.name) in _ALWAYS_F32:
        return entry
    formats = {stored_format(info) for info in infos}
    layers = "blk." in tensor.name
    if formats == {None} and not (layers and requantize):
        own = {info.stored_as if info.stored_as in _FLOATS else "F32" for info in infos}
        kind = own.pop() if len(own) == 1 else "F32"
        return replace(entry, tensor=replace(tensor, type=kind if dtype is None else _KINDS[dtype]))
    try:
        if None in formats:
            raise NotOnGrid("is not quantized" if formats == {None} else "is quantized in part only")
        if entry.arranged is not None and entry.arranged.moves:
            raise NotOnGrid("lies down in these files, by head, so that its blocks would be others")
        types = {_form(source, part).type for part in entry.parts}
        if len(types) > 1:
            raise NotOnGrid(f"holds matrices of several types, {', '.join(sorted(types))}")
        return replace(entry, tensor=replace(tensor, type=types.pop()))
    except NotOnGrid as reason:
        if requantize is None:
            return NotOnGrid(f"{entry.parts[0]}, which {reason}", final=reason.final)
        if tensor.shape[-1] % 32:
            why = f"has rows of {tensor.shape[-1]} weights, no whole number of GGUF's blocks of 32"
            return NotOnGrid(f"{entry.parts[0]}, which {why}", final=True)
        return replace(entry, tensor=replace(tensor, type=requantize), rounds=True)


def _matrix(source: StoredSource, name: str) -> StoredMatrix:
    stored = source.read_stored(name)
    if not isinstance(stored, StoredMatrix):
        raise NotOnGrid("is held dequantized")
    return stored


def _form(source: StoredSource, name: str) -> Form:
    return form_of(_matrix(source, name))


def _bytes(source: StoredSource, entry: Entry, squares: list[float]) -> Iterator[memoryview]:
    for part in entry.parts:
        for rows in _rows(source, entry, part, entry.tensor.type, squares):
            yield _in_order(rows, entry).reshape(-1).view(np.uint8).data


def _arranged_bytes(source: StoredSource, entry: Entry, squares: list[float]) -> Iterator[memoryview]:
    """A tensor whose parts do not lie one after another, whole."""
    arranged, type_ = entry.arranged, entry.tensor.type
    assert arranged is not None
    # What lies down is rounded as it lies.
    kept = "F32" if arranged.moves and type_ not in _FLOATS else type_
    whole, count = None, prod(arranged.shape) // arranged.columns
    block = GGML_TYPES[next(number for number, kind in GGML_TYPES.items() if kind.name == kept)].block
    for held in arranged.held:
        rows = np.concatenate(list(_rows(source, entry, held.piece.name, kept, squares)))
        if not held.transposed:
            within = arranged.columns // block
            rows = rows.reshape(len(rows), within, -1) if block > 1 else rows.reshape(-1, within)
        if whole is None:
            whole = np.empty((count, arranged.columns // block, *rows.shape[2:]), dtype=rows.dtype)
        arranged.put(whole, held, rows)
    assert whole is not None
    yield (whole if kept == type_ else _rounded(whole, type_)[0]).reshape(-1).view(np.uint8).data


def _rows(source: StoredSource, entry: Entry, part: str, type_: str, squares: list[float]) -> Iterator[NDArray[Any]]:
    """Rows of a canonical tensor in a type, a few at a time."""
    form, codes = None, None
    if type_ not in _FLOATS:
        form, codes = _coded(source, part, entry)
    shape = source.tensors[part].shape
    step = max(1, _VALUES_AT_ONCE // max(1, shape[1] if len(shape) > 1 else 1))
    if entry.head:
        step = -(-step // entry.head) * entry.head
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        values = source.read_array_rows(part, start, stop)
        if not np.isfinite(values).all():
            raise KbitError(f"{source.path}: {part} holds NaN or infinity: mend the source")
        if form is not None and codes is not None:
            stored = encode(form, codes[start:stop], start, stop)
            written = decoded(form, stored)
        else:
            stored, written = _rounded(values, type_)
        if not np.isfinite(written).all():
            raise KbitError(
                f"{source.path}: {part} holds values up to {float(np.abs(values).max()):.3g}, which {type_} cannot: "
                "use --dtype bf16 or fp32"
            )
        squares[0] += float(np.square(written - values, dtype=np.float64).sum())
        squares[1] += float(np.square(values, dtype=np.float64).sum())
        yield stored


def _coded(source: StoredSource, part: str, entry: Entry) -> tuple[Form | None, NDArray[np.uint8] | None]:
    """A matrix's codes and the form they are written in; none where they are made from the values."""
    try:
        matrix = _matrix(source, part)
        form = form_of(matrix, entry.tensor.type if entry.rounds else None)
    except NotOnGrid:
        return None, None
    return form, StoredPlanes.of(matrix).codes()


def _rounded(values: NDArray[np.float32], type_: str) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Rows in a type, and what they then stand for."""
    if type_ in _FLOATS:
        stored = rounded(values, _FLOATS[type_])
        return stored, widened(stored, _FLOATS[type_])
    import gguf

    kind = gguf.GGMLQuantizationType[type_]
    packed: NDArray[Any] = gguf.quants.quantize(values, kind)
    return packed, gguf.quants.dequantize(packed, kind)


def _in_order(rows: NDArray[Any], entry: Entry) -> NDArray[Any]:
    """Canonical rows of whole heads as the file has them: row 2 i + h of those that turn is row h R / 2 + i."""
    if not entry.head:
        return np.ascontiguousarray(rows)
    heads = rows.reshape(-1, entry.head, *rows.shape[1:])
    within, half = np.arange(entry.head), entry.turned // 2
    order = np.where(within < entry.turned, within // 2 + half * (within % 2), within)
    return np.ascontiguousarray(heads[:, order])


def _copy(source: GGUFSource, out: Path, overwrite: bool, progress: Callable[[int, int], None] | None) -> ExportedGGUF:
    """A GGUF file once more, its parts joined."""
    tensors = [NewTensor(each.name, each.shape, each.type.name) for each in source.stored_tensors()]
    total, done = sum(tensor.nbytes for tensor in tensors), 0
    with GGUFWriter(out, source.stored_metadata(), tensors, overwrite=overwrite) as writer:
        for tensor in tensors:
            writer.write(tensor.name, source.stored_bytes(tensor.name))
            done += tensor.nbytes
            if progress is not None:
                progress(done, total)
        writer.finish()
    return ExportedGGUF(writer.nbytes, _counted(tensors), 0, 0.0)
