"""Layers that wait for their k-bit matrices while transformers loads all else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from kbit.formats.quant_tensor import QuantTensor
from kbit.modules.convert import is_linear
from kbit.modules.embedding import KbitEmbedding
from kbit.modules.linear import KbitLinear
from kbit.modules.packed import PackedMatrix


class Waiting(nn.Module):
    """In the place of a layer: without a weight, so that none is missing or made up.

    Args:
        layer: whose place it takes.

    Attributes:
        embeds: it was an embedding.
        dtype: of its weight.
        bias: its own.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.embeds = isinstance(layer, nn.Embedding)
        self.dtype: torch.dtype = layer.weight.dtype
        self.bias: nn.Parameter | None
        self.register_parameter("bias", getattr(layer, "bias", None))
        # (Some models draw weights of layers that they name, whether or not these are missing.)
        self.register_buffer("weight", torch.zeros(0), persistent=False)

    def filled(
        self, matrices: Sequence[QuantTensor | PackedMatrix], order: torch.Tensor | None, compute: str
    ) -> KbitLinear | KbitEmbedding:
        """The layer with its weight."""
        if self.embeds:
            return KbitEmbedding(matrices[0], dtype=self.dtype)
        return KbitLinear(matrices, self.bias, order=order, compute=compute, dtype=self.dtype)


def can_wait(layer: nn.Module) -> bool:
    """Whether a k-bit layer can take its place: not where a subclass computes something else."""
    return is_linear(layer) or type(layer) is nn.Embedding


def replace(model: nn.Module, path: str) -> Waiting:
    """Puts a waiting layer in the place of one."""
    waiting = Waiting(model.get_submodule(path))
    model.set_submodule(path, waiting)
    return waiting


def untie(model: Any, embedding: str) -> list[str]:
    """Makes transformers forget that weights are tied to an embedding that waits; the layers that were, which now wait
    themselves.

    Args:
        model: of transformers.
        embedding: the name of its weight.
    """
    ties: dict[str, str] = model.all_tied_weights_keys
    together = {name for pair in ties.items() for name in pair if embedding in pair} - {embedding}
    model.all_tied_weights_keys = {a: b for a, b in ties.items() if not {a, b} & (together | {embedding})}
    paths = sorted(name.removesuffix(".weight") for name in together)
    for path in paths:
        replace(model, path)
    return paths


def fill(model: nn.Module, path: str, matrices: Sequence[QuantTensor | PackedMatrix], device: Any, compute: str,
         order: torch.Tensor | None = None) -> KbitLinear | KbitEmbedding:  # fmt: skip
    """Puts a k-bit layer in the place of one that waits.

    Args:
        model: the whole.
        path: of the layer.
        matrices, order, compute: see `KbitLinear`.
        device: where it is to be.
    """
    waiting = model.get_submodule(path)
    assert isinstance(waiting, Waiting)
    layer = waiting.filled(matrices, order, compute).to(device)
    layer.requires_grad_(False)
    model.set_submodule(path, layer)
    return layer
