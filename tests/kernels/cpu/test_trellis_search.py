"""The search for a tile's ring: against its definition in numpy, the same for every instruction set, near what theory allows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from trellis_cases import best_ring, cost_of, ring_windows

from kbit import _native
from kbit.formats.trellis import TrellisFormat
from kbit.formats.trellis_code import TileFactors, search, tile_levels
from kbit.kernels.reference_trellis import in_units, search_symbols, to_strings

SETS = _native.instruction_sets()


def found(
    numbers: torch.Tensor,
    values: torch.Tensor,
    bits: int,
    isa: str,
    threads: int = 1,
    half: bool = False,
    factors: TileFactors | None = None,
) -> torch.Tensor:
    strings = torch.empty(len(numbers), 16 * (2 * bits + half), dtype=torch.uint8)
    passed_on = (None, None) if factors is None else (factors.columns, factors.rows)
    _native.trellis_search(numbers, values, bits, strings, _native.Context(isa, threads), half, *passed_on)
    return strings


def some_factors(tiles: int, seed: int, size: float = 0.2) -> TileFactors:
    generator = torch.Generator().manual_seed(seed)
    columns, rows = (torch.randn(tiles, 16, 16, generator=generator) * size for _ in range(2))
    return TileFactors.of(columns, rows)


@pytest.mark.parametrize(
    ("bits", "window", "half"),
    [
        *((bits, window, False) for bits, window in ((2, 8), (3, 8), (4, 9), (4, 10), (5, 10), (6, 12))),
        *((bits, window, True) for bits, window in ((2, 8), (3, 9), (4, 10), (5, 11), (5, 12))),
    ],
)
def test_no_ring_from_the_same_seam_costs_less(bits: int, window: int, half: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    numbers = torch.randn(3, 256, generator=generator)
    numbers[1] *= 0.5
    numbers[2, ::32] = 9.0  # beyond all values
    values = torch.randn(1 << window, generator=generator)
    scaled = np.rint(np.clip(values.numpy() * np.float32(8192), -32767, 32767)).astype(np.int64)
    for isa in SETS:
        strings = found(numbers, values, bits, isa, half=half)
        for tile in range(2):
            windows = ring_windows(strings[tile].numpy(), bits, window, half)
            overlap, least = best_ring(numbers[tile].numpy(), scaled, bits, half)
            assert windows[-1] & ((1 << window - bits) - 1) == overlap
            assert cost_of(numbers[tile].numpy(), scaled, windows, bits) == least


@pytest.mark.parametrize(
    ("bits", "half"), [(bits, half) for bits in range(2, 7) for half in (False, True) if (bits, half) != (6, True)]
)
def test_sets_agree_to_the_bit(bits: int, half: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    numbers = torch.randn(3, 256, generator=generator)
    numbers[1] = torch.tensor([1e30, -1e30, torch.nan, torch.inf]).repeat(64)
    numbers[2] = 0
    values = torch.randn(1 << 12, generator=generator)
    expected = found(numbers, values, bits, "scalar", half=half)
    for isa in SETS[1:]:
        assert torch.equal(found(numbers, values, bits, isa, half=half), expected), isa


@pytest.mark.parametrize(
    ("bits", "window", "half"),
    [
        *((bits, window, False) for bits, window in ((2, 8), (3, 9), (4, 9), (5, 10), (6, 12))),
        *((bits, window, True) for bits, window in ((2, 8), (3, 9), (4, 10), (5, 11))),
    ],
)
def test_errors_are_passed_on_as_the_definition_says(bits: int, window: int, half: bool) -> None:
    """Also factors beyond what they can be, and numbers beyond all values. (5 bits: the seam is within a row.)"""
    numbers = torch.randn(3, 256, generator=torch.Generator().manual_seed(bits))
    numbers[1] *= 0.5
    numbers[2, ::32] = torch.tensor([9.0, -9.0, torch.nan, torch.inf]).repeat(2)
    values = torch.randn(1 << window, generator=torch.Generator().manual_seed(window))
    factors = some_factors(3, bits)
    factors.columns[2, ::3], factors.rows[2, ::3] = 32767, -(1 << 30)
    tiles, levels = in_units(numbers), in_units(values)
    symbols = [search_symbols(tiles[i], levels, bits, factors[i : i + 1], half=half) for i in range(3)]
    expected = to_strings(torch.stack(symbols), bits, half)
    for isa in SETS:
        assert torch.equal(found(numbers, values, bits, isa, half=half, factors=factors), expected), isa


@pytest.mark.parametrize(("bits", "window"), [(2, 8), (3, 9), (4, 10), (5, 11)])
def test_half_widths_pass_errors_on_in_every_set(bits: int, window: int) -> None:
    numbers = torch.randn(2, 256, generator=torch.Generator().manual_seed(bits))
    values = torch.randn(1 << window, generator=torch.Generator().manual_seed(window))
    factors, none = some_factors(2, bits), some_factors(2, bits, 0.0)
    expected = found(numbers, values, bits, "scalar", half=True, factors=factors)
    plain = found(numbers, values, bits, "scalar", half=True)
    assert not torch.equal(expected, plain)
    for isa in SETS:
        assert torch.equal(found(numbers, values, bits, isa, half=True, factors=factors), expected), isa
        assert torch.equal(found(numbers, values, bits, isa, half=True, factors=none), plain), isa


@pytest.mark.parametrize("text", ["trellis2-l10", "trellis2.5-l10", "trellis3-l10", "trellis4-l10"])
def test_what_is_passed_on_costs_less(text: str) -> None:
    """Of errors whose squares count as R' E C, the search for these leaves about what plain errors have: all of what
    passing on can gain. A tenth less than without is far from noise (a standard error of 2 %)."""
    format = TrellisFormat.parse(text)
    numbers = torch.randn(20, 256, generator=torch.Generator().manual_seed(3))
    upper = torch.randn(2, 20, 16, 16, generator=torch.Generator().manual_seed(4)).triu(1) * 0.12 + torch.eye(16)
    errors, costs = [], []
    for factors in (None, TileFactors.of(upper[0], upper[1])):
        values = tile_levels(format, search(format, numbers, 1, factors)).float() * format.step
        error = numbers.view(-1, 16, 16) - values
        errors.append(float(error.square().mean()))
        costs.append(float((upper[1].transpose(1, 2) @ error @ upper[0]).square().mean()))
    assert costs[1] < 0.9 * costs[0]
    assert costs[1] == pytest.approx(errors[0], rel=0.1)


def test_threads_do_not_matter() -> None:
    numbers = torch.randn(9, 256, generator=torch.Generator().manual_seed(0))
    values = torch.randn(1 << 10, generator=torch.Generator().manual_seed(1))
    expected = found(numbers, values, 3, "")
    for threads in (2, 5):
        assert torch.equal(found(numbers, values, 3, "", threads), expected)


# Squared errors of windows of 12 bits on 10^5 other normal numbers.
ERRORS = [
    (TrellisFormat(2, "sum4", 12), 0.0722),
    (TrellisFormat(2, "sum2", 12), 0.0741),
    (TrellisFormat(3, "sum4", 12), 0.0193),
    (TrellisFormat(4, "sum4", 12), 0.00536),
]


@pytest.mark.parametrize(("format", "error"), ERRORS, ids=str)
def test_errors_are_those_of_trellis_codes(format: TrellisFormat, error: float) -> None:
    """Within 4 standard errors: of squared errors of n numbers, about sqrt(2 / n) of their mean (they are nearly
    normal), and of 3 % for the constants, which were measured with another sample."""
    numbers = torch.randn(100, 256, generator=torch.Generator().manual_seed(4))
    values = tile_levels(format, search(format, numbers, 1)).flatten(1) * format.step
    measured = float((values - numbers).square().mean() / numbers.square().mean())
    assert measured == pytest.approx(error, rel=4 * (2 / numbers.numel()) ** 0.5 + 0.03)


def test_what_is_no_trellis_is_refused() -> None:
    numbers, context = torch.zeros(1, 256), _native.Context("scalar", 1)
    for values, bits, shape, said in (
        (torch.zeros(1 << 12), 7, (1, 224), "2 to 6 bits"),
        (torch.zeros(1 << 6), 2, (1, 64), "5 more"),
        (torch.zeros(1000), 2, (1, 64), "2\\^L"),
        (torch.full((1 << 12,), torch.nan), 2, (1, 64), "finite"),
        (torch.zeros(1 << 12), 2, (1, 63), "strings"),
    ):
        with pytest.raises(ValueError, match=said):
            _native.trellis_search(numbers, values, bits, torch.empty(shape, dtype=torch.uint8), context)
    strings, columns, rows = torch.empty(1, 64, dtype=torch.uint8), torch.zeros(1, 16, 16), torch.zeros(1, 16, 16)
    for amiss, said in (
        ((columns.short(), None), "two arrays"),
        ((columns.short(), rows[:, :15].int().contiguous()), "two arrays"),
        ((columns.short() - 32768, rows.int()), "above -32768"),
    ):
        with pytest.raises(ValueError, match=said):
            _native.trellis_search(numbers, torch.zeros(1 << 12), 2, strings, context, False, *amiss)
    for bits, shape, said in ((6, (1, 208), "2 to 6 bits"), (2, (1, 64), "16 bytes more")):
        strings = torch.empty(shape, dtype=torch.uint8)
        with pytest.raises(ValueError, match=said):
            _native.trellis_search(numbers, torch.zeros(1 << 12), bits, strings, context, half=True)
