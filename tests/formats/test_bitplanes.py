"""Bit planes: the compiled routines, those of torch and numpy, and a loop over single bits agree, and round trips lose nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kbit import _native
from kbit.formats.plane_codes import pack_plane_numpy, unpack_plane_numpy
from kbit.formats.planes import pack, pack_plane_torch, unpack, unpack_plane_torch
from kbit.formats.quant_format import plane_widths

BITS = range(2, 9)


def random_codes(rows: int, columns: int, bits: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)


def pack_bit_by_bit(codes: list[list[int]], width: int, shift: int) -> list[list[int]]:
    """One plane, from the layout's definition: bit j of code i is bit i * width + j of the row."""
    plane = []
    for row in codes:
        row_bytes = [0] * ((len(row) * width + 7) // 8)
        for i, code in enumerate(row):
            for j in range(width):
                position = i * width + j
                row_bytes[position // 8] |= (code >> (shift + j) & 1) << (position % 8)
        plane.append(row_bytes)
    return plane


shapes = st.tuples(st.integers(1, 5), st.integers(1, 70))


@given(st.sampled_from(BITS), shapes, st.integers(0, 2**32))
@settings(deadline=None)
def test_native_torch_numpy_and_bit_loop_pack_alike(bits: int, shape: tuple[int, int], seed: int) -> None:
    codes = random_codes(*shape, bits, seed)
    planes = pack(codes, bits)
    shift = 0
    for width, plane in zip(plane_widths(bits), planes, strict=True):
        expected = pack_bit_by_bit(codes.tolist(), width, shift)
        assert plane.dtype == torch.uint8
        assert plane.tolist() == expected
        assert pack_plane_torch(codes, width, shift).tolist() == expected
        ours = torch.full_like(plane, 0xFF)
        pack_plane_numpy(codes, width, shift, ours)
        assert torch.equal(ours, plane)
        shift += width


@given(st.sampled_from(BITS), shapes, st.integers(0, 2**32))
@settings(deadline=None)
def test_round_trip(bits: int, shape: tuple[int, int], seed: int) -> None:
    codes = random_codes(*shape, bits, seed)
    planes = pack(codes, bits)
    assert torch.equal(unpack(planes, bits, shape[1]), codes)
    shift, together, ours = 0, torch.zeros_like(codes), torch.full_like(codes, 0xFF)
    for width, plane in zip(plane_widths(bits), planes, strict=True):
        unpack_plane_numpy(plane, width, shift, shift == 0, ours)
        together |= unpack_plane_torch(plane, width, shift, shape[1])
        shift += width
    assert torch.equal(together, codes)
    assert torch.equal(ours, codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [1, 2, 3, 7, 8, 9, 15, 16, 17, 63, 64, 65, 127, 4096, 4097])
def test_bytes_are_exact_and_padding_is_zero(bits: int, columns: int) -> None:
    codes = torch.full((3, columns), 2**bits - 1, dtype=torch.uint8)  # all ones: a stray bit would show
    for width, plane in zip(plane_widths(bits), pack(codes, bits), strict=True):
        assert plane.shape == (3, (columns * width + 7) // 8)
        ones = int(np.unpackbits(plane.numpy()).sum())
        assert ones == 3 * columns * width
        used = columns * width % 8
        if used:
            assert set(plane[:, -1].tolist()) == {2**used - 1}


@pytest.mark.parametrize("bits", BITS)
def test_every_code_in_every_position_of_a_byte(bits: int) -> None:
    count = 2**bits
    codes = torch.stack([torch.arange(count).roll(shift) for shift in range(8)]).to(torch.uint8)
    assert torch.equal(unpack(pack(codes, bits), bits, count), codes)


def test_neighbouring_rows_do_not_touch() -> None:
    codes = torch.zeros((3, 5), dtype=torch.uint8)
    codes[1] = 7
    high = torch.tensor([[0, 0], [0xFF, 0x03], [0, 0]], dtype=torch.uint8)
    low = torch.tensor([[0], [0x1F], [0]], dtype=torch.uint8)
    planes = pack(codes, 3)
    assert torch.equal(planes[0], high)
    assert torch.equal(planes[1], low)


def test_pack_takes_the_low_bits_only() -> None:
    codes = torch.full((1, 8), 0xFF, dtype=torch.uint8)
    assert [plane.tolist() for plane in pack(codes, 3)] == [[[0xFF, 0xFF]], [[0xFF]]]


@pytest.mark.parametrize("bits", BITS)
def test_strided_inputs(bits: int) -> None:
    wide = random_codes(14, 90, bits, seed=bits)
    for codes in (wide.t(), wide[:, ::3], wide[::2, 1:], wide[:, 5:6], wide[3:4].expand(4, 90)):
        planes = pack(codes, bits)
        assert torch.equal(unpack(planes, bits, codes.shape[1]), codes)
        # Planes that are views (rows of a larger tensor, a transposed one) unpack alike.
        views = [torch.stack([plane, plane], dim=2)[:, :, 0] for plane in planes]
        assert not any(view.is_contiguous() for view in views if view.numel() > 1)
        assert torch.equal(unpack(views, bits, codes.shape[1]), codes)


def test_empty_matrices() -> None:
    for shape in ((0, 5), (5, 0), (0, 0)):
        codes = torch.zeros(shape, dtype=torch.uint8)
        assert unpack(pack(codes, 3), 3, shape[1]).shape == shape
        plane = torch.empty((shape[0], -(-shape[1] // 4)), dtype=torch.uint8)
        pack_plane_numpy(codes, 2, 0, plane)
        unpack_plane_numpy(plane, 2, 0, True, codes)


@pytest.mark.parametrize("bits", BITS)
def test_unpack_overwrites_what_was_there(bits: int) -> None:
    """The first plane writes, the others OR: a buffer full of old bits must not shine through."""
    codes = random_codes(3, 19, bits, seed=1)
    buffer = torch.full((3, 19), 0xFF, dtype=torch.uint8)
    shift = 0
    for width, plane in zip(plane_widths(bits), pack(codes, bits), strict=True):
        _native.unpack_plane(plane, width, shift, shift == 0, buffer)
        shift += width
    assert torch.equal(buffer, codes)


def test_pack_overwrites_what_was_there() -> None:
    plane = torch.full((2, 3), 0xFF, dtype=torch.uint8)
    _native.pack_plane(torch.zeros((2, 5), dtype=torch.uint8), 4, 0, plane)
    assert not plane.any()


def byte_tensor(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


BAD_CALLS = {
    "width 0": (byte_tensor(2, 8), 0, 0, byte_tensor(2, 0)),
    "width 3": (byte_tensor(2, 8), 3, 0, byte_tensor(2, 3)),
    "width 16": (byte_tensor(2, 8), 16, 0, byte_tensor(2, 16)),
    "shift past the byte": (byte_tensor(2, 8), 1, 8, byte_tensor(2, 1)),
    "shift and width past the byte": (byte_tensor(2, 8), 2, 7, byte_tensor(2, 2)),
    "a shift that wraps around to 0": (byte_tensor(2, 8), 1, 2**32 - 1, byte_tensor(2, 1)),
    "plane too short": (byte_tensor(2, 9), 1, 0, byte_tensor(2, 1)),
    "plane too long": (byte_tensor(2, 8), 1, 0, byte_tensor(2, 2)),
    "plane of the next width": (byte_tensor(2, 8), 4, 0, byte_tensor(2, 2)),
    "too few plane rows": (byte_tensor(2, 8), 8, 0, byte_tensor(1, 8)),
    "too many plane rows": (byte_tensor(2, 8), 8, 0, byte_tensor(3, 8)),
    "same bytes in another shape": (byte_tensor(2, 8), 8, 0, byte_tensor(4, 4)),
}
BAD_TYPES = {
    "negative shift": (byte_tensor(2, 8), 1, -1, byte_tensor(2, 1)),
    "codes of one dimension": (byte_tensor(8), 1, 0, byte_tensor(1, 1)),
    "codes of three dimensions": (byte_tensor(1, 2, 8), 1, 0, byte_tensor(2, 1)),
    "plane of one dimension": (byte_tensor(2, 8), 1, 0, byte_tensor(2)),
    "int8 codes": (byte_tensor(2, 8).to(torch.int8), 1, 0, byte_tensor(2, 1)),
    "int64 codes": (byte_tensor(2, 8).long(), 1, 0, byte_tensor(2, 1)),
    "float plane": (byte_tensor(2, 8), 1, 0, byte_tensor(2, 1).float()),
    "transposed codes": (byte_tensor(8, 2).t(), 1, 0, byte_tensor(2, 1)),
    "strided codes": (byte_tensor(2, 16)[:, ::2], 1, 0, byte_tensor(2, 1)),
    "strided plane": (byte_tensor(2, 8), 2, 0, byte_tensor(2, 4)[:, ::2]),
    "a list": ([[0] * 8] * 2, 1, 0, byte_tensor(2, 1)),
    "None": (None, 1, 0, byte_tensor(2, 1)),
    "fractional width": (byte_tensor(2, 8), 1.5, 0, byte_tensor(2, 1)),
    "tensor on another device": (byte_tensor(2, 8).to("meta"), 1, 0, byte_tensor(2, 1)),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_native_refuses_wrong_values(case: str) -> None:
    codes, width, shift, plane = BAD_CALLS[case]
    with pytest.raises(ValueError, match="must"):
        _native.pack_plane(codes, width, shift, plane)
    for first in (True, False):
        with pytest.raises(ValueError, match="must"):
            _native.unpack_plane(plane, width, shift, first, codes)


@pytest.mark.parametrize("case", BAD_TYPES)
def test_native_refuses_wrong_types(case: str) -> None:
    codes, width, shift, plane = BAD_TYPES[case]
    with pytest.raises((TypeError, ValueError, BufferError, RuntimeError)):
        _native.pack_plane(codes, width, shift, plane)  # type: ignore[arg-type]
    with pytest.raises((TypeError, ValueError, BufferError, RuntimeError)):
        _native.unpack_plane(plane, width, shift, True, codes)  # type: ignore[arg-type]


def test_native_accepts_numpy_arrays_and_leaves_read_only_ones_alone() -> None:
    codes = np.arange(16, dtype=np.uint8).reshape(2, 8)
    codes.flags.writeable = False
    plane = np.zeros((2, 4), dtype=np.uint8)
    _native.pack_plane(codes, 4, 0, plane)  # type: ignore[arg-type]
    assert plane.tolist() == [[0x10, 0x32, 0x54, 0x76], [0x98, 0xBA, 0xDC, 0xFE]]
    with pytest.raises((TypeError, ValueError)):  # the output may not be read-only
        _native.unpack_plane(plane, 4, 0, True, codes)  # type: ignore[arg-type]


def test_unpack_refuses_planes_of_another_width() -> None:
    planes = pack(random_codes(4, 40, 3, seed=0), 3)
    with pytest.raises(ValueError, match="argument"):
        unpack(planes[:1], 3, 40)
    with pytest.raises(ValueError, match="must have shape"):
        unpack(planes, 3, 48)
    with pytest.raises(ValueError, match="must have shape"):
        unpack(planes[::-1], 3, 40)
