"""The paged cache: its layout round-trips, and appending gives what the reference does, to rounding."""

from __future__ import annotations

import pytest
import torch
from triton_cases import DTYPES, HALF

triton = pytest.importorskip("triton")

from kbit.gpu_check.attention import check_append  # noqa: E402
from kbit.host.errors import UnsupportedError  # noqa: E402
from kbit.kernels import reference  # noqa: E402
from kbit.kernels.triton.attention.kv_append import kv_append  # noqa: E402
from kbit.kernels.triton.attention.kv_layout import (  # noqa: E402
    KINDS,
    PAGE,
    KVFormat,
    chunks,
    new_pages,
    pack_plane,
    plain_block_table,
    read_tokens,
    slots_of,
    unpack_plane,
    write_tokens,
)

DIMS = [16, 32, 48, 64, 80, 96, 112, 128, 160, 256, 320, 512]


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind: str, dim: int) -> None:
    """What is written to scattered slots is read back as the reference's values."""
    format = KVFormat(kind, dim)
    pages = new_pages(5, 3, format)
    x = torch.randn(70, 3, dim, generator=torch.Generator().manual_seed(dim))
    slots = torch.randperm(5 * PAGE, generator=torch.Generator().manual_seed(1))[:70]
    write_tokens(pages, format, slots, x)
    if format.dtype:
        expected = x.to(format.dtype).float()
    else:
        expected = reference.dequantize_kv(*reference.quantize_kv(x, format.bits))
    assert torch.equal(read_tokens(pages, format, slots), expected)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("width", [8, 4, 2, 1])
def test_planes(width: int, dim: int) -> None:
    codes = torch.randint(0, 2**width, (7, dim), dtype=torch.uint8, generator=torch.Generator().manual_seed(dim))
    plane = pack_plane(codes, width)
    assert plane.shape == (7, dim * width // 8)
    assert torch.equal(unpack_plane(plane, width, dim), codes)
    assert chunks(dim, width)[0][0] == 0
    assert sum(size for _, size in chunks(dim, width)) == dim


def test_order_of_codes() -> None:
    """As the picture in the module says: D = 32 at 4 bits, a byte per lane, the second slab in its upper half."""
    codes = torch.arange(32, dtype=torch.uint8)[None] % 16
    assert pack_plane(codes, 4)[0].tolist() == [lane | lane << 4 for lane in range(16)]


def test_sizes() -> None:
    assert KVFormat("4", 128).bits_per_value == 4.5
    assert KVFormat("3", 128).bits_per_value == 3.5
    assert KVFormat("2", 80).bits_per_value == 3.0  # groups of 16
    assert KVFormat("fp16", 96).bits_per_value == 16.0


@pytest.mark.parametrize(("kind", "dim"), [("5", 64), ("fp32", 64), ("4", 40), ("4", 8), ("8", 272), ("4", 640)])
def test_unsupported_formats(kind: str, dim: int) -> None:
    with pytest.raises(UnsupportedError):
        KVFormat(kind, dim)


def test_slots() -> None:
    table = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)
    slots = slots_of(table, torch.tensor([0, 0, 1, 1]), torch.tensor([5, 64, 127, -1]))
    assert slots.tolist() == [3 * 64 + 5, 64, 2 * 64 + 63, -1]
    assert plain_block_table(2, 65).tolist() == [[0, 1], [2, 3]]


# Every kind at every head size, as keys or as values; those that are left, as the other, at a few: what a kind writes
# does not depend on which of the two it is.
APPENDED = [(kinds, dim) for kinds in (("fp16", "8"), ("4", "3"), ("2", "bf16")) for dim in DIMS]
APPENDED += [(kinds, dim) for kinds in (("8", "4"), ("3", "2")) for dim in (48, 64, 256)]


@pytest.mark.parametrize(("kinds", "dim"), APPENDED)
def test_append(kinds: tuple[str, str], dim: int, device: str) -> None:
    check_append(device, kinds, (6, 3, dim))


@pytest.mark.parametrize("dtype", DTYPES)
def test_append_types(dtype: torch.dtype, device: str) -> None:
    check_append(device, ("4", "fp16"), (4, 2, 64), dtype)
    check_append(device, ("bf16", "bf16"), (4, 2, 32), dtype)


def test_append_partial_rotation_and_one_head(device: str) -> None:
    check_append(device, ("4", "4"), (5, 5, 64), half=8)
    check_append(device, ("3", "8"), (3, 1, 48), half=12, by_position=False)


def test_append_without_rotation(device: str) -> None:
    check_append(device, ("4", "2"), (2, 2, 32), half=0)


@pytest.mark.parametrize("dtype", HALF)
def test_append_nothing(dtype: torch.dtype, device: str) -> None:
    pages = new_pages(1, 1, KVFormat("4", 16), device)
    x = torch.empty(0, 1, 16, dtype=dtype, device=device)
    slots = torch.empty(0, dtype=torch.int64, device=device)
    assert kv_append(x, x, x, None, None, slots, pages, pages.clone(), k_kind="4", v_kind="4").shape == (0, 1, 16)


def test_append_refuses(device: str) -> None:
    format = KVFormat("4", 32)
    pages = new_pages(2, 2, format, device)
    x = torch.zeros(3, 2, 32, dtype=torch.float16, device=device)
    slots = torch.zeros(3, dtype=torch.int64, device=device)
    table = torch.zeros(3, 16, device=device)

    def call(**changes: object) -> None:
        given = {"q": x, "k": x, "v": x, "cos": table, "sin": table, "slots": slots, "k_pages": pages, "v_pages": pages}
        kv_append(**{**given, "k_kind": "4", "v_kind": "4", **changes})  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="bytes per page"):
        call(k_kind="3")
    with pytest.raises(ValueError, match="belong together"):
        call(v=x[:2])
    with pytest.raises(ValueError, match="contiguous, not strides"):
        call(k=x.transpose(0, 1).contiguous().transpose(0, 1))
    with pytest.raises(ValueError, match="both or none"):
        call(sin=None)
    with pytest.raises(ValueError, match="rows of cosines"):
        call(cos=table[:2], sin=table[:2])
    with pytest.raises(ValueError, match="float32"):
        call(cos=table.half(), sin=table.half())
    with pytest.raises(ValueError, match="one entry"):
        call(slots=slots[:2])
    with pytest.raises(ValueError, match="query heads"):
        call(q=torch.zeros(3, 3, 32, dtype=torch.float16, device=device))
    with pytest.raises(UnsupportedError, match="kind '6'"):
        call(v_kind="6")
