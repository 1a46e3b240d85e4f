"""The paged key/value cache of the Triton kernels: what a page holds, and who owns which page.

A page holds PAGE = 64 tokens of one layer for all key/value heads. Keys and values lie in two tensors of bytes, so
their widths are chosen separately:

    pages   uint8 (P, H_kv, page_bytes)

    page of one head, 16-bit kinds:   [64 tokens][D]
    page of one head, k-bit kinds:    plane | plane | .. | scales fp16 [groups][64 tokens]
    plane of width w:                 [64 tokens][D w / 8 bytes]

What the codes mean is `reference.quantize_kv`: groups of 32 features (16 where 32 does not divide D) go through a
Hadamard transform, then to 2^k levels times an fp16 scale. A code is (level + 2^k - 1) / 2, at 8 bits level + 128.
3-bit codes lie in two planes: the low 2 bits, then the top bit.

Order of a token's codes within a plane. The features of a head are cut into slabs of 16, and a slab's feature is its
lane. A lane keeps the codes of several slabs next to each other in one word of at most 32 bits, so that a kernel loads
a word per lane and each shift of it is the code of one slab: 16 features of 64 tokens, which is an operand of a tensor
core instruction (k = 16) and lies within one scale group. Slabs that share words form a chunk: a power of two of
slabs, as many as fit in 32 bits (128 features at 4 bits), the rest of D in smaller chunks (D = 80 at 4 bits: 64 + 16).
A head of more than 256 features is parts of equal size one after another (512 = 2 x 256), each with chunks as a head of
that size has them.

    chunk of C features:   lane 0 | lane 1 | .. | lane 15      each (C / 16) w bits, little endian
    lane:                  code of its first slab in the low bits, then the next slab's, ..

Pages of 64 tokens: a multiple of every tile the kernels use, so that a tile reads one entry of the block table; at 4
bits and D = 128 a page of one head is 4608 bytes, and half a page per sequence is lost on average. Memory is exactly
k bits per value plus 16 bits per group: 4.5 bits at 4 bits and D = 128.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kbit.host.errors import UnsupportedError
from kbit.kernels import reference
from kbit.kernels.triton.product.limits import (
    HEAD_LANES,
    MOST_HEAD_FEATURES,
    PART_FEATURES,
    WIDE_LANES,
    takes_heads,
)

PAGE = 64  # tokens
LANES = HEAD_LANES  # features of a slab
KINDS = ("fp16", "bf16", "8", "4", "3", "2")
PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}  # widths of a code's planes, low bits first
_FLOATS = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class KVFormat:
    """How the keys or the values of a head are kept.

    Attributes:
        kind: one of KINDS.
        head_dim: D, a multiple of 16 up to 256, or of 64 up to 576.

    Raises:
        UnsupportedError: another kind or head size.
    """

    kind: str
    head_dim: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UnsupportedError(f"a KV cache of kind {self.kind!r}: the kinds are {', '.join(KINDS)}")
        if not takes_heads(self.head_dim):
            raise UnsupportedError(
                f"heads of {self.head_dim} features: a multiple of {LANES} up to {PART_FEATURES}, or of {WIDE_LANES} "
                f"up to {MOST_HEAD_FEATURES}, is supported"
            )

    @property
    def bits(self) -> int:
        """Bits of a value: 16 for the float kinds."""
        return 16 if self.kind in _FLOATS else int(self.kind)

    @property
    def dtype(self) -> torch.dtype | None:
        """Of a float kind; None where values are codes."""
        return _FLOATS.get(self.kind)

    @property
    def groups(self) -> int:
        """Scales of a token and head."""
        return 0 if self.dtype else self.head_dim // reference.kv_group(self.head_dim)

    @property
    def page_bytes(self) -> int:
        """Of one head."""
        return PAGE * (self.head_dim * self.bits // 8 + 2 * self.groups)

    @property
    def scales_offset(self) -> int:
        """Byte of a head's page at which its scales begin."""
        return PAGE * self.head_dim * self.bits // 8

    @property
    def bits_per_value(self) -> float:
        """Scales included."""
        return 8 * self.page_bytes / (PAGE * self.head_dim)


def chunks(head_dim: int, width: int) -> list[tuple[int, int]]:
    """(first feature, features) of each chunk of a plane: powers of two of at most min(512 / width, 256)."""
    found, start, part = [], 0, part_of(head_dim)
    while start < head_dim:
        size = min(512 // width, 256, 1 << ((part - start % part).bit_length() - 1))
        found.append((start, size))
        start += size
    return found


def part_of(head_dim: int) -> int:
    """Features of the parts of a head: all, or of more than 256 the most that are a multiple of 32 and divide them."""
    return next(size for size in range(min(head_dim, PART_FEATURES), 0, -1) if _is_part(size, head_dim))


def program_part(head_dim: int, most: int) -> int:
    """Features of a head whose values one program has: those of `part_of`, or `most` where these are more and a power
    of two, so that equal shares of them lie alike in their chunks' lanes.

    Args:
        head_dim: D.
        most: a power of two from 64, or 0 for no such limit.

    Raises:
        ValueError: another limit.
    """
    if most and (most < 64 or most & (most - 1)):
        raise ValueError(f"parts of {most} features: a power of two from 64 wanted")
    part = part_of(head_dim)
    return most if most and part > most and part & (part - 1) == 0 else part


def _is_part(size: int, head_dim: int) -> bool:
    return size == head_dim or (size % 32 == 0 and head_dim % size == 0)


def pack_plane(codes: torch.Tensor, width: int) -> torch.Tensor:
    """One plane of tokens' codes: uint8 (..., D), each below 2^width -> uint8 (..., D width / 8)."""
    parts = []
    for start, size in chunks(codes.shape[-1], width):
        slabs = codes[..., start : start + size].reshape(*codes.shape[:-1], -1, LANES)
        fields = slabs.transpose(-1, -2).flatten(-2)  # lane by lane, its codes low bits first
        places = torch.arange(8 // width, device=codes.device, dtype=torch.uint8) * width
        parts.append((fields.reshape(*fields.shape[:-1], -1, 8 // width) << places).sum(-1, dtype=torch.uint8))
    return torch.cat(parts, dim=-1)


def unpack_plane(plane: torch.Tensor, width: int, head_dim: int) -> torch.Tensor:
    """The reverse of pack_plane: uint8 (..., D width / 8) -> uint8 (..., D)."""
    parts = []
    places = torch.arange(8 // width, device=plane.device, dtype=torch.uint8) * width
    for start, size in chunks(head_dim, width):
        part = plane[..., start * width // 8 : (start + size) * width // 8]
        fields = ((part[..., None] >> places) & ((1 << width) - 1)).flatten(-2)
        parts.append(fields.reshape(*fields.shape[:-1], LANES, -1).transpose(-1, -2).flatten(-2))
    return torch.cat(parts, dim=-1)


def new_pages(pages: int, kv_heads: int, format: KVFormat, device: torch.device | str = "cpu") -> torch.Tensor:
    """Memory for keys or values of one layer: zeros, uint8 (P, H_kv, page_bytes)."""
    return torch.zeros((pages, kv_heads, format.page_bytes), dtype=torch.uint8, device=device)


def write_tokens(pages: torch.Tensor, format: KVFormat, slots: torch.Tensor, x: torch.Tensor) -> None:
    """Put tokens into pages in plain torch: what `kv_append` is tested against.

    Args:
        pages: uint8 (P, H_kv, page_bytes), changed.
        format: of the pages.
        slots: int64 (N,), page * PAGE + place in the page.
        x: (N, H_kv, D), keys already rotated by `reference.rope`.
    """
    page, place = slots // PAGE, slots % PAGE
    data = pages[:, :, : format.scales_offset]
    if format.dtype:
        store = data.view(format.dtype).view(*data.shape[:2], PAGE, format.head_dim)
        store[page, :, place] = x.to(format.dtype)
        return
    levels, scales = reference.quantize_kv(x, format.bits)
    codes = (levels.int() + 128 if format.bits == 8 else (levels.int() + 2**format.bits - 1) // 2).to(torch.uint8)
    offset = shift = 0
    for width in PLANES[format.bits]:
        size = PAGE * format.head_dim * width // 8
        store = pages[:, :, offset : offset + size].view(*pages.shape[:2], PAGE, -1)
        store[page, :, place] = pack_plane((codes >> shift) & ((1 << width) - 1), width)
        offset += size
        shift += width
    store = pages[:, :, offset:].view(torch.float16).view(*pages.shape[:2], format.groups, PAGE)
    store[page, :, :, place] = scales


def read_tokens(pages: torch.Tensor, format: KVFormat, slots: torch.Tensor) -> torch.Tensor:
    """Tokens as attention understands them, in plain torch: (N, H_kv, D) float32. Arguments as for write_tokens."""
    page, place = slots // PAGE, slots % PAGE
    data = pages[:, :, : format.scales_offset]
    if format.dtype:
        return data.view(format.dtype).view(*data.shape[:2], PAGE, format.head_dim)[page, :, place].float()
    codes, offset, shift = torch.zeros((), dtype=torch.uint8, device=pages.device), 0, 0
    for width in PLANES[format.bits]:
        size = PAGE * format.head_dim * width // 8
        plane = pages[:, :, offset : offset + size].view(*pages.shape[:2], PAGE, -1)[page, :, place]
        codes = codes | (unpack_plane(plane, width, format.head_dim) << shift)
        offset += size
        shift += width
    levels = codes.int() - 128 if format.bits == 8 else codes.int() * 2 - (2**format.bits - 1)
    scales = pages[:, :, offset:].view(torch.float16).view(*pages.shape[:2], format.groups, PAGE)[page, :, :, place]
    return reference.dequantize_kv(levels, scales)


def slots_of(block_table: torch.Tensor, sequence: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Slots of tokens, on the device: page * PAGE + place.

    Args:
        block_table: int32 (B, pages of a row).
        sequence: int64 (N,), row of each token.
        positions: int64 (N,), its position in the row; negative for a token that is padding.

    Returns:
        int64 (N,); -1 for padding.
    """
    page = block_table[sequence, torch.div(positions.clamp(min=0), PAGE, rounding_mode="floor")].to(torch.int64)
    return torch.where(positions < 0, -1, page * PAGE + positions % PAGE)


def pages_for(tokens: int) -> int:
    """Pages that hold so many tokens of one sequence."""
    return -(-tokens // PAGE)


def plain_block_table(batch: int, capacity: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Row b owns the b-th run of pages: int32 (B, pages of a row). For a cache that reserves all its memory."""
    count = pages_for(capacity)
    return torch.arange(batch * count, dtype=torch.int32, device=device).view(batch, count)


def shuffled_block_table(batch: int, capacity: int, seed: int = 0) -> torch.Tensor:
    """As plain_block_table, the pages in a random order. For tests."""
    generator = torch.Generator().manual_seed(seed)
    count = pages_for(capacity)
    return torch.randperm(batch * count, generator=generator, dtype=torch.int32).view(batch, count)


def gather_row(pages: torch.Tensor, format: KVFormat, block_table: torch.Tensor, row: int, length: int) -> torch.Tensor:
    """The first `length` tokens of a row as attention understands them: (length, H_kv, D) float32."""
    positions = torch.arange(length, device=pages.device)
    return read_tokens(pages, format, slots_of(block_table, torch.full_like(positions, row), positions))


def check_pages(pages: torch.Tensor, format: KVFormat, name: str) -> None:
    """
    Raises:
        ValueError: not contiguous bytes of the format's size.
    """
    if pages.dtype != torch.uint8 or pages.ndim != 3 or not pages.is_contiguous():
        raise ValueError(f"{name}: contiguous uint8 (P, H_kv, page_bytes) wanted, not {pages.dtype} {pages.shape}")
    if pages.shape[2] != format.page_bytes:
        raise ValueError(
            f"{name}: {pages.shape[2]} bytes per page and head; kind {format.kind} of {format.head_dim} features "
            f"has {format.page_bytes}"
        )
