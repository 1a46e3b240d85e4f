"""The factors of text that calibration has not seen: what the errors of rounding are judged by.

Rounding fits errors to the factors it is given, and by those they look smaller than they are (docs/accuracy.md has
figures). So they are told by the factors of other text, an eighth as much: measured when they are asked for, layer by
layer, and not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from kbit.calibration.measure import LayerFactors, measure_factors
from kbit.calibration.request import CalibrationRequest
from kbit.calibration.run import sampled_tokens, spread_over
from kbit.calibration.sizes import HELD_OUT_SHARE, text_shape
from kbit.checkpoint.source import CheckpointSource
from kbit.models.families import spec_from_config
from kbit.text.tokenizer import Tokenizer


def held_out_factors(
    source: CheckpointSource, request: CalibrationRequest, skip: Callable[[int | None], bool]
) -> Iterator[LayerFactors]:
    """Factors with gradients, from the last layer to the first, then those of embedding and head.

    Args:
        source: the model.
        request: what it was calibrated on.
        skip: layers that are not asked for.

    Raises:
        CheckpointError, UnsupportedError, KbitError: as kbit.calibration.measure.measure_factors.
    """
    ids = held_out_tokens(source, request)
    yield from measure_factors(source, ids, threads=torch.get_num_threads(), skip=skip)


def held_out_tokens(source: CheckpointSource, request: CalibrationRequest) -> NDArray[np.int64]:
    """Sequences of tokens, int64 (S, T): of the request's texts, what calibration left over.

    Where it left nothing, and where there are no texts, the model writes them: other sequences than calibration's.
    """
    count, length = text_shape(spec_from_config(source.config, where=f"config of {source.path}"), request.tokens)
    wanted = -(-count // HELD_OUT_SHARE)
    parts: list[NDArray[np.int64]] = []
    tokenizer = Tokenizer.from_source(source)
    for index, text in enumerate(request.texts):
        used = count // len(request.texts) + (index < count % len(request.texts))
        ids = np.array(tokenizer.encode(text.text), dtype=np.int64)
        sequences = ids[: len(ids) // length * length].reshape(-1, length)
        unused = np.delete(sequences, spread_over(len(sequences), used), axis=0)
        share = min(len(unused), -(-wanted // len(request.texts)))
        parts.append(unused[spread_over(len(unused), share)])
    found = np.concatenate(parts)[:wanted] if parts else np.empty((0, length), dtype=np.int64)
    if len(found):
        return found
    return sampled_tokens(source, wanted, length, first=count)
