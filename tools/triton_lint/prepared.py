"""Quantized matrices of any size that hold nothing, for compiling launches."""

from __future__ import annotations

from dataclasses import replace

import torch

from kbit.formats.nested import NestedFormat
from kbit.formats.planes_codec import PlanesTensor
from kbit.formats.quant_format import QuantFormat
from kbit.formats.quant_tensor import SAFETENSORS_TO_TORCH
from kbit.formats.registry import parse_format
from kbit.gpu_check.synthetic import random_codes
from kbit.kernels.triton.codecs.layout import TritonWeight, prepare_weight
from kbit.kernels.triton.product.rounded import with_activations


def meta_quant(quant_format: QuantFormat, shape: tuple[int, int]) -> PlanesTensor:
    """A PlanesTensor of device "meta"."""
    stored = {
        name: torch.empty(part.shape, dtype=SAFETENSORS_TO_TORCH[part.dtype], device="meta")
        for name, part in quant_format.parts(*shape).items()
    }
    codebook = torch.empty(quant_format.codebook_size, device="meta")
    return PlanesTensor(quant_format, shape, stored, codebook)


def meta_weight(text: str, shape: tuple[int, int], dtype: torch.dtype, activations: str = "") -> TritonWeight:
    """What prepare_weight makes of a matrix, on device "meta".

    Args:
        text: the format.
        shape: (N, K); multiples of 256.
        dtype: of the activations.
        activations: what they are rounded to, "int8" or "fp8"; "" for not at all.

    Raises:
        ValueError: a size that is not a multiple of 256.
    """
    rows, columns = shape
    if rows % 256 or columns % 256:
        raise ValueError(f"{rows} x {columns}: sizes must be multiples of 256")
    codec = parse_format(text)
    # What does not grow with the rows (kind, table, factors of levels) is that of 16 real rows of the same length; of a
    # trellis, whose codes take a search, of 16 random ones.
    if isinstance(codec, QuantFormat | NestedFormat):
        sample = torch.randn(16, columns, generator=torch.Generator().manual_seed(0))
        sixteen = codec.encode(lambda start, stop: sample[start:stop], (16, columns))
    else:
        sixteen = random_codes(codec, 16, columns, 0)
    real = prepare_weight(sixteen, "cpu", dtype)
    if activations:
        real = with_activations(real, activations)

    def grown(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        grows = rows // 16 * len(tensor)  # of row tiles one, of rows 16
        return torch.empty((grows, *tensor.shape[1:]), dtype=tensor.dtype, device="meta")

    def empty(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else torch.empty_like(tensor, device="meta")

    return replace(
        real,
        shape=shape,
        padded=shape,
        planes=tuple(plane for plane in map(grown, real.planes) if plane is not None),
        scales=grown(real.scales),
        offsets=grown(real.offsets),
        scales_super=empty(real.scales_super),
        offsets_super=empty(real.offsets_super),
        table=empty(real.table),
        table8=empty(real.table8),
        rotation=empty(real.rotation),
        outlier_spans=grown(real.outlier_spans),
        outlier_places=empty(real.outlier_places),
        outliers=empty(real.outliers),
    )
