"""Products with one k-bit matrix: by the kernels of the device that its arrays are on."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch

from kbit import _native
from kbit.backends.cpu.backend import NativeBackend
from kbit.backends.cpu.weight import CODECS
from kbit.formats.quant_tensor import QuantTensor
from kbit.host.errors import UnsupportedError, UsageError
from kbit.kernels import reference

# How matrices are multiplied: "fp32" rounds nothing on the CPU, the others as `kbit run --compute` of these names.
COMPUTE = ("fp32", "int8", "bf16")


class Product(Protocol):
    """x W^T for one matrix W."""

    @property
    def name(self) -> str:
        """What computes, for people."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (R, K) of any float type, on the matrix's device -> (R, N), float32 or x's type."""


def check_compute(compute: str) -> str:
    """
    Raises:
        UsageError: there is no such way to multiply.
    """
    if compute not in COMPUTE:
        raise UsageError(f"compute {compute!r}: use one of {', '.join(COMPUTE)}")
    return compute


def product_of(matrix: QuantTensor, compute: str) -> Product:
    """What multiplies with a matrix: native kernels on the CPU, Triton's on a GPU, the reference for formats that
    neither reads.

    Args:
        matrix: W.
        compute: one of COMPUTE. On a GPU activations keep their own 16-bit type, whatever it says.

    Raises:
        UnsupportedError: there is nothing for this device, or not with this `compute`.
    """
    kind = matrix.device.type
    if kind == "cpu":
        return _NativeProduct(matrix, compute) if matrix.format.family in CODECS else _ReferenceProduct(matrix)
    if kind != "cuda":
        raise UnsupportedError(f"k-bit matrices are multiplied on the CPU and on GPUs (cuda), not on {matrix.device}")
    try:
        import triton  # noqa: F401
    except ModuleNotFoundError:
        raise UnsupportedError(
            "k-bit matrices on a GPU need Triton, which this Python has not: pip install triton (Linux), or keep the "
            "model on the CPU"
        ) from None
    return _TritonProduct(matrix)


class _ReferenceProduct:
    name = "reference"

    def __init__(self, matrix: QuantTensor) -> None:
        self._matrix = matrix

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return reference.linear(x, self._matrix)


# One team of threads computes for all matrices of a process, so products come one after another.
_native_lock = threading.Lock()
# Rows that are multiplied at once: bounds the scratch of a product.
_ROWS = 512


@lru_cache(maxsize=8)
def _backend(threads: int, compute: str) -> NativeBackend:
    return NativeBackend(threads, compute=compute)


def forget_backends() -> None:
    """Lets go of the native threads; the next product starts others."""
    _backend.cache_clear()


class _NativeProduct:
    def __init__(self, matrix: QuantTensor, compute: str) -> None:
        self._backend = _backend(torch.get_num_threads(), compute)
        self.name = f"native: {self._backend.isa} kernels, {compute} compute"
        with _native_lock:
            self._matrix = self._backend.prepare(matrix).matrix

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        values = x.detach().to(torch.float32).contiguous().numpy()
        out = np.empty((len(values), self._matrix.rows), dtype=np.float32)
        # (A program and its scratch for each product cost some 30 us; kept, they would cost more memory than matrices.)
        program = _native.Program(self._backend.context, self._backend.compute)
        program.finish(program.buffer(self._matrix.columns))
        program.head(self._matrix, None, 0.0)
        with _native_lock:
            for start in range(0, len(values), _ROWS):
                program.logits(values[start : start + _ROWS], out[start : start + _ROWS])
        return torch.from_numpy(out)


class _TritonProduct:
    name = "triton"

    def __init__(self, matrix: QuantTensor) -> None:
        from kbit.kernels.triton import library
        from kbit.kernels.triton.codecs.layout import prepare_weight

        self._pack, self._prepare = library.pack, prepare_weight
        self._matrix = matrix
        self._packed: dict[torch.dtype, tuple[list[torch.Tensor], str]] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float16
        if dtype not in self._packed:
            self._packed[dtype] = self._pack(self._prepare(self._matrix, self._matrix.device, dtype))
        product: torch.Tensor = torch.ops.kbit.matmul(
            x.detach().to(dtype), *self._packed[dtype], None, None, torch.float32
        )
        return product
