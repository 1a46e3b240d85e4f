"""Published tensors that are k-bit in a folder, as layers of torch take them."""

from __future__ import annotations

import torch

from kbit.checkpoint.source import CheckpointSource
from kbit.formats.quant_tensor import QuantTensor
from kbit.models.published import PublishedTensor


def packed_parts(source: CheckpointSource, tensor: PublishedTensor) -> tuple[list[QuantTensor], torch.Tensor | None]:
    """A tensor's matrices, and of each of its rows which one of theirs it is (see `KbitLinear`).

    Args:
        source: canonical.
        tensor: all of whose parts are k-bit there.
    """
    matrices = [source.read_weight(part.parameter.name) for part in tensor.parts]
    packed = [matrix for matrix in matrices if isinstance(matrix, QuantTensor)]
    assert len(packed) == len(matrices)
    places = torch.from_numpy(tensor.order())
    return packed, None if torch.equal(places, torch.arange(len(places))) else places
