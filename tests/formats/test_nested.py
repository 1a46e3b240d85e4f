"""The nested codec: one store for several widths, against the codebooks and formats made for each."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kbit.formats.blockwise import quantize_blockwise
from kbit.formats.codec import Cut
from kbit.formats.lloyd import Moments, lloyd_codebook
from kbit.formats.nested import NestedFormat, parse_widths
from kbit.formats.nested_codebooks import codes_of_places, nested_codebook
from kbit.formats.nested_codec import codes_at, narrowed, scales_at, stored_factors
from kbit.formats.planes import pack_plane_torch
from kbit.formats.quant_format import QuantFormat
from kbit.formats.quant_tensor import QuantTensor
from kbit.formats.registry import parse_format
from kbit.host.errors import KbitError, UnsupportedError, UsageError


def encode(x: torch.Tensor, text: str) -> QuantTensor:
    return parse_format(text).encode(lambda start, stop: x[start:stop].float(), (x.shape[0], x.shape[1]))


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("text", ["nested2..8-b64", "nested3..3-row", "nested4..7-b128-bf16", "nested2..5-row-fp32"])
def test_strings_are_read_back(text: str) -> None:
    assert str(parse_format(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nested", "written as in nested2..8-b64"),
        ("nested8..2-b64", r"nested widths 8..2: write the narrowest"),
        ("nested1..4-b64", r"nested widths 1..4"),
        ("nested2..9-b64", r"nested widths 2..9"),
        ("nested2..8-b0", "write -row"),
        ("nested2..8-b24", "block size 24"),
        ("nested2..8-b64-fp8", "scale type 'fp8'"),
    ],
)
def test_other_strings_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_format(text)


def test_widths_are_written_as_a_range() -> None:
    assert parse_widths("2..8") == (2, 8)
    for text in ("2-8", "2..", "8..2", "2..9"):
        with pytest.raises(UsageError):
            parse_widths(text)


def expected_error(levels: np.ndarray, block_size: int) -> float:
    """The squared error that a codebook is expected to have, in units that only the block size decides."""
    moments = Moments.of(block_size)
    magnitudes = np.sort(levels[levels > 0].astype(np.float64))
    borders = np.concatenate([[0.0], (magnitudes[:-1] + magnitudes[1:]) / 2, [1.0]])
    mass, moment = moments.of_cells(borders)
    centre = (moments.edges[1:] + moments.edges[:-1]) / 2
    second = float((np.diff(moments.mass) * centre**2).sum()) + moments.atom
    return second - float((2 * magnitudes * moment - magnitudes**2 * mass).sum())


@pytest.mark.parametrize(("width", "most"), [(2, 1.0001), (3, 1.006), (4, 1.008), (5, 1.035), (6, 1.14)])
def test_cutting_cells_again_and_again_costs_little(width: int, most: float) -> None:
    format = NestedFormat(2, 8, 64)
    nested = format.codebook(64)[format.levels_at(width)]
    ratio = expected_error(nested, 64) / expected_error(lloyd_codebook(width, 64), 64)
    assert 0.9999 < ratio < most


@pytest.mark.parametrize("block", [16, 64, 1024])
@pytest.mark.parametrize("low", [2, 3, 5])
def test_every_cell_lies_in_the_one_that_its_lower_bits_name(low: int, block: int) -> None:
    books = NestedFormat(low, 8, block)
    book = nested_codebook(low, 8, block)
    for width in range(low + 1, 9):
        outer, inner = (book[books.levels_at(w)] for w in (width - 1, width))
        places = codes_of_places(width)
        assert sorted(places) == list(range(2**width))
        assert (np.diff(inner[places]) >= 0).all()  # ascending; equal only where 8 bits are finer than whole steps
        children = np.stack([inner[: 2 ** (width - 1)], inner[2 ** (width - 1) :]])
        if width < 8:
            assert (children[0] < children[1]).all()
            assert (children[0] < outer).all()
            assert (outer < children[1]).all()
    eight = book[books.levels_at(8)]
    steps = eight / eight.max() * 127
    assert np.abs(steps - np.round(steps)).max() < 1e-4


@pytest.mark.parametrize("text", ["nested2..8-b64", "nested3..6-row-bf16", "nested2..4-b16-fp32"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 44), (17, 200)])
def test_a_width_is_decoded_as_its_definition_says(text: str, shape: tuple[int, int]) -> None:
    matrix = encode(gaussian(*shape), text)
    format = matrix.format
    assert isinstance(format, NestedFormat)
    assert matrix.nbytes == format.nbytes(*shape)
    codes = codes_at(format, matrix.stored, shape[1], format.bits)
    for width in format.widths:
        levels = matrix.codebook[format.levels_at(width)]
        scales = scales_at(format, matrix.stored, width)
        spread = scales.repeat_interleave(format.block_size or shape[1], dim=1)[:, : shape[1]]
        expected = levels[(codes & (2**width - 1)).long()] * spread
        assert torch.equal(matrix.dequantize(width=width), expected)
        rows = torch.tensor([shape[0] - 1, 0])
        assert torch.equal(format.decode(matrix, rows, width), expected[rows])
    with pytest.raises(UsageError, match="bits, not 9"):
        matrix.dequantize(width=9)


def test_rounding_nests_for_nothing() -> None:
    """At no width is the error more than a few hundredths above that of the best codebook for it, up to 5 bits."""
    x = gaussian(256, 1024)
    matrix = encode(x, "nested2..8-b64")
    for width, most in ((2, 1.003), (3, 1.01), (4, 1.012), (5, 1.045)):
        own = quantize_blockwise(x, QuantFormat("lloyd", width, 64)).dequantize()
        ratio = (matrix.dequantize(width=width) - x).square().mean() / (own - x).square().mean()
        assert ratio < most, width
    errors = [float((matrix.dequantize(width=width) - x).square().mean()) for width in matrix.format.widths]
    assert errors == sorted(errors)


def test_what_is_stored_up_to_a_width_is_a_store_of_its_own() -> None:
    shape = (20, 150)
    matrix = encode(gaussian(*shape), "nested2..7-b64")
    for width in matrix.format.widths:
        part = narrowed(matrix, width)
        assert str(part.format) == f"nested2..{width}-b64"
        assert part.codebook.numel() == part.format.codebook_size
        for lower in part.format.widths:
            assert torch.equal(part.dequantize(width=lower), matrix.dequantize(width=lower))
    with pytest.raises(UsageError, match="serves 7, 6, 5, 4, 3, 2 bits, not 8"):
        narrowed(matrix, 8)


def test_a_width_is_counted_by_what_it_reads() -> None:
    format = NestedFormat(2, 8, 64)
    for width in format.widths:
        assert format.bits_per_weight(640, 640, width) == width + 16 / 64 + 16 / 640
    assert format.bits_per_weight(640, 640) == 8 + 16 / 64 + 7 * 16 / 640


def test_parts_have_the_values_of_the_whole() -> None:
    whole = encode(gaussian(12, 160), "nested2..5-b32")
    for cut in (Cut(0, 0, 5), Cut(0, 5, 12), Cut(1, 0, 96), Cut(1, 96, 160)):
        part = whole.cut(cut)
        for width in whole.format.widths:
            assert torch.equal(part.dequantize(width=width), cut.of(whole.dequantize(width=width)))
    with pytest.raises(UnsupportedError, match="no whole blocks of 32"):
        whole.cut(Cut(1, 0, 40))


def test_extremes() -> None:
    """Rows of zeros stay zeros, huge and tiny ones keep their scale, and what cannot be held is refused by name."""
    x = gaussian(4, 64)
    x[0] = 0
    x[1] *= 1e4
    x[2] *= 1e-3
    matrix = encode(x, "nested2..8-b64")
    for width in matrix.format.widths:
        values = matrix.dequantize(width=width)
        assert torch.equal(values[0], torch.zeros(64))
        error = (values - x).norm(dim=1) / x.norm(dim=1).clamp(min=1e-30)
        assert (error[1:] < 0.6 * 2.0 ** -(width - 2)).all()
    with pytest.raises(KbitError, match="o: scales up to .* do not fit fp16"):
        parse_format("nested2..8-b64").encode(lambda a, b: x[a:b] * 1e9, (4, 64), name="o")
    x[3, 5] = torch.nan
    with pytest.raises(KbitError, match="1 weights are NaN or infinite in rows 0 to 3"):
        encode(x, "nested2..8-b64")


def test_a_factor_never_turns_a_row_over() -> None:
    found = stored_factors(torch.tensor([[1.5], [-2.0], [0.0], [torch.nan], [torch.inf], [1e9]]))
    assert found.dtype == torch.float16
    assert found.flatten().tolist() == [1.5, 1, 1, 1, 1, 60000]


def test_planes_are_those_of_plain_torch() -> None:
    format = NestedFormat(2, 6, 0)
    x = gaussian(9, 83)
    matrix = encode(x, str(format))
    codes = codes_at(format, matrix.stored, 83, 6)
    assert torch.equal(matrix.stored["plane2"], pack_plane_torch(codes, 2, 0))
    for bit in range(3, 7):
        assert torch.equal(matrix.stored[f"bit{bit}"], pack_plane_torch(codes, 1, bit - 1))
