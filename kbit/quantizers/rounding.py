"""Who rounds a matrix with its factors, by the codec of its format."""

from __future__ import annotations

import torch

from kbit.calibration.factors import Factors
from kbit.formats.blockwise import check_finite
from kbit.formats.codec import Codec
from kbit.formats.outlier_weights import encode_apart
from kbit.formats.quant_format import QuantFormat
from kbit.formats.quant_tensor import QuantTensor
from kbit.formats.trellis import TrellisFormat
from kbit.host.errors import UnsupportedError
from kbit.quantizers.ldlq import Feedback, round_with
from kbit.quantizers.settings import Settings
from kbit.quantizers.trellis_ldlq import TileFeedback, round_trellis


class Rounder:
    """Rounds matrices (N, K) of one pair of factors to any number of formats, taking the factors apart once.

    Args:
        factors: of the matrix; None: all errors cost the same.
        settings: how the factors are used.
        columns: K.
    """

    def __init__(self, factors: Factors | None, settings: Settings, columns: int) -> None:
        self._factors, self._settings, self._columns = factors, settings, columns
        self._planes: Feedback | None = None
        self._tiles: dict[int, TileFeedback] = {}

    def rows_apart(self, format: Codec) -> bool:
        """Whether rows can be rounded in any number of pieces: nothing joins them."""
        if isinstance(format, TrellisFormat) or format.outliers:
            return False
        return self._of_planes().rows is None and isinstance(format, QuantFormat) and not format.double_quant

    def round(
        self,
        weight: torch.Tensor,
        format: Codec,
        settings: Settings | None = None,
        *,
        threads: int = 1,
        name: str = "tensor",
    ) -> QuantTensor:
        """A matrix, float32 (N, K), in a format.

        Args:
            weight: of these factors.
            format: of the planes or the trellis codec.
            settings: with other sweeps than those given at first; None: the same.
            threads: for what takes longest, the search of a trellis.
            name: what to call the matrix in errors.

        Raises:
            KbitError: the matrix holds NaN or infinity, or scales that the format cannot hold.
            UnsupportedError: a format of another codec.
        """
        settings = settings or self._settings
        if not isinstance(format, QuantFormat | TrellisFormat):
            raise UnsupportedError(f"{name}: no calibrated method rounds to {format}; use --method rtn")
        if format.outliers:
            check_finite(weight, 0, len(weight), name)
            return encode_apart(
                format, lambda start, stop: weight[start:stop], (weight.shape[0], weight.shape[1]),
                lambda plain, others: self.round(others(0, len(weight)), plain, settings, threads=threads, name=name),
            )  # fmt: skip
        if isinstance(format, QuantFormat):
            return round_with(weight, format, self._of_planes(), settings, name=name)
        mixed = format.columns_mixed(self._columns)
        if mixed not in self._tiles:
            self._tiles[mixed] = TileFeedback.of(self._factors, self._settings, self._columns, format)
        return round_trellis(weight, format, self._tiles[mixed], settings, threads=threads, name=name)

    def _of_planes(self) -> Feedback:
        if self._planes is None:
            self._planes = Feedback.of(self._factors, self._settings, self._columns)
        return self._planes
