"""Weights packed by ExLlamaV3: trellis codes between two rotations (its format "exl3").

The layout is published as code only (exllamav3, MIT licence: modules/quant/exl3.py, exl3_lib/quantize.py, and of the
extension codebook.cuh, exl3_dq.cuh, pack.cu). `trellis` int16 (K / 16, N / 16, 16 k) has of each tile of 16 inputs and
16 outputs a ring of 256 k bits: pairs of words are 32 bits with the second word on top, and bits run from the highest
down. Number t stands for the 16 bits that end with its own k. The order of numbers is that of a tensor core's operand:
of number 8 l + j the input is 2 (l % 4) + (j % 2) + 8 (j / 2 % 2), the output l / 4 + 8 (j / 4). What 16 bits s stand
for, in half precision:

    neither flag   x = 89226354 s + 64248484 mod 2^32; the sum of the two halves (x & 0x8fff8fff) ^ 0x3b603b60
    `mcg`          the same of x = 0xcbac1fed s
    `mul1`         (1024 + the sum of the bytes of 0x83dcd12d s) * 0x1eee + 0xc931 (patterns of halves), rounded once

With H / sqrt(128) of 128 inputs and of 128 outputs and factors of both, `suh` (K,) and `svh` (N,), the weight is
diag(suh) H T H diag(svh); older files have signs only, a bit each (`su`, `sv`). kbit's own trellis has no rotation and
no factors of outputs, so weights are held dequantized: the products are exact in double precision and rounded once, to
half precision, in which ExLlamaV3 reconstructs weights too (rounding four times).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kbit.checkpoint.packed.weight import DenseWeight, PackedTensors, PackedWeight
from kbit.host.errors import CheckpointError, UnsupportedError

_TILE, _MIXED = 16, 128
# Flag -> the only factor that there is of it.
_FACTORS = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}
_HEAD = "lm_head.trellis"


def find(tensors: PackedTensors) -> list[PackedWeight]:
    """The packed weights of a folder. A head that is packed is one of its own, also where the configuration says that
    the embedding is the head: ExLlamaV3 packs a copy.

    Raises:
        UnsupportedError: a codebook that kbit does not know.
        CheckpointError: tensors that do not fit each other.
    """
    if _HEAD in tensors and isinstance(tensors.config, dict):
        tensors.config["tie_word_embeddings"] = False
    return [_weight(tensors, name.removesuffix(".trellis")) for name in tensors.names if name.endswith(".trellis")]


def _weight(tensors: PackedTensors, module: str) -> PackedWeight:
    name = f"{module}.trellis"
    shape = tensors.expect(name, ("I16",)).shape
    bits = shape[2] // _TILE if len(shape) == 3 else 0
    if not 1 <= bits <= 8 or shape[2] % _TILE or 0 in shape or any(_TILE * size % _MIXED for size in shape[:2]):
        raise CheckpointError(
            f"{tensors.file(name)}: {name} has the shape {shape}, not (K / 16, N / 16, 16 k) of K and N that are "
            f"multiples of {_MIXED} and k from 1 to 8; download the model again"
        )
    inputs, outputs = _TILE * shape[0], _TILE * shape[1]
    factors = [_factor_name(tensors, module, "su", inputs), _factor_name(tensors, module, "sv", outputs)]
    flags = [flag for flag in _FACTORS if f"{module}.{flag}" in tensors]
    if len(flags) > 1:
        raise CheckpointError(f"{tensors.file(name)}: {module} has both mcg and mul1; download the model again")
    for flag in flags:
        tensors.expect(f"{module}.{flag}", ("I32",), (), (1,))
        factor = int(tensors.read(f"{module}.{flag}").reshape(-1)[0]) & 0xFFFFFFFF
        if factor != _FACTORS[flag]:
            raise UnsupportedError(
                f"{tensors.file(name)}: {module}.{flag} is {factor:#x}, a codebook that kbit does not know "
                f"({_FACTORS[flag]:#x}); use the original 16-bit checkpoint"
            )
    decoder = _Decoder(tensors, module, factors, flags[0] if flags else "")
    parts = (name, *factors, *(f"{module}.{flag}" for flag in flags))
    return DenseWeight(f"{module}.weight", (outputs, inputs), parts, f"EXL3 {bits}-bit", "fp16", decoder.rows)


def _factor_name(tensors: PackedTensors, module: str, kind: str, count: int) -> str:
    """The tensor of the factors of inputs ("su") or outputs ("sv"): halves, or signs."""
    name = f"{module}.{kind}h"
    if name in tensors or f"{module}.{kind}" not in tensors:
        tensors.expect(name, ("F16",), (count,))
        return name
    tensors.expect(f"{module}.{kind}", ("I16",), (count // 16,))
    return f"{module}.{kind}"


@dataclass
class _Decoder:
    """Rows of one weight. What 128 outputs have in common is kept until others are asked for."""

    tensors: PackedTensors
    module: str
    factors: list[str]
    flag: str
    _block: int = field(default=-1, init=False)
    _kept: NDArray[np.float32] | None = field(default=None, init=False)

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows (start, stop) of the weight (N, K)."""
        found = []
        for block in range(start // _MIXED, -(-stop // _MIXED)):
            if block != self._block or self._kept is None:
                self._kept, self._block = self._decoded(block), block
            first = block * _MIXED
            found.append(self._kept[max(start - first, 0) : min(stop - first, _MIXED)])
        if not found:
            return np.empty((0, _TILE * self.tensors.info(f"{self.module}.trellis").shape[0]), dtype=np.float32)
        return np.concatenate(found)

    def _decoded(self, block: int) -> NDArray[np.float32]:
        """128 rows."""
        words = self.tensors.whole(self.module, f"{self.module}.trellis").view(np.uint16)
        tiles = words[:, block * _MIXED // _TILE : (block + 1) * _MIXED // _TILE]
        outputs = slice(block * _MIXED, (block + 1) * _MIXED)
        inner = tile_values(tiles, codebook(self.flag)).astype(np.float64)  # (K, 128)
        turned = _hadamard() @ inner.reshape(-1, _MIXED, _MIXED) @ _hadamard()
        found = turned.transpose(2, 0, 1).reshape(_MIXED, -1)
        found *= self._factor(1)[outputs, None] / _MIXED
        found *= self._factor(0)
        rounded: NDArray[np.float32] = found.astype(np.float32)  # exact but for bits far below a half's
        return rounded

    def _factor(self, which: int) -> NDArray[Any]:
        name = self.factors[which]
        stored = self.tensors.whole(self.module, name)
        if name.endswith("h"):
            return self.tensors.widened(name, stored).astype(np.float64)
        bits = np.unpackbits(stored.view(np.uint8), bitorder="little")
        return 1.0 - 2.0 * bits


@lru_cache(maxsize=3)
def codebook(flag: str) -> NDArray[np.float16]:
    """What each 16 bits stand for, (65536,).

    Args:
        flag: "mcg", "mul1" or "" for neither.
    """
    states = np.arange(1 << 16, dtype=np.uint32)
    if flag == "mul1":
        x = states * np.uint32(_FACTORS[flag])
        total = 1024.0 + sum((x >> shift) & 255 for shift in (0, 8, 16, 24)).astype(np.float64)
        factor, offset = np.array([0x1EEE, 0xC931], dtype=np.uint16).view(np.float16).astype(np.float64)
        sums: NDArray[np.float16] = (total * factor + offset).astype(np.float16)  # exact before the rounding
        return sums
    x = states * np.uint32(_FACTORS["mcg"]) if flag else states * np.uint32(89226354) + np.uint32(64248484)
    halves = ((x & np.uint32(0x8FFF8FFF)) ^ np.uint32(0x3B603B60)).view(np.float16).reshape(-1, 2)
    found: NDArray[np.float16] = halves[:, 0] + halves[:, 1]
    return found


def tile_values(words: NDArray[np.uint16], values: NDArray[np.float16]) -> NDArray[np.float16]:
    """What tiles stand for, before the rotations.

    Args:
        words: (K / 16, N / 16, 16 k).
        values: of 16 bits.

    Returns:
        (K, N).
    """
    high, wide, width = words.shape
    pairs = np.ascontiguousarray(words).view("<u4").astype(np.uint64)
    ends = (np.arange(256) + 1) * (width // _TILE)
    last = (ends - 1) // 32
    joined = (pairs[..., last - 1] << np.uint64(32)) | pairs[..., last]  # before the first comes the last: a ring
    windows = (joined >> (32 * (last + 1) - ends).astype(np.uint64)) & np.uint64(0xFFFF)
    flat = np.empty((high, wide, 256), dtype=np.float16)
    flat[..., _places()] = values[windows]
    found: NDArray[np.float16] = flat.reshape(high, wide, _TILE, _TILE).transpose(0, 2, 1, 3)
    return found.reshape(high * _TILE, wide * _TILE)


@lru_cache(maxsize=1)
def _places() -> NDArray[np.intp]:
    """Where in a tile, inputs by outputs, each number of its ring lies."""
    lane, j = np.divmod(np.arange(256), 8)
    places: NDArray[np.intp] = (2 * (lane % 4) + j % 2 + 8 * (j // 2 % 2)) * _TILE + lane // 4 + 8 * (j // 4)
    return places


@lru_cache(maxsize=1)
def _hadamard() -> NDArray[np.float64]:
    """Sylvester's matrix of 128 rows, of 1 and -1."""
    one = np.ones((1, 1))
    while len(one) < _MIXED:
        one = np.block([[one, one], [one, -one]])
    return one
