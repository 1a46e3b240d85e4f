"""The trellis codec: its name, what it stores, what its bits mean, rotations, cutting."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from trellis_cases import level, ring_windows, trellis_tensor

from kbit import _native
from kbit.formats.codec import Cut
from kbit.formats.registry import kind_of, parse_format
from kbit.formats.rotation import new_signs, rotate, rotate_factor, sign_values, unrotate
from kbit.formats.trellis import TrellisFormat
from kbit.formats.trellis_code import normal_error, search
from kbit.host.errors import KbitError, UnsupportedError, UsageError

FORMATS = (
    *(f"trellis{bits}" for bits in range(2, 9)),
    "trellis2-sum4",
    "trellis2-l12",
    "trellis3-l12-h128",
    "trellis4-l9",
    "trellis6-h16",
    "trellis8-h64",
    "trellis2.5",
    "trellis3.5-l12-h128",
    "trellis4.5",
    "trellis5.5-l12",
    "trellis2-sum4-l12-h128-o64",
    "trellis8-o4",
)


@pytest.mark.parametrize("text", FORMATS)
def test_a_name_says_everything(text: str) -> None:
    format = parse_format(text)
    assert isinstance(format, TrellisFormat)
    assert str(format) == text
    assert parse_format(str(format)) == format


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trellis", "write trellis2 to trellis8"),
        ("trellis9", "use trellis2 to trellis8"),
        ("trellis1", "use trellis2 to trellis8"),
        ("trellis3-sum2", "only 2 bits"),
        ("trellis2.5-sum2", "only 2 bits have the code sum2; write trellis2.5"),
        ("trellis1.5", "use trellis2 to trellis8"),
        ("trellis6.5", "trellis2.5 to trellis5.5"),
        ("trellis2.25", "trellis2.5 to trellis5.5"),
        ("trellis5.5-l10", "trellis5.5: a window has 11 to 16 bits"),
        ("trellis3-sum5", "sum2, sum4"),
        ("trellis7-sum4", "integers"),
        ("trellis8-l12", "integers"),
        ("trellis3-l17", "8 to 16"),
        ("trellis6-l8", "12 to 16"),
        ("trellis4-l8", "9 to 16"),  # what the search takes
        ("trellis3-h100", "power of two"),
        ("trellis3-h1024", "power of two"),
        ("trellis3-h0", "no format"),
        ("trellis3-h128-l12", "in this order"),
        ("trellis3-o4-h128", "in this order"),
        ("trellis3-o0", "no weights apart"),
        ("trellis3-o70000", "65536 are the most"),
    ],
)
def test_what_is_no_format_is_said(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_format(text)


def test_bytes_are_counted_with_what_fills_up_tiles() -> None:
    format = parse_format("trellis3")
    assert format.nbytes(1024, 1024) == 1024 * 1024 * 3 // 8 + 2 * 1024 + 1024 // 8
    assert format.bits_per_weight(1024, 1024) == pytest.approx(3 + 16 / 1024 + 1 / 1024)
    assert format.nbytes(17, 33) == 2 * 3 * 96 + 2 * 17 + 48 // 8
    assert parse_format("trellis2.5").nbytes(17, 33) == 2 * 3 * 80 + 2 * 17 + 48 // 8
    stored = format.encode(lambda start, stop: torch.randn(stop - start, 33), (17, 33))
    assert stored.nbytes == format.nbytes(17, 33)


@pytest.mark.parametrize("text", FORMATS)
def test_decoding_is_what_the_bits_say(text: str) -> None:
    weight = trellis_tensor(text, 21, 40)
    format = weight.format
    assert isinstance(format, TrellisFormat)
    rotated = format.decode_rotated(weight, slice(0, 21))
    for tile_row, tile_column in ((0, 0), (1, 2)):
        ring = weight.stored["codes"][tile_row, tile_column].numpy()
        windows = ring_windows(ring, format.bits, format.window, format.half)
        for row in range(16 * tile_row, min(16 * tile_row + 16, 21)):
            for column in range(16):
                number = level(format.code, windows[16 * (row % 16) + column], format.bits)
                expected = number * format.step * float(weight.stored["scales"][row, 0])
                assert float(rotated[row, 16 * tile_column + column]) == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("text", ["trellis2", "trellis3", "trellis3.5-o32", "trellis7"])
def test_rows_are_decoded_alone(text: str) -> None:
    weight = trellis_tensor(text, 40, 48)
    whole = weight.dequantize()
    assert whole.shape == (40, 48)
    assert torch.equal(weight.dequantize_rows(torch.tensor([39, 0, 17])), whole[[39, 0, 17]])
    assert torch.equal(weight.format.decode(weight, slice(13, 35)), whole[13:35])


@pytest.mark.parametrize("columns", [16, 40, 576, 1536, 8960, 14336])
def test_rotations(columns: int) -> None:
    format, signs = TrellisFormat(3), new_signs(columns)
    mixed = format.columns_mixed(columns)
    padded = -(-columns // 16) * 16
    assert padded % mixed == 0
    assert (padded // mixed) % 2 == 1 or mixed == 512
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, signs, mixed)
    hadamard = torch.ones(1, 1)
    while len(hadamard) < mixed:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard)
    full = torch.nn.functional.pad(x, (0, padded - columns)) * sign_values(signs)
    expected = (full.view(3, -1, mixed).double() @ hadamard.double()).flatten(1) / mixed**0.5
    assert torch.allclose(turned.double(), expected, atol=1e-5)
    assert torch.allclose(unrotate(turned, signs, mixed)[:, :columns], x, atol=1e-5)
    assert 0.3 < float((sign_values(signs) < 0).float().mean()) < 0.7


def test_products_and_factors_are_those_of_rotated_columns() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(5, 96, generator=generator), torch.randn(96, 200, generator=generator)
    signs = new_signs(96)
    rotated_x = rotate(x.T, signs, 32)
    assert torch.allclose(rotate(weight, signs, 32) @ rotated_x.T, weight @ x, atol=1e-4)
    assert torch.allclose(rotate_factor(x @ x.T, signs, 32), rotated_x.T @ rotated_x, atol=1e-3)


@pytest.mark.parametrize("shape", [(33, 100), (16, 16), (1, 1), (50, 576)])
def test_encoding_rounds_to_what_is_near(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    for text, most in (("trellis2-l12", 0.12), ("trellis4-l12", 0.01), ("trellis8", 1e-3)):
        coded = parse_format(text).encode(lambda start, stop: weight[start:stop], shape)
        error = (coded.dequantize() - weight).square().mean() / weight.square().mean()
        assert float(error) < (most if weight.numel() > 200 else 3.0)


def test_longer_windows_are_nearer_to_normal_numbers() -> None:
    """QTIP's figures for windows of 16 bits, and a share of them (`normal_error`)."""
    for bits, near in ((2, 0.069), (3, 0.0176), (4, 0.0045)):
        errors = [normal_error(TrellisFormat(bits, "sum4", window)) for window in (10, 12, 16)]
        assert errors == sorted(errors, reverse=True)
        assert errors[2] == pytest.approx(near, rel=0.03)
        assert errors[2] < 1.18 * 4.0**-bits
    assert normal_error(TrellisFormat(8)) == pytest.approx(8.7e-5, rel=0.03)


def test_half_widths_lie_between_whole_ones() -> None:
    """Where errors of a code fall by the same share with every half bit: the geometric mean of its neighbours' errors,
    and well below the mean, which is what half the matrices at each of these would have."""
    for bits in (2, 3, 5):
        below, half, above = (
            normal_error(format)
            for format in (
                TrellisFormat(bits, "sum4", 12), TrellisFormat(bits, window=12, half=True), TrellisFormat(bits + 1, window=12)
            )
        )  # fmt: skip
        assert half == pytest.approx((below * above) ** 0.5, rel=0.06)
        assert half < 0.87 * (below + above) / 2


def test_what_cannot_be_encoded_is_said() -> None:
    format = parse_format("trellis3-l12")
    weight = torch.ones(16, 32)
    weight[3, 4] = torch.nan
    with pytest.raises(KbitError, match="q: 1 weights are NaN"):
        format.encode(lambda start, stop: weight[start:stop], (16, 32), name="q")
    with pytest.raises(KbitError, match="q: .*do not fit fp16: leave this tensor unquantized: --override 'q=keep'"):
        format.encode(lambda start, stop: torch.full((stop - start, 32), 1e6), (16, 32), name="q")
    with pytest.raises(KbitError, match="q: .*below the normal fp16 range: leave"):
        format.encode(lambda start, stop: torch.full((stop - start, 32), 1e-9), (16, 32), name="q")
    zeros = format.encode(lambda start, stop: torch.zeros(stop - start, 32), (16, 32))
    assert torch.equal(zeros.dequantize(), torch.zeros(16, 32))


@pytest.mark.parametrize("text", ["trellis3-h64", "trellis2", "trellis2.5-o64", "trellis8"])
def test_parts_hold_the_same_values(text: str) -> None:
    weight = trellis_tensor(text, 48, 192)
    whole = weight.dequantize()
    for cut in (Cut(0, 16, 48), Cut(1, 64, 192), Cut(1, 0, 64)):
        part = weight.cut(cut)
        assert torch.equal(part.dequantize(), cut.of(whole))
        assert part.nbytes == part.format.nbytes(*part.shape)
    with pytest.raises(UnsupportedError, match="whole tiles"):
        weight.cut(Cut(0, 8, 48))
    with pytest.raises(UnsupportedError, match="whole blocks"):
        weight.cut(Cut(1, 16, 192))


def test_other_widths_beside_it() -> None:
    assert str(parse_format("trellis3").at_width(6)) == "lloyd6-b64"
    assert str(parse_format("trellis3").at_width(3)) == "nf3-b64"  # a trellis is not looked up row by row
    fast = TrellisFormat(3, window=12)
    assert [str(fast.with_bits(bits)) for bits in (2, 6, 8)] == ["trellis2-l12", "trellis6-l12", "trellis8"]
    apart = TrellisFormat(3, outliers=16)
    assert [str(apart.with_bits(bits)) for bits in (2, 7)] == ["trellis2-o16", "trellis7-o16"]
    assert str(apart.with_short_windows().keeping(0)) == "trellis3-l12"
    assert kind_of("trellis3-l12-o64") == "trellis3-l12"
    assert kind_of("nested2..8-b64") == "nested2..8-b64"
    assert [str(fast.with_bits(bits)) for bits in (2.5, 5.5)] == ["trellis2.5-l12", "trellis5.5-l12"]


def test_threads_that_search_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a context of its own (a shared one would let them take turns), and finds what one alone finds."""
    format = parse_format("trellis2-l9")
    assert isinstance(format, TrellisFormat)
    tiles = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(0))
    alone = [search(format, some, 1) for some in tiles]
    at_once, contexts, native = Barrier(2, timeout=60), [], _native.trellis_search

    def spied(*arguments: object) -> None:
        at_once.wait()
        contexts.append(next(one for one in arguments if isinstance(one, _native.Context)))
        native(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(_native, "trellis_search", spied)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda some: search(format, some, 1), tiles))
    assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))
    assert contexts[0] is not contexts[1]
