"""KbitEmbedding: nn.Embedding with a k-bit table."""

from __future__ import annotations

import torch
from torch import nn

from kbit.formats.quant_tensor import QuantTensor
from kbit.modules.packed import PackedMatrix


class KbitEmbedding(nn.Module):
    """Rows of a table that is held in k bits. It is not trained.

    Args:
        table: (V, H).
        dtype: of the rows.

    Attributes:
        num_embeddings, embedding_dim: V and H.
        packed: the table.
    """

    def __init__(self, table: QuantTensor | PackedMatrix, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.packed = table if isinstance(table, PackedMatrix) else PackedMatrix(table)
        self.num_embeddings, self.embedding_dim = self.packed.shape
        self.dtype = dtype

    @property
    def weight(self) -> torch.Tensor:
        """The table as the codes say, made anew each time: to be read, as writing to it changes nothing."""
        return self.packed.matrix.dequantize(self.dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.packed.matrix.dequantize_rows(ids.reshape(-1))
        return rows.to(self.dtype).view(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.packed.format}"
