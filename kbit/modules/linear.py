"""KbitLinear: nn.Linear with a k-bit matrix, through which gradients flow to what is before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from kbit.formats.quant_tensor import QuantTensor
from kbit.modules.packed import PackedMatrix
from kbit.modules.products import check_compute


class KbitLinear(nn.Module):
    """y = x W^T + b, where W is held in k bits.

    W is not trained: its gradient does not exist. That of x is the one by the values that the codes stand for.

    Args:
        matrices: W in parts, one below the other: more than one where a model's matrix holds several that were
            quantized apart (q, k and v in one).
        bias: (N,), or None.
        order: int64 (N,): of every row of W, which one of the parts' rows it is; None: they are in order.
        compute: how products are computed on the CPU: "fp32", which rounds nothing, "int8" or "bf16".
        dtype: that `weight` has; products have the type of x.

    Attributes:
        in_features, out_features: K and N.
        packed: the parts.

    Raises:
        UsageError: there is no such `compute`.
    """

    order: torch.Tensor | None

    def __init__(
        self,
        matrices: Sequence[QuantTensor | PackedMatrix],
        bias: torch.Tensor | None = None,
        *,
        order: torch.Tensor | None = None,
        compute: str = "fp32",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.packed = nn.ModuleList(each if isinstance(each, PackedMatrix) else PackedMatrix(each) for each in matrices)
        self.out_features = sum(part.shape[0] for part in self.parts)
        self.in_features = self.parts[0].shape[1]
        self.register_buffer("order", order)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=bias.requires_grad)
        self.compute = check_compute(compute)
        self.dtype = dtype

    @property
    def parts(self) -> list[PackedMatrix]:
        """The parts of W."""
        return [part for part in self.packed if isinstance(part, PackedMatrix)]

    @property
    def weight(self) -> torch.Tensor:
        """W (N, K) as the codes say, made anew each time: to be read, as writing to it changes nothing."""
        return self.dequantize(self.dtype)

    @property
    def computes(self) -> str:
        """What multiplies, for people."""
        return self.parts[0].product(self.compute).name

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """W (N, K)."""
        rows = [part.matrix.dequantize(dtype) for part in self.parts]
        whole = rows[0] if len(rows) == 1 else torch.cat(rows)
        return whole if self.order is None else whole[self.order]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        formats = ", ".join(dict.fromkeys(str(part.format) for part in self.parts))
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {formats}"

    def products(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T: (R, K) -> (R, N), in x's type."""
        found = [part.product(self.compute)(x) for part in self.parts]
        whole = found[0] if len(found) == 1 else torch.cat(found, dim=-1)
        return (whole if self.order is None else whole[:, self.order]).to(x.dtype)


class _Product(torch.autograd.Function):
    """Forward by the kernels, backward by the dequantized matrix."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: KbitLinear) -> torch.Tensor:
        ctx.layer = layer
        return layer.products(x.reshape(-1, layer.in_features)).view(*x.shape[:-1], layer.out_features)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ ctx.layer.dequantize(grad.dtype), None
