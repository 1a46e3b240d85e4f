"""The search for a tile's ring: against its definition in numpy, the same for every instruction set, near what theory allows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from trellis_cases import best_ring, cost_of, ring_windows

from kbit import _native
from kbit.formats.trellis import TrellisFormat
from kbit.formats.trellis_code import search, tile_levels

SETS = _native.instruction_sets()


def found(
    numbers: torch.Tensor, values: torch.Tensor, bits: int, isa: str, threads: int = 1, half: bool = False
) -> torch.Tensor:
    strings = torch.empty(len(numbers), 16 * (2 * bits + half), dtype=torch.uint8)
    _native.trellis_search(numbers, values, bits, strings, _native.Context(isa, threads), half)
    return strings


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


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("bits", range(2, 7))
def test_sets_agree_to_the_bit(bits: int, half: bool) -> None:
    if half and bits == 6:
        return  # there is no such width
    generator = torch.Generator().manual_seed(bits)
    numbers = torch.randn(3, 256, generator=generator)
    numbers[1] = torch.tensor([1e30, -1e30, torch.nan, torch.inf]).repeat(64)
    numbers[2] = 0
    values = torch.randn(1 << 12, generator=generator)
    expected = found(numbers, values, bits, "scalar", half=half)
    for isa in SETS[1:]:
        assert torch.equal(found(numbers, values, bits, isa, half=half), expected), isa


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
    for bits, shape, said in ((6, (1, 208), "2 to 6 bits"), (2, (1, 64), "16 bytes more")):
        strings = torch.empty(shape, dtype=torch.uint8)
        with pytest.raises(ValueError, match=said):
            _native.trellis_search(numbers, torch.zeros(1 << 12), bits, strings, context, half=True)
