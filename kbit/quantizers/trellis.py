"""Methods whose linear weights are trellis codes (kbit.formats.trellis)."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from kbit.calibration.request import CalibrationRequest
from kbit.formats.codec import Codec
from kbit.formats.trellis import FAST_WINDOW, INTEGER_BITS, TrellisFormat
from kbit.quantizers.calibrated import CalibratedRounding
from kbit.quantizers.settings import SWEEPS, Settings

# Columns that EXL3 mixes.
_EXL3_MIXED = 128


class Trellis(CalibratedRounding):
    """Two-sided LDLQ in tiles, and within them."""

    name = "trellis"
    about = (
        "trellis codes in rotated columns, errors made good along columns and rows: the fewest bits, slower to decode"
    )
    version = 4  # single large weights are kept apart
    keeps_outliers: ClassVar[bool] = True
    nests: ClassVar[bool] = False
    # Sweeps are of matrices that are no trellises: embeddings, the head.
    rounding = Settings(sweeps=SWEEPS, within_tiles=True)

    def format(self, bits: float, fast: bool) -> Codec:
        window = FAST_WINDOW if fast and bits < INTEGER_BITS else 0
        return TrellisFormat(int(bits), window=window, half=bits != int(bits))


class OneSidedTrellis(Trellis):
    """What EXL3 does: one-sided LDLQ, Hadamard matrices of 128, one width, the code of four bytes."""

    name = "trellis-plain"
    about = "trellis codes as EXL3 has them (inputs only, one-sided, Hadamard 128, one width), to compare with"
    version = 3
    keeps_outliers: ClassVar[bool] = False
    rounding = Settings(two_sided=False)
    mixes: ClassVar[bool] = False

    def __init__(self, request: CalibrationRequest | None = None) -> None:
        super().__init__(replace(request or CalibrationRequest(), gradients=False))

    def calibrated_on(self, request: CalibrationRequest) -> CalibratedRounding:
        """Without gradients, whatever else is asked: plain second moments are what this method is to compare with."""
        return super().calibrated_on(replace(request, gradients=False))

    def format(self, bits: float, fast: bool) -> Codec:
        integers = bits >= INTEGER_BITS
        window = FAST_WINDOW if fast and not integers else 0
        return TrellisFormat(int(bits), "" if integers else "sum4", window, _EXL3_MIXED, bits != int(bits))
