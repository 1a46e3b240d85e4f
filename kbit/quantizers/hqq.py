"""Half-quadratic quantization: offsets of blocks that make large errors rare (Badri and Shaji 2023, "HQQ"). No data.

A block of an asymmetric integer format spans its weights' range, w = level * scale + offset. Scales stay as rounding to
nearest has them; the offset is what minimises the p-norm (p < 1) of the errors, which forgives few large errors for
many small ones. Half-quadratic splitting alternates between two steps that have a closed form:

    e <- shrink(w - level * scale - offset),  shrink(x) = sign(x) max(|x| - |x|^(p-1) / beta, 0)
    offset <- mean of (w - e - level * scale) over the block, then new levels

Each block stops when its mean absolute error stops falling, and keeps the best offset it had.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kbit.formats.nested import NestedFormat
from kbit.formats.quant_format import QuantFormat
from kbit.quantizers.method import Method, MethodInput, QuantizedSource
from kbit.quantizers.rtn import QuantizedView

if TYPE_CHECKING:
    import torch

    from kbit.formats.codec import Codec
    from kbit.formats.quant_tensor import QuantTensor

# The paper's values. Errors are in the weights' own units, as there.
NORM, BETA, ITERATIONS = 0.7, 10.0, 20
# Weights worked on at a time: what a step needs of them stays in a core's cache.
_CHUNK_WEIGHTS = 1 << 16


class HalfQuadratic(Method):
    """Offsets by half-quadratic splitting, then rounding to nearest.

    Args:
        norm: p of the errors' norm.
        beta: of the shrinking.
        iterations: at most.
    """

    name = "hqq"
    about = "half-quadratic quantization (HQQ): offsets for small errors, no calibration"
    version = 1

    def __init__(self, norm: float = NORM, beta: float = BETA, iterations: int = ITERATIONS) -> None:
        self.norm, self.beta, self.iterations = norm, beta, iterations

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"norm": self.norm, "beta": self.beta, "iterations": self.iterations}

    def refuses(self, format: Codec) -> str | None:
        if format.outliers:
            return "it keeps no weights apart (-o): use ldlq2, gptq or rtn"
        if isinstance(format, QuantFormat) and format.asymmetric:
            return None
        if isinstance(format, NestedFormat):
            return "it rounds for one width at a time; use ldlq2, gptq or rtn"
        return "it finds the offsets of blocks, and this format has none: use one with -asym (int4-b64-asym)"

    def apply(self, job: MethodInput) -> QuantizedSource:
        return _View(job, self)


class _View(QuantizedView):
    """The model with its planned weights quantized as they are read."""

    def __init__(self, job: MethodInput, method: HalfQuadratic) -> None:
        super().__init__(job.source, job.plan, job.read)
        self._method = method

    def read_quantized(self, name: str) -> QuantTensor:
        format = self.formats[name]
        assert isinstance(format, QuantFormat)  # the plan's: others are refused
        return quantize_half_quadratic(self.target(name), format, self._method, name=name)


def quantize_half_quadratic(
    weight: torch.Tensor, format: QuantFormat, method: HalfQuadratic, *, name: str = "tensor"
) -> QuantTensor:
    """A matrix with offsets found by HQQ.

    Args:
        weight: float32 (N, K).
        format: asymmetric.
        method: its settings.
        name: for errors.

    Raises:
        KbitError: the matrix is empty, holds NaN or infinity, or a scale or offset does not fit its stored type.
    """
    import torch

    from kbit.formats.blockwise import Encoder, quantize_rows
    from kbit.formats.planes_codec import PlanesTensor
    from kbit.formats.scales import store_scales

    rows, columns = weight.shape
    nearest = quantize_rows(lambda start, stop: weight[start:stop], (rows, columns), format, name=name)
    scales, offsets = nearest.scales, nearest.offsets
    assert offsets is not None
    encoder = Encoder.for_codebook(nearest.codebook)
    step = max(1, _CHUNK_WEIGHTS // columns)
    found = torch.cat(
        [
            _offsets(weight[part], scales[part], offsets[part], nearest.codebook, encoder, format, method)
            for part in (slice(start, start + step) for start in range(0, rows, step))
        ]
    )
    # As they are stored, offsets are rounded: what is then the nearest level is decided with these.
    parts = store_scales(scales, found, format)
    stored = {**nearest.stored, **{key: value for key, value in parts.items() if key.startswith("offsets")}}
    like = PlanesTensor(format, nearest.shape, stored, nearest.codebook)
    return quantize_rows(lambda start, stop: weight[start:stop], nearest.shape, format, like=like, name=name)


def _offsets(
    weight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    codebook: torch.Tensor,
    encoder: Any,
    format: QuantFormat,
    method: HalfQuadratic,
) -> torch.Tensor:
    """Offsets float32 (N, blocks) of some rows (N, K), from those that rounding to nearest has."""
    import torch

    from kbit.formats.blockwise import normalise
    from kbit.formats.planes_codec import decode

    block, columns = format.block_size or weight.shape[1], weight.shape[1]
    block = min(block, columns)
    sizes = torch.full((scales.shape[1],), float(block))
    sizes[-1] = columns - block * (len(sizes) - 1)

    def means(values: torch.Tensor) -> torch.Tensor:
        """(N, K) -> (N, blocks); a short last block is filled up with zeros."""
        missing = block * len(sizes) - columns
        return torch.nn.functional.pad(values, (0, missing)).view(len(values), -1, block).sum(dim=2) / sizes

    smallest_kept = 0.999 * method.beta ** (1 / (method.norm - 2))  # shrinking leaves nothing of what is smaller
    best, best_error = offsets, torch.full_like(offsets, torch.inf)
    running = torch.ones_like(offsets, dtype=torch.bool)
    for _ in range(method.iterations):
        codes = encoder.encode(normalise(weight, scales, offsets, format))
        left = weight - decode(codes, scales, offsets, codebook, format)
        size = left.abs()
        error = means(size)
        better = running & (error < best_error)
        best, best_error = torch.where(better, offsets, best), torch.where(better, error, best_error)
        running = better
        if not bool(running.any()):
            break
        if bool((size > smallest_kept).any()):
            left = left - left.sign() * (size - size.pow(method.norm - 1) / method.beta).clamp(min=0)
        # w - e - level * scale is what is left without what the shrinking keeps, and the offset.
        offsets = torch.where(running, offsets + means(left), offsets)
    return best
