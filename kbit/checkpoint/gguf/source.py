"""A GGUF file as a CheckpointSource: Hugging Face names, shapes, row order, config and tokenizer files."""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO

from kbit.checkpoint.gguf.config import architecture_of, config_from_header
from kbit.checkpoint.gguf.experts import expert_rows
from kbit.checkpoint.gguf.header import read_header
from kbit.checkpoint.gguf.latent import latent_rows
from kbit.checkpoint.gguf.metadata import GGUFHeader, GGUFTensor, quoted
from kbit.checkpoint.gguf.names import ROPE_FACTORS, ROPE_FREQS, Architecture, canonical_names, part_of
from kbit.checkpoint.source import StoredSource, TensorInfo
from kbit.host.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kbit.checkpoint.gguf.blocks import BlockType
    from kbit.formats.stored import AnyStored, StoredMatrix

# Values dequantized at a time: 4 MB of float32. gguf's dequantizers make a few temporaries of that size.
_CHUNK_VALUES = 1 << 20
_COPY_BYTES = 1 << 22

# Types whose bytes are plain numbers, by numpy type; BF16 is widened from its bits, all others are block formats.
_PLAIN = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}

# Block types that the gguf package has not, or has not had for long.
_OWN = ("Q1_0", "Q2_0", "NVFP4")

_PART_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class _Located:
    """A tensor, the part that holds it, and how its rows are to be put in order.

    Attributes:
        tensor: or the rows of one that holds several.
        header: of the part.
        head_dim: rows of a head, where they must be un-permuted (0: stored in order).
        rotated: how many of these are.
        aside: rows of a head before those.
        transposed: its first axis are heads, of each of which rows are columns.
    """

    tensor: GGUFTensor
    header: GGUFHeader
    head_dim: int
    rotated: int
    aside: int = 0
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor in canonical terms."""
        if not self.transposed:
            return self.tensor.shape
        heads, columns, rows = self.tensor.shape
        return heads * rows, columns


class GGUFSource(StoredSource):
    """A model in a GGUF file, or in the parts of a split one (give the first part).

    Opening reads headers only (no torch, no numpy). Tensor data is read with plain positioned reads, a few rows at
    a time, not through a map: memory stays at the output plus about 30 MB, and a file that shrinks while it is used
    is an error instead of a SIGBUS.

    Args:
        path: the .gguf file.

    Raises:
        CheckpointError: unreadable, truncated or inconsistent.
        UnsupportedError: an architecture, format version, tensor or RoPE scaling kbit does not implement.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._closed = False
        self._sidecars: dict[str, bytes] | None = None
        header = read_header(self.path)
        self._parts = _open_parts(header)
        self._stats = {part.path: _stat(part.path) for part in self._parts}
        arch = architecture_of(header)

        tables: dict[str, GGUFTensor] = {}
        owner: dict[str, GGUFHeader] = {}
        for part in self._parts:
            for name, tensor in part.tensors.items():
                if name in tables:
                    part.fail(f"tensor {quoted(name)} is also in {owner[name].path.name}")
                tables[name], owner[name] = tensor, part
        divisors = _rope_divisors(owner[ROPE_FREQS], tables[ROPE_FREQS]) if ROPE_FREQS in tables else None
        factors = None
        if arch.scaled and any(name in tables for name in ROPE_FACTORS):
            for name in ROPE_FACTORS:
                if name not in tables:
                    header.fail(f"tensor '{name}' is missing", "download or convert the file again")
            short, long = (_rope_divisors(owner[name], tables[name]) for name in ROPE_FACTORS)
            factors = short, long
        self.config: dict[str, Any] = config_from_header(header, tables, divisors, factors)
        self.header = header

        self._located: dict[str, _Located] = {}
        infos: dict[str, TensorInfo] = {}
        for name, tensor in tables.items():
            for held in latent_rows(self.config, name, tensor) if arch.latent else ():
                at = _Located(
                    held.tensor, owner[name], held.head, held.turned, held.head - held.turned, held.transposed
                )
                kind = "F32" if held.transposed else held.tensor.type.name
                nbytes = 4 * prod(at.shape) if held.transposed else held.tensor.nbytes
                self._located[held.name] = at
                infos[held.name] = TensorInfo(held.name, at.shape, kind, nbytes, owner[name].path)
            # (Of factors of RoPE there are none: config_from_header has turned them into rope_scaling.)
            for full_name, rows in _rows_of(arch, self.config, name, tensor):
                permuted = arch.interleaved and full_name.split(".")[-2] in ("q_proj", "k_proj")
                head_dim = int(self.config["head_dim"]) if permuted else 0
                rotated = int(head_dim * self.config.get("partial_rotary_factor", 1.0))
                self._located[full_name] = _Located(rows, owner[name], head_dim, rotated)
                infos[full_name] = TensorInfo(full_name, rows.shape, rows.type.name, rows.nbytes, owner[name].path)
        self._infos = MappingProxyType(infos)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by Hugging Face name, in file order."""
        return self._infos

    def read_array_rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows [start, stop) of a tensor as float32, in Hugging Face row order; see CheckpointSource.read_rows.

        Raises:
            CheckpointError: no such tensor, or the data cannot be read.
            UnsupportedError: a tensor type that the installed gguf package cannot dequantize.
            ValueError: a row range outside the tensor, or the source is closed.
        """
        import numpy as np

        if self._closed:
            raise ValueError(f"{self.path}: read after close")
        located = self._located.get(name)
        if located is None:
            raise CheckpointError(f"{self.path}: there is no tensor {quoted(name)}; list the tensors with kbit info")
        shape = located.shape
        if not 0 <= start <= stop <= shape[0]:
            raise ValueError(f"rows {start}:{stop} are outside tensor {name} with {shape[0]} rows")
        out = np.empty((stop - start, *shape[1:]), dtype=np.float32)
        if start < stop:
            with self._open(located.header) as file:
                if located.transposed:
                    return _read_transposed(file, located, start, stop)
                _read_into(file, located, start, stop, out)
        return out

    def read_stored(self, name: str) -> AnyStored:
        """A matrix of a block type kbit can run packed comes as its codes and scales, exactly; others as float32."""
        from kbit.checkpoint.gguf.blocks import BLOCK_TYPES
        from kbit.formats.stored import KINDS, DenseMatrix, narrowed

        located = self._located.get(name)
        if located is None or located.transposed or located.tensor.type.name not in BLOCK_TYPES:
            values = self.read_array(name)
            kind = KINDS.get(self._infos[name].stored_as, "fp32")
            return DenseMatrix(narrowed(values, kind), kind)
        if self._closed:
            raise ValueError(f"{self.path}: read after close")
        with self._open(located.header) as file:
            return _read_packed(file, located, BLOCK_TYPES[located.tensor.type.name])

    def stored_tensors(self) -> list[GGUFTensor]:
        """The tensors of all parts as they are stored, in the order of the files."""
        return [tensor for part in self._parts for tensor in part.tensors.values()]

    def stored_bytes(self, name: str) -> Iterator[bytes]:
        """A tensor's bytes, a few MB at a time, by its name in the file.

        Raises:
            CheckpointError: they cannot be read.
        """
        part = next(part for part in self._parts if name in part.tensors)
        tensor = part.tensors[name]
        with self._open(part) as file:
            for start in range(0, tensor.nbytes, _COPY_BYTES):
                yield _read_at(file, part.path, tensor.offset + start, min(_COPY_BYTES, tensor.nbytes - start))

    def stored_metadata(self) -> dict[str, tuple[int | tuple[int, int], Any]]:
        """All metadata as it is stored, by key: type (and type of items) and value; but what says that there are parts,
        and how data are aligned."""
        keys = (key for key in self.header if not key.startswith("split."))
        return {key: self.header.typed(key) for key in keys if key != "general.alignment"}

    def sidecar_files(self) -> Mapping[str, bytes]:
        """tokenizer.json, tokenizer_config.json and generation_config.json, rebuilt from the metadata."""
        if self._sidecars is None:
            from kbit.checkpoint.gguf.encoders import sentence_files
            from kbit.checkpoint.gguf.tokenizer import sidecars_from_header

            self._sidecars = sidecars_from_header(self.header, int(self.config["max_position_embeddings"]))
            if architecture_of(self.header).encoder:
                self._sidecars |= sentence_files(self.header, int(self.config["hidden_size"]))
        return MappingProxyType(self._sidecars)

    def fingerprint(self) -> str:
        """SHA-256 over each part's header, size and modification time."""
        digest = hashlib.sha256()
        for part in self._parts:
            digest.update(struct.pack("<QQq", len(part.raw), *self._stats[part.path]))
            digest.update(part.raw)
        return digest.hexdigest()

    def close(self) -> None:
        """Mark the source closed (no file stays open between reads)."""
        self._closed = True

    def _open(self, header: GGUFHeader) -> BinaryIO:
        try:
            file = open(header.path, "rb")  # noqa: SIM115 (the caller closes it)
        except OSError as error:
            raise CheckpointError(f"{header.path}: cannot read the file ({error.strerror or error})") from error
        stat = os.fstat(file.fileno())
        if (stat.st_size, stat.st_mtime_ns) != self._stats[header.path]:
            file.close()
            raise CheckpointError(f"{header.path}: the file changed while it was in use; run the command again")
        return file


def _rows_of(
    arch: Architecture, config: Mapping[str, Any], name: str, tensor: GGUFTensor
) -> list[tuple[str, GGUFTensor]]:
    """The canonical tensors that a tensor holds, each as the part of it that it is; none beyond the model's layers."""
    layer = re.match(r"blk\.(\d+)\.", name)
    if layer is not None and int(layer[1]) >= config["num_hidden_layers"]:
        return []
    if arch.latent and latent_rows(config, name, tensor):
        return []
    special = None if arch.special is None else arch.special.located(name, tensor, config)
    if special is not None:
        return special
    of_experts = [] if arch.experts is None else expert_rows(arch.experts, name, tensor)
    if of_experts:
        return of_experts
    names = canonical_names(arch, name)
    if len(names) < 2:
        return [(each, tensor) for each in names]
    keys = int(config["num_key_value_heads"]) * int(config["head_dim"])
    queries = int(config["num_attention_heads"]) * int(config["head_dim"])
    counts = {"attn_q": queries, "attn_k": keys, "attn_v": keys}
    found, first, row_bytes = [], 0, tensor.nbytes // tensor.shape[0]
    for each, part in zip(names, arch.fused[part_of(name)], strict=True):
        count = counts.get(part, int(config["intermediate_size"]))
        place = tensor.offset + first * row_bytes
        rows = replace(tensor, shape=(count, *tensor.shape[1:]), offset=place, nbytes=count * row_bytes)
        found.append((each, rows))
        first += count
    return found


def _stat(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read the file ({error.strerror or error})") from error
    return stat.st_size, stat.st_mtime_ns


def _open_parts(first: GGUFHeader) -> list[GGUFHeader]:
    """The headers of all parts of a split file (llama.cpp's gguf-split), or just the given one."""
    count = first.integer("split.count") or 0
    if count <= 1 and not first.integer("split.no"):
        return [first]
    path = first.path
    match = _PART_NAME.fullmatch(path.name)
    if match is None or int(match.group(3)) != count:
        first.fail(
            f"one of {count} parts, but not named NAME-00001-of-{count:05d}.gguf",
            "restore its name, or merge the parts with llama-gguf-split --merge",
        )
    names = [f"{match.group(1)}-{index:05d}-of-{count:05d}.gguf" for index in range(1, count + 1)]
    if first.integer("split.no") != 0 or path.name != names[0]:
        first.fail(f"not the first of {count} parts", f"give {names[0]}")
    headers = [first]
    for index, name in enumerate(names[1:], start=1):
        part = path.with_name(name)
        if not part.is_file():
            first.fail(f"part {index + 1} of {count}, {name}, is missing beside it", "download all parts")
        header = read_header(part)
        if header.integer("split.no") != index or header.integer("split.count") != count:
            header.fail(f"does not say that it is part {index + 1} of {count}")
        headers.append(header)
    total = first.integer("split.tensors.count")
    found = sum(len(header.tensors) for header in headers)
    if total is not None and total != found:
        first.fail(f"its parts hold {found} tensors, the metadata says {total}", "download all parts again")
    return headers


def _rope_divisors(header: GGUFHeader, tensor: GGUFTensor) -> list[float]:
    """The values of rope_freqs.weight (D/2 numbers), read without numpy."""
    code = {"F32": "f", "F16": "e"}.get(tensor.type.name)
    if code is None or len(tensor.shape) != 1 or tensor.shape[0] > 1 << 16:
        raise UnsupportedError(
            f"{header.path}: tensor 'rope_freqs.weight' has type {tensor.type.name} and shape {tensor.shape}, "
            "expected a short F32 vector"
        )
    try:
        with open(header.path, "rb") as file:
            data = _read_at(file, header.path, tensor.offset, tensor.nbytes)
    except OSError as error:
        raise CheckpointError(f"{header.path}: cannot read the file ({error.strerror or error})") from error
    return list(struct.unpack(f"<{tensor.shape[0]}{code}", data))


def _read_at(file: BinaryIO, path: Path, offset: int, nbytes: int) -> bytes:
    try:
        file.seek(offset)
        data = file.read(nbytes)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read the file ({error.strerror or error})") from error
    if len(data) != nbytes:
        raise CheckpointError(
            f"{path}: {nbytes} bytes expected at offset {offset}, {len(data)} found; download it again"
        )
    return data


def _read_into(file: BinaryIO, located: _Located, start: int, stop: int, out: npt.NDArray[np.float32]) -> None:
    """Fill `out` (rows start..stop, any trailing dimensions) chunk by chunk."""
    tensor, head = located.tensor, located.head_dim
    shape = tensor.shape
    if len(shape) == 1:
        # A vector is one row of blocks: decode all of it, then cut.
        row = _decode(_read_at(file, located.header.path, tensor.offset, tensor.nbytes), located, 1)
        out[:] = _unpermute(row.reshape(-1, 1), located)[start:stop, 0] if head else row[0, start:stop]
        return
    width = 1
    for dim in shape[1:]:
        width *= dim
    flat = out.reshape(stop - start, width)
    row_bytes = tensor.nbytes // shape[0]
    step = max(1, _CHUNK_VALUES // width)
    first = start
    if head:
        # Rows move only inside their head, so whole heads are read and the wanted rows kept.
        step = -(-step // head) * head
        first = start // head * head
    for begin in range(first, stop, step):
        end = min(begin + step, -(-stop // head) * head if head else stop)
        data = _read_at(file, located.header.path, tensor.offset + begin * row_bytes, (end - begin) * row_bytes)
        rows = _decode(data, located, end - begin)
        if head:
            rows = _unpermute(rows, located)
        low, high = max(begin, start), min(end, stop)
        flat[low - start : high - start] = rows[low - begin : high - begin]


def _read_transposed(file: BinaryIO, located: _Located, start: int, stop: int) -> npt.NDArray[np.float32]:
    """Rows [start, stop) of a tensor whose heads lie down."""
    import numpy as np

    _, columns, rows = located.tensor.shape
    head_bytes = located.tensor.nbytes // located.tensor.shape[0]
    first, last = start // rows, -(-stop // rows)
    data = _read_at(file, located.header.path, located.tensor.offset + first * head_bytes, (last - first) * head_bytes)
    heads = _decode(data, located, (last - first) * columns).reshape(-1, columns, rows)
    upright = heads.transpose(0, 2, 1).reshape(-1, columns)
    return np.ascontiguousarray(upright[start - first * rows : stop - first * rows])


def _read_packed(file: BinaryIO, located: _Located, block_type: BlockType) -> StoredMatrix:
    """A whole matrix as it is stored, chunk by chunk."""
    from kbit.formats.stored_planes import RowsPacker

    tensor, head = located.tensor, located.head_dim
    rows, columns = tensor.shape
    packer = RowsPacker(block_type.format, (rows, columns))
    row_bytes = tensor.nbytes // rows
    step = max(1, _CHUNK_VALUES // columns)
    if head:
        step = -(-step // head) * head
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        data = _read_at(file, located.header.path, tensor.offset + begin * row_bytes, (end - begin) * row_bytes)
        blocks = block_type.decode(data, end - begin, tensor.type.block_bytes)
        scales, offsets = (
            None if values is None else _in_order(values, located) for values in (blocks.scales, blocks.offsets)
        )
        assert scales is not None
        packer.put(begin, _in_order(blocks.codes, located), scales, offsets)
    return packer.matrix(block_type.codebook)


def _in_order(rows: npt.NDArray[Any], located: _Located) -> npt.NDArray[Any]:
    import numpy as np

    return np.ascontiguousarray(_unpermute(rows, located) if located.head_dim else rows)


def _unpermute(rows: npt.NDArray[Any], located: _Located) -> npt.NDArray[Any]:
    """Whole heads (n * D, K) from GGUF's order (row 2i + h of a head) to the canonical (row h * R/2 + i), what turns
    first."""
    import numpy as np

    width, head_dim, rotated, aside = int(rows.shape[1]), located.head_dim, located.rotated, located.aside
    heads = rows.reshape(-1, head_dim, width)
    turned, others = heads[:, aside : aside + rotated], (heads[:, :aside], heads[:, aside + rotated :])
    pairs = turned.reshape(-1, rotated // 2, 2, width).transpose(0, 2, 1, 3).reshape(-1, rotated, width)
    ordered = pairs if rotated == head_dim else np.concatenate([pairs, *others], axis=1)
    whole: npt.NDArray[Any] = ordered.reshape(-1, width)
    return whole


def _decode(data: bytes, located: _Located, rows: int) -> npt.NDArray[np.float32]:
    """Stored bytes of `rows` whole rows as float32 (rows, values per row)."""
    import numpy as np

    kind = located.tensor.type.name
    if kind in _PLAIN:
        plain: npt.NDArray[Any] = np.frombuffer(data, dtype=_PLAIN[kind])
        return plain.astype(np.float32, copy=False).reshape(rows, -1)
    if kind == "BF16":
        bits: npt.NDArray[np.uint32] = np.frombuffer(data, dtype="<u2").astype(np.uint32) << np.uint32(16)
        return bits.view(np.float32).reshape(rows, -1)
    if kind in _OWN:
        from kbit.checkpoint.gguf.blocks import BLOCK_TYPES

        blocks = BLOCK_TYPES[kind].decode(data, rows, located.tensor.type.block_bytes)
        return BLOCK_TYPES[kind].values(blocks)
    import gguf

    packed = np.frombuffer(data, dtype=np.uint8).reshape(rows, -1)
    try:
        # Scales may be Inf or NaN in a damaged file; whoever uses the values checks them, numpy need not warn.
        with np.errstate(all="ignore"):
            values: npt.NDArray[np.float32] = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind])
    except (NotImplementedError, KeyError) as error:
        raise UnsupportedError(
            f"{located.header.path}: tensor {quoted(located.tensor.name)} has type {kind}, which the installed gguf "
            "package cannot dequantize; use a file quantized to another type"
        ) from error
    return values.reshape(rows, -1)
