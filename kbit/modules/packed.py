"""PackedMatrix: a k-bit matrix as buffers of a module."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from kbit.formats.codec import Codec
from kbit.formats.quant_tensor import QuantTensor
from kbit.modules.products import Product, check_compute, forget_backends, product_of

CODEBOOK = "codebook"


class PackedMatrix(nn.Module):
    """W (N, K). Its buffers have the names of the format's parts, and keep their types whatever the model is cast to.

    Products rearrange a matrix for the kernels of its device when it is first used, which takes as much memory again;
    `product` does so, and keeps it until the module is moved or loaded anew.

    Args:
        matrix: what it holds.

    Attributes:
        format, shape: of the matrix.
    """

    def __init__(self, matrix: QuantTensor) -> None:
        super().__init__()
        self.format: Codec = matrix.format
        self.shape = matrix.shape
        for name, array in matrix.stored.items():
            self.register_buffer(name, array)
        if CODEBOOK not in matrix.stored and matrix.codebook.numel():
            self.register_buffer(CODEBOOK, matrix.codebook)
        self._parts = tuple(matrix.stored)
        self._products: dict[str, Product] = {}

    @property
    def matrix(self) -> QuantTensor:
        """The matrix, on the same memory."""
        stored = {name: self.get_buffer(name) for name in self._parts}
        found = self._buffers.get(CODEBOOK)
        codebook = torch.zeros(0, device=next(iter(stored.values())).device) if found is None else found
        return QuantTensor(self.format, self.shape, stored, codebook)

    @property
    def stored(self) -> dict[str, torch.Tensor]:
        """The parts that its format stores, by name."""
        return {name: self.get_buffer(name) for name in self._parts}

    def product(self, compute: str) -> Product:
        """What multiplies with it.

        Raises:
            UsageError, UnsupportedError: see `kbit.modules.products`.
        """
        if compute not in self._products:
            _prepared.add(self)
            self._products = {check_compute(compute): product_of(self.matrix, compute)}
        return self._products[compute]

    def forget(self) -> None:
        """Lets go of what was rearranged: the buffers have changed, or memory is short."""
        self._products = {}

    def extra_repr(self) -> str:
        return f"{self.format}, {self.shape[0]} x {self.shape[1]}"

    def __getstate__(self) -> dict[str, Any]:  # (of copies)
        return {**self.__dict__, "_products": {}}

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.forget()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedMatrix:
        """Moves buffers, and casts none: scales in another type would be another matrix."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        self.forget()
        return self


# What holds native objects, to let go of them before the interpreter ends: those of a model in a cycle would be called
# leaks.
_prepared: WeakSet[PackedMatrix] = WeakSet()


@atexit.register
def _let_go() -> None:
    for each in list(_prepared):
        each.forget()
    forget_backends()
