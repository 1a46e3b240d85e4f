"""Rows of a GGUF file's tensors: read where they are, decoded, and put in the order of canonical ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from kbit.checkpoint.gguf.metadata import GGUFHeader, GGUFTensor, quoted
from kbit.checkpoint.gguf.orders import Piece, runs
from kbit.host.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kbit.checkpoint.gguf.blocks import BlockType
    from kbit.formats.stored import StoredMatrix

# Values dequantized at a time: 4 MB of float32. gguf's dequantizers make a few temporaries of that size.
_CHUNK_VALUES = 1 << 20

# Types whose bytes are plain numbers, by numpy type; BF16 is widened from its bits, all others are block formats.
_PLAIN = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}

# Block types that the gguf package has not, or has not had for long.
_OWN = ("Q1_0", "Q2_0", "NVFP4")


@dataclass(frozen=True)
class Located:
    """A tensor, the part that holds it, and how its rows are to be put in order.

    Attributes:
        piece: the tensor, or the rows of one that holds several.
        header: of the part.
        head_dim: rows of a head, where they must be un-permuted (0: stored in order).
        rotated: how many of these are.
        aside: rows of a head before those.
        transposed: its first axis are heads, of each of which rows are columns.
    """

    piece: Piece
    header: GGUFHeader
    head_dim: int
    rotated: int
    aside: int = 0
    transposed: bool = False

    @property
    def tensor(self) -> GGUFTensor:
        return self.piece.tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor in canonical terms."""
        if not self.transposed:
            return self.tensor.shape
        heads, columns, rows = self.tensor.shape
        return heads * rows, columns


def read_at(file: BinaryIO, path: Path, offset: int, nbytes: int) -> bytes:
    """So many bytes of a file.

    Raises:
        CheckpointError: there are fewer, or they cannot be read.
    """
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


def read_into(file: BinaryIO, located: Located, start: int, stop: int, out: npt.NDArray[np.float32]) -> None:
    """Fill `out` (rows start..stop, any trailing dimensions) chunk by chunk."""
    import numpy as np

    tensor, head = located.tensor, located.head_dim
    shape, order = tensor.shape, located.piece.rows
    if len(shape) == 1:
        # A vector is one row of blocks: decode all of it, then cut.
        row = _decode(read_at(file, located.header.path, tensor.offset, tensor.nbytes), located, 1)
        if order is not None:
            row = row[:, order.places(shape[0])]
        if located.piece.decays:
            with np.errstate(all="ignore"):  # whoever uses the values checks them
                row = np.log(-row)
        out[:] = _unpermute(row.reshape(-1, 1), located)[start:stop, 0] if head else row[0, start:stop]
        return
    width = 1
    for dim in shape[1:]:
        width *= dim
    flat = out.reshape(stop - start, width)
    row_bytes = tensor.nbytes // shape[0]
    step = max(1, _CHUNK_VALUES // width)
    first, columns = start, _columns(located)
    if order is not None:
        for at, place, count in runs(order.places(shape[0])[start:stop], step):
            data = read_at(file, located.header.path, tensor.offset + place * row_bytes, count * row_bytes)
            flat[at : at + count] = _decode(data, located, count)
        return
    if head:
        # Rows move only inside their head, so whole heads are read and the wanted rows kept.
        step = -(-step // head) * head
        first = start // head * head
    for begin in range(first, stop, step):
        end = min(begin + step, -(-stop // head) * head if head else stop)
        data = read_at(file, located.header.path, tensor.offset + begin * row_bytes, (end - begin) * row_bytes)
        rows = _decode(data, located, end - begin)
        if head:
            rows = _unpermute(rows, located)
        if columns is not None:
            rows = rows[:, columns]
        low, high = max(begin, start), min(end, stop)
        flat[low - start : high - start] = rows[low - begin : high - begin]


def read_transposed(file: BinaryIO, located: Located, start: int, stop: int) -> npt.NDArray[np.float32]:
    """Rows [start, stop) of a tensor whose heads lie down."""
    import numpy as np

    _, columns, rows = located.tensor.shape
    head_bytes = located.tensor.nbytes // located.tensor.shape[0]
    first, last = start // rows, -(-stop // rows)
    data = read_at(file, located.header.path, located.tensor.offset + first * head_bytes, (last - first) * head_bytes)
    heads = _decode(data, located, (last - first) * columns).reshape(-1, columns, rows)
    upright = heads.transpose(0, 2, 1).reshape(-1, columns)
    return np.ascontiguousarray(upright[start - first * rows : stop - first * rows])


def read_packed(file: BinaryIO, located: Located, block_type: BlockType) -> StoredMatrix:
    """A whole matrix as it is stored, chunk by chunk."""
    import numpy as np

    from kbit.formats.stored_planes import RowsPacker

    tensor, head = located.tensor, located.head_dim
    rows, columns = tensor.shape
    block, moved = block_type.format.block_size or columns, _columns(located)
    if moved is not None and not all(_whole_blocks(moved, block)):
        raise UnsupportedError(
            f"{located.header.path}: {tensor.name} has blocks of {block} columns across heads, which kbit puts in "
            "another order; use a file quantized to another type"
        )
    packer = RowsPacker(block_type.format, (rows, columns))
    row_bytes = tensor.nbytes // rows
    step = max(1, _CHUNK_VALUES // columns)
    if head:
        step = -(-step // head) * head
    order = located.piece.rows
    places = np.arange(rows) if order is None else order.places(rows)
    for begin, place, count in runs(places, step):
        data = read_at(file, located.header.path, tensor.offset + place * row_bytes, count * row_bytes)
        blocks = block_type.decode(data, count, tensor.type.block_bytes)
        codes, scales, offsets = (
            None if values is None else _in_order(values, located)
            for values in (blocks.codes, blocks.scales, blocks.offsets)
        )
        assert codes is not None
        assert scales is not None
        if moved is not None:
            codes = np.ascontiguousarray(codes[:, moved])
            of_block = moved[::block] // block
            scales, offsets = scales[:, of_block], None if offsets is None else offsets[:, of_block]
        packer.put(begin, codes, scales, offsets)
    return packer.matrix(block_type.codebook)


def _columns(located: Located) -> npt.NDArray[np.int64] | None:
    """Where each column of a tensor is; None: in order."""
    order = located.piece.columns
    return None if order is None else order.places(located.tensor.shape[1])


def _whole_blocks(places: npt.NDArray[np.int64], block: int) -> npt.NDArray[np.bool_]:
    """Whether every block of columns is one of the file's."""
    first = places[::block]
    whole: npt.NDArray[np.bool_] = (first % block == 0) & (places[block - 1 :: block] == first + block - 1)
    return whole


def _in_order(rows: npt.NDArray[Any], located: Located) -> npt.NDArray[Any]:
    import numpy as np

    return np.ascontiguousarray(_unpermute(rows, located) if located.head_dim else rows)


def _unpermute(rows: npt.NDArray[Any], located: Located) -> npt.NDArray[Any]:
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


def _decode(data: bytes, located: Located, rows: int) -> npt.NDArray[np.float32]:
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
