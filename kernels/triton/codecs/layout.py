"""Weights as the Triton kernels read them: prepared once, when a matrix is uploaded.

The matrix is the left operand of every product here (out^T = W x^T), so that a tensor-core instruction takes 16 output
features at a time however few tokens there are. Its codes are stored in the order in which the 32 lanes of a warp hold
the left operand of mma.m16n8k16 (PTX ISA, "Matrix fragments for mma.m16n8k16"; wgmma's operand in registers is the
same): lane 4 g + t holds rows g and g + 8 and columns 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of each 16 x 16 tile. A lane
therefore decodes the words it loaded and multiplies them, with no exchange between lanes and no shared memory.

A plane of width b is int32 (N' / 16, K' b / 256, 32, 4): for each 16 rows and each 256 / b columns, 128 bits per lane,
so every load of codes is 128 bits wide. Inside a lane's 128 bits the order is step (16 columns), k8 (column + 8), n8
(row + 8), k0 (column + 1). The two codes of a k0 pair lie in one word, 16 bits apart ("halves": both become half
precision with one OR) or side by side ("pairs": together they index a table of pairs). A narrower plane's word serves
two or four words of the widest plane, interleaved: what belongs to the pair at bit p of the o-th of these is at bit
p + o b (p from 0 to 15; twice that for "pairs"), so one shift brings the fields of a whole word to their places.

N is padded to a multiple of 16, K to a multiple of 256 over the narrowest plane (64 at 4 and 8 bits, 128 at 2 and 6,
256 at 3, 5 and 7), scales to whole padded rows and columns, with zeros. Scales are (N' / 16, blocks', 16): the scales
of a row tile's next block lie at a constant distance, so one address serves a whole chunk of columns. Double-quantized
scales stay 8 bits wide: the kernel multiplies by the superblock's factor, so a weight costs in GPU memory what it costs
on disk, plus padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from kbit.formats.codec import no_kernel
from kbit.formats.nested import NestedFormat
from kbit.formats.outlier_weights import PLACES, VALUES
from kbit.formats.planes_codec import PlanesTensor
from kbit.formats.quant_format import SUPERBLOCK, QuantFormat, plane_widths
from kbit.formats.quant_tensor import QuantTensor
from kbit.formats.rotation import sign_values
from kbit.formats.trellis import TrellisFormat
from kbit.host.errors import UnsupportedError
from kbit.kernels.triton.codecs.sizes import ROW_TILE as ROW_TILE
from kbit.kernels.triton.codecs.sizes import columns_multiple as columns_multiple
from kbit.kernels.triton.codecs.sizes import padded_shape

STEP = 16  # columns of one
ACTIVATION_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, eq=False)
class TritonWeight:
    """A matrix (N, K) in the layout above, for activations of one dtype.

    Attributes:
        format: the format's string, or "dense" for a float matrix.
        shape: (N, K).
        padded: (N', K').
        dtype: of the activations it is multiplied with; tables are rounded to it.
        planes: int32 planes, widest first.
        scales: (N' / 16, blocks', 16) in the stored type: fp16, bf16, fp32, or uint8 with scales_super.
        scales_super: float32 factors of superblocks, by index (row * blocks + block) // 256; else None.
        offsets: as scales (int8 if double-quantized), or None.
        offsets_super: as scales_super, or None.
        kind: how a code becomes a value: "int" (code - zero, exact), "table" (one entry per code) or "pairs" (one
            32-bit entry per pair of codes); of a nested weight "nested" or "nested-pairs", likewise
            (kbit.kernels.triton.codecs.nested says how its planes lie).
        table: the table for "table" (dtype) and "pairs" (int32); None for "int".
        zero: code that stands for 0 in "int".
        multiplier: the value of a code is (code - zero) or table[code], times this, times the block's scale.
        lift: a power of two that brings the largest scale (or offset) near 1, where half precision is at its best.
        dense: the matrix itself where format is "dense", in `dtype`; torch.matmul runs it.
        activations: what tokens are rounded to where there are many, "int8" or "fp8" (`rounded.with_activations`), or
            "" for not at all.
        table8: with activations, the table in their type, or None for "int".
        multiplier8: the multiplier that goes with it.
        rotation: of a trellis (kind "trellis-sum2", "trellis-sum4" or "trellis-int", whose one plane is as
            kbit.kernels.triton.codecs.trellis says): float32 (K',), a sign / sqrt(mixed); else None.
        mixed: columns that one Hadamard matrix mixes.
        window: bits of a window.
        half: half a bit more: weights in odd columns have one bit more than `bits`.
        outlier_spans: where weights are kept apart: where those of each tile of 16 rows begin and end, int32
            (N' / 16, 2).
        outlier_places: their rows in the tile and columns, int32 (n, 2).
        outliers: their values, float32 (n,).
    """

    format: str
    shape: tuple[int, int]
    padded: tuple[int, int]
    dtype: torch.dtype
    planes: tuple[torch.Tensor, ...] = ()
    scales: torch.Tensor | None = None
    scales_super: torch.Tensor | None = None
    offsets: torch.Tensor | None = None
    offsets_super: torch.Tensor | None = None
    kind: str = "int"
    table: torch.Tensor | None = None
    zero: int = 0
    multiplier: float = 1.0
    lift: float = 1.0
    dense: torch.Tensor | None = None
    bits: int = field(default=16)
    block_size: int = field(default=0)
    activations: str = ""
    table8: torch.Tensor | None = None
    multiplier8: float = 1.0
    rotation: torch.Tensor | None = None
    mixed: int = 0
    window: int = 0
    half: bool = False
    outlier_spans: torch.Tensor | None = None
    outlier_places: torch.Tensor | None = None
    outliers: torch.Tensor | None = None

    @property
    def nested(self) -> bool:
        """Whether it is one width of several, whose planes lie apart."""
        return self.kind.startswith("nested")

    @property
    def blocks(self) -> int:
        """Blocks of a row (without padding)."""
        return -(-self.shape[1] // self.block_size) if self.block_size else 1

    @property
    def padded_blocks(self) -> int:
        """blocks': those of a padded row."""
        return -(-self.padded[1] // self.block_size) if self.block_size else 1

    @property
    def device(self) -> torch.device:
        return self._tensors()[0].device

    @property
    def nbytes(self) -> int:
        """Bytes in memory, padding and tables included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors())

    def _tensors(self) -> list[torch.Tensor]:
        several = (self.dense, *self.planes, self.scales, self.scales_super, self.offsets, self.offsets_super)
        apart = (self.outlier_spans, self.outlier_places, self.outliers)
        return [tensor for tensor in (*several, self.table, self.table8, self.rotation, *apart) if tensor is not None]


def prepare_weight(
    weight: QuantTensor | torch.Tensor, device: torch.device | str, dtype: torch.dtype = torch.float16
) -> TritonWeight:
    """Rearrange a matrix (N, K) for the kernels.

    Args:
        weight: quantized, in any format; or float, which is kept as it is (torch.matmul runs it: `format` says
            "dense").
        device: where the result lives. The work is done where `weight` is.
        dtype: of the activations: float16, bfloat16 or float32.

    Raises:
        UnsupportedError: another dtype, or a codec without Triton kernels.
    """
    if dtype not in ACTIVATION_DTYPES:
        raise UnsupportedError(f"the Triton kernels take float16, bfloat16 or float32 activations, not {dtype}")
    if isinstance(weight, torch.Tensor):
        shape = (weight.shape[0], weight.shape[1])
        return TritonWeight("dense", shape, shape, dtype, dense=weight.to(device=device, dtype=dtype).contiguous())
    arrange = CODECS.get(weight.format.family)
    if arrange is None:
        raise no_kernel("triton", weight.format, CODECS)
    return arrange(weight, device, dtype)


def _planes(matrix: QuantTensor, device: torch.device | str, dtype: torch.dtype) -> TritonWeight:
    weight = PlanesTensor.of(matrix)
    quant_format = weight.format
    rows, columns = weight.shape
    padded = padded_shape(quant_format, rows, columns)
    kind, table, multiplier = _values(quant_format, weight.codebook, dtype)
    codes = torch.nn.functional.pad(weight.codes(), (0, padded[1] - columns, 0, padded[0] - rows))
    planes = []
    shift, widest = 0, max(plane_widths(quant_format.bits))
    for width in plane_widths(quant_format.bits):
        planes.append(pack_plane(codes, width, shift, widest, adjacent=kind == "pairs").to(device))
        shift += width
    scales: dict[str, Any] = {}
    for name in ("scales", "offsets"):
        if name in weight.stored:
            scales[name] = tiles_first(weight.stored[name], quant_format, padded).to(device)
            if quant_format.double_quant:
                scales[f"{name}_super"] = _factors(weight, name, padded).to(device)
    return TritonWeight(
        # Without their number: experts that keep different numbers of weights apart are alike to the kernels.
        str(quant_format.keeping(0)),
        weight.shape,
        padded,
        dtype,
        planes=tuple(planes),
        kind=kind,
        table=None if table is None else table.to(device),
        zero=2 ** (quant_format.bits - 1),
        multiplier=multiplier,
        lift=lift_of(weight.scales, weight.offsets),
        bits=quant_format.bits,
        block_size=quant_format.block_size,
        **scales,
        **_outliers(matrix, padded[0] // ROW_TILE, device),
    )


def _trellis(matrix: QuantTensor, device: torch.device | str, dtype: torch.dtype) -> TritonWeight:
    format, (rows, columns) = matrix.format, matrix.shape
    assert isinstance(format, TrellisFormat)
    codes, mixed = matrix.stored["codes"], format.columns_mixed(columns)
    pairs = codes.view(*codes.shape[:2], -1, 2).int()
    words = (pairs[..., 0] << 8) | pairs[..., 1]
    scales = torch.nn.functional.pad(matrix.stored["scales"].flatten(), (0, -rows % ROW_TILE))
    rotation = sign_values(matrix.stored["signs"]) / math.sqrt(mixed)
    return TritonWeight(
        str(format.keeping(0)),
        (rows, columns),
        (len(scales), len(rotation)),
        dtype,
        planes=(torch.where(words >= 2**15, words - 2**16, words).to(torch.int16).contiguous().to(device),),
        scales=scales.to(device),
        kind=f"trellis-{format.code}",
        multiplier=format.step,
        bits=format.bits,
        rotation=rotation.to(device),
        mixed=mixed,
        window=format.window,
        half=format.half,
        **_outliers(matrix, len(scales) // ROW_TILE, device),
    )


def _outliers(matrix: QuantTensor, tiles: int, device: torch.device | str) -> dict[str, Any]:
    """The weights that are kept apart, by tiles of rows; nothing where there are none."""
    if VALUES not in matrix.stored:
        return {}
    used = matrix.stored[VALUES] != 0
    if not bool(used.any()):
        return {}
    places, columns = matrix.stored[PLACES][used].long(), matrix.shape[1]
    rows = places // columns
    ends = torch.searchsorted(rows // ROW_TILE, torch.arange(tiles + 1))
    return {
        "outlier_spans": torch.stack([ends[:-1], ends[1:]], dim=1).int().to(device),
        "outlier_places": torch.stack([rows % ROW_TILE, places % columns], dim=1).int().to(device),
        "outliers": matrix.stored[VALUES][used].float().to(device),
    }


def _nested(matrix: QuantTensor, device: torch.device | str, dtype: torch.dtype) -> TritonWeight:
    """The widest width of a nested matrix."""
    from kbit.kernels.triton.codecs.nested_planes import NestedScales, pack_planes

    assert isinstance(matrix.format, NestedFormat)
    return NestedScales.of(matrix).at_width(matrix.format.bits, pack_planes(matrix, device), dtype)


# How a matrix of each codec gets into the layout of its kernels, by family.
CODECS: dict[str, Callable[[QuantTensor, torch.device | str, torch.dtype], TritonWeight]] = {
    "planes": _planes,
    "trellis": _trellis,
    "nested": _nested,
}


def pack_plane(codes: torch.Tensor, width: int, shift: int, widest: int, *, adjacent: bool) -> torch.Tensor:
    """Bits [shift, shift + width) of codes as a plane.

    Args:
        codes: uint8 (N', K'), padded.
        width: 1, 2, 4 or 8.
        shift: lowest bit of the codes that belongs to the plane.
        widest: width of the format's widest plane.
        adjacent: the codes of a pair side by side, else 16 bits apart.

    Returns:
        int32 (N' / 16, K' width / 256, 32, 4).
    """
    rows, columns = codes.shape
    tiles, pieces = rows // ROW_TILE, columns * width // 256
    # row = (tile, n8, g), column = (piece, step, k8, t, k0) -> (tile, piece, g, t | step, k8, n8 | k0)
    parts = codes.view(tiles, 2, 8, pieces, 16 // width, 2, 4, 2).permute(0, 3, 2, 6, 4, 5, 1, 7)
    # A word has the pairs of widest / width words of the widest plane.
    parts = parts.reshape(tiles, pieces, 32, 4, widest // width, 16 // widest, 2)
    other = torch.arange(widest // width, device=codes.device)[:, None, None]
    pair = torch.arange(16 // widest, device=codes.device)[:, None]
    half = torch.arange(2, device=codes.device)
    place = pair * widest + other * width
    places = 2 * place + half * width if adjacent else place + 16 * half
    out = torch.empty((tiles, pieces, 32, 4), dtype=torch.int32, device=codes.device)
    step = max(1, (1 << 22) // (ROW_TILE * columns))  # int64 scratch of 32 MB at a time
    for start in range(0, tiles, step):
        field_values = (parts[start : start + step].long() >> shift) & (2**width - 1)
        words = (field_values << places).sum((-1, -2, -3))
        out[start : start + step] = torch.where(words >= 2**31, words - 2**32, words).int()
    return out


def _values(
    quant_format: QuantFormat, codebook: torch.Tensor, dtype: torch.dtype
) -> tuple[str, torch.Tensor | None, float]:
    """(kind, table, multiplier) of a codebook for activations of `dtype`."""
    bits, levels = quant_format.bits, codebook.double().cpu()
    if (step := _integer_step(quant_format, levels)) is not None:
        # Symmetric levels are (code - 2^(k-1)) / (2^(k-1) - 1); with offset (2 code - top) / top, top = 2^k - 1, which
        # is (code - 2^(k-1) + 1/2) * 2 / top: the kernel adds the half to the offset. Both factors move to the scale,
        # and what the tensor cores multiply is a small integer, exact in half precision and bfloat16.
        return "int", None, step
    factor = table_factor(levels, dtype)
    table = (levels * factor).to(dtype)
    if bits <= 3 and dtype != torch.float32:
        # One lookup for two codes: 16 entries at 2 bits, 64 at 3. At 4 bits 256 entries would cost more in conflicts
        # between the banks of shared memory (8 entries a bank) than a lookup per code (16 entries in 8 banks).
        entries = torch.arange(4**bits)
        low, high = torch.zeros_like(entries), torch.zeros_like(entries)
        shift = 0
        for width in plane_widths(bits):
            fields = entries >> (2 * shift)
            low |= (fields & (2**width - 1)) << shift
            high |= ((fields >> width) & (2**width - 1)) << shift
            shift += width
        pairs = torch.stack([table[low], table[high]], dim=-1).contiguous()
        return "pairs", pairs.view(torch.int32).reshape(-1), 1 / factor
    return "table", table, 1 / factor


def _integer_step(quant_format: QuantFormat, levels: torch.Tensor) -> float | None:
    """What an integer level is worth, where the kernels' integers are this codebook; else None: it is looked up.

    "int" is said of other levels, too: those that a GGUF file or another quantizer's had (0 to 15 with offsets).
    """
    middle, top = 2 ** (quant_format.bits - 1), 2**quant_format.bits - 1
    if quant_format.asymmetric:
        step, integers = 2 / top, torch.arange(top + 1).double() - top / 2
    else:
        integers = torch.arange(top + 1).double() - middle
        step = float(levels[-1]) / (middle - 1)
    same = torch.allclose(levels, integers * step, rtol=2.0**-23, atol=0.0)
    return step if same and step > 0 else None


def table_factor(levels: torch.Tensor, dtype: torch.dtype) -> float:
    """What to multiply a table with before rounding to `dtype`.

    Float grids are multiples of their smallest value with few bits, exact in half precision unless divided by their
    largest: so try that value's reciprocal, and keep it where it leaves less error than 1.
    """
    if dtype == torch.float32:
        return 1.0
    largest = float(levels.abs().max())
    positive = levels[levels > 0]
    if not len(positive) or largest == 0:
        return 1.0
    unit = 1.0 / float(positive.min())
    while unit * largest > 2.0**15:  # half precision ends at 65504
        unit /= 2.0
    candidates = (1.0, unit)
    errors = [float(((levels * c).to(dtype).double() / c - levels).square().sum()) for c in candidates]
    return candidates[errors.index(min(errors))]


def tiles_first(stored: torch.Tensor, quant_format: QuantFormat, padded: tuple[int, int]) -> torch.Tensor:
    """Scales or offsets (N, blocks) -> (N' / 16, blocks', 16), padded with zeros."""
    rows, blocks = stored.shape
    wanted = quant_format.blocks_per_row(padded[1])
    out = stored.new_zeros((padded[0], wanted))
    out[:rows, :blocks] = stored
    return out.view(-1, ROW_TILE, wanted).transpose(1, 2).contiguous()


def _factors(weight: PlanesTensor, name: str, padded: tuple[int, int]) -> torch.Tensor:
    """A superblock's factors, with zeros for the rows and blocks of the padding."""
    factors = weight.stored[f"{name}_super"]
    blocks = weight.format.blocks_per_row(weight.shape[1])
    wanted = (padded[0] * blocks + weight.format.blocks_per_row(padded[1])) // SUPERBLOCK + 1
    return torch.nn.functional.pad(factors, (0, max(0, wanted - len(factors))))


def lift_of(scales: torch.Tensor, offsets: torch.Tensor | None = None) -> float:
    """The power of two by which the largest scale or offset falls short of 1."""
    largest = float(scales.abs().max())
    if offsets is not None:
        largest = max(largest, float(offsets.abs().max()))
    return 2.0 ** -round(math.log2(largest)) if largest > 0 else 1.0
