"""Codebooks: the values a k-bit code can stand for, before the block's scale.

A codebook is an array of 2^k float32 values; the position is the code. Most lie in [-1, 1] and are used with the
block's absolute maximum as scale. Order matters (it is what files store): floats keep the bit pattern of their
number format, the other types ascend.

Sources: Dettmers and Zettlemoyer, "The case for 4-bit precision" (2023), section 3 and appendix A; Dettmers et al.,
"QLoRA" (2023), for the normal float; bitsandbytes' create_*_map functions for the dynamic exponent and the quantile
map; OCP Microscaling Formats v1.0 for E2M1.
"""

from __future__ import annotations

from functools import lru_cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from kbit.formats.lloyd import lloyd_codebook
from kbit.formats.quant_format import QuantFormat

Array = npt.NDArray[np.float32]

# QLoRA's published NF4 table, to the last float32 bit. The construction below reproduces it to one part in 10^6
# only (the table came from a float32 linspace), and files written with NF4 elsewhere hold these values.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def codebook(format: QuantFormat, columns: int) -> Array:
    """The codebook of a format that does not depend on the data.

    Args:
        format: any format but quantile (see quantile_codebook).
        columns: length of the matrix's rows; matters only to lloyd with one scale per row.

    Returns:
        float32 (2^k,), indexed by code.
    """
    if format.dtype == "int":
        return int_codebook(format.bits, format.asymmetric)
    if format.dtype == "float":
        assert format.exponent_bits is not None
        assert format.grid is not None
        return float_codebook(format.bits, format.exponent_bits, format.grid)
    if format.dtype == "dynamic":
        return dynamic_codebook(format.bits)
    if format.dtype == "nf":
        return normal_float_codebook(format.bits)
    if format.dtype == "lloyd":
        # A block of one weight has no body to place levels for.
        return lloyd_codebook(format.bits, format.block_size or max(columns, 2))
    raise ValueError(f"the {format.dtype} codebook is estimated from data")


def int_codebook(bits: int, asymmetric: bool) -> Array:
    """Equally spaced levels.

    Symmetric: code c stands for (c - 2^(k-1)) / (2^(k-1) - 1): 2^k - 1 levels from -1 to 1, zero included. Code 0
    lies one step below -1 and is never produced. Asymmetric: 2^k levels from -1 to 1 around the block's midpoint.
    """
    codes = np.arange(2**bits, dtype=np.float64)
    if asymmetric:
        top = 2**bits - 1
        return np.asarray((2 * codes - top) / top, dtype=np.float32)
    return np.asarray((codes - 2 ** (bits - 1)) / (2 ** (bits - 1) - 1), dtype=np.float32)


@lru_cache(maxsize=64)
def float_codebook(bits: int, exponent_bits: int, grid: str) -> Array:
    """Sign-magnitude floats, normalised so that the largest is 1; the code is sign | exponent | mantissa.

    For exponent field e and fraction f = mantissa / 2^M:

    - "ocp":   bias = 2^(E-1) - 1;  e = 0: f 2^(1-bias);  e > 0: (1 + f) 2^(e-bias). No infinities, no NaN.
    - "paper": bias = 2^(E-1) + 1;  e = 0: f 2^-bias;     e > 0: (1 + f) 2^-(e-1-bias). Exponents fall with e.
    - "bnb":   bias = 2^(E-1);      e = 0: f 2^-bias;     e > 0: (1 + f) 2^-(e-1-bias); but its 4-bit E2M1, the FP4
      of quantize_4bit, is the paper's.
    """
    mantissa_bits = bits - 1 - exponent_bits
    if grid == "bnb" and (bits, exponent_bits) == (4, 2):
        grid = "paper"
    half = 2 ** (exponent_bits - 1)
    magnitudes = []
    for code in range(2 ** (bits - 1)):
        exponent, fraction = code >> mantissa_bits, (code & (2**mantissa_bits - 1)) / 2**mantissa_bits
        if grid == "ocp":
            bias = half - 1
            value = fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias)
        else:
            bias = half + 1 if grid == "paper" else half
            value = fraction * 2.0**-bias if exponent == 0 else (1 + fraction) * 2.0 ** -(exponent - 1 - bias)
        magnitudes.append(value)
    positive = np.array(magnitudes, dtype=np.float64)
    positive /= positive.max()
    return np.concatenate([positive, -positive]).astype(np.float32)


@lru_cache(maxsize=16)
def dynamic_codebook(bits: int) -> Array:
    """Dynamic exponent (Dettmers, "8-bit approximations", 2015): more fraction bits near 1, decades towards 0.

    For i = 0..k-2: the midpoints of linspace(0.1, 1, 2^i + 1), times 10^(i - (k-2)), with both signs; plus 0 and 1.
    Float32 arithmetic in bitsandbytes' order, so that its 8-bit map is matched bit for bit.
    """
    import torch  # linspace and rounding of the original: torch's, in float32

    values = [0.0, 1.0]
    for i in range(bits - 1):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2.0
        decade = 10 ** (-(bits - 2) + i)
        values += (decade * means).tolist()
        values += (-decade * means).tolist()
    return np.sort(np.array(values, dtype=np.float32))


@lru_cache(maxsize=16)
def normal_float_codebook(bits: int) -> Array:
    """Normal float: levels at equally spaced quantiles of N(0, 1), zero exact, 2^(k-1) positive levels.

    QLoRA's construction at any k: offset = mean(1 - 1/2^(k+1), 1 - 1/(2 (2^k - 1))), positive levels
    ppf(linspace(offset, 1/2, 2^(k-1) + 1)) without the last, one fewer negative, all divided by the largest.
    """
    if bits == 4:
        return np.array(_NF4, dtype=np.float32)
    ppf = NormalDist().inv_cdf
    offset = ((1 - 2.0 ** -(bits + 1)) + (1 - 1 / (2 * (2**bits - 1)))) / 2
    half = 2 ** (bits - 1)
    positive = [ppf(p) for p in np.linspace(offset, 0.5, half + 1)[:-1]]
    negative = [-ppf(p) for p in np.linspace(offset, 0.5, half)[:-1]]
    levels = np.array(sorted([*positive, 0.0, *negative]), dtype=np.float64)
    return np.asarray(levels / levels.max(), dtype=np.float32)


def quantile_codebook(sorted_values: npt.NDArray[np.float32], bits: int) -> Array:
    """Quantile quantization: 2^k - 1 equal-mass quantiles of the data, plus zero, divided by the largest magnitude.

    As bitsandbytes' create_quantile_map: 256 quantiles at probabilities from 1/2n to 1 - 1/2n, of which n = 2^k - 1
    evenly spaced ones are kept.

    Args:
        sorted_values: the tensor's values (or an even sample of them), ascending, at least one.

    Returns:
        float32 (2^k,), ascending.
    """
    n = 2**bits - 1
    probabilities = np.linspace(1 / (2 * n), 1 - 1 / (2 * n), 256)
    positions = probabilities * (sorted_values.size - 1)
    low = np.floor(positions).astype(np.int64)
    high = np.minimum(low + 1, sorted_values.size - 1)
    weight = positions - low
    quantiles = sorted_values[low].astype(np.float64) * (1 - weight) + sorted_values[high] * weight
    kept = quantiles[np.linspace(0, 255, n).astype(np.int64)]
    levels = np.sort(np.append(kept, 0.0))
    largest = np.abs(levels).max()
    # An all-zero tensor has no quantiles to speak of; any codebook with a zero represents it exactly.
    # Adding zero turns -0.0 into 0.0: which of the two the data held must not show in the file.
    return np.asarray((levels / largest if largest > 0 else levels) + 0.0, dtype=np.float32)
