"""`kbit.quantize_`: the linear layers of any model of torch, in k bits, in place."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from kbit.formats.codec import Codec
from kbit.formats.quant_format import MAX_BITS, MIN_BITS, QuantFormat, default_dtype
from kbit.formats.registry import parse_format
from kbit.host.errors import UsageError
from kbit.modules.embedding import KbitEmbedding
from kbit.modules.linear import KbitLinear
from kbit.modules.products import check_compute

M = TypeVar("M", bound=nn.Module)
# Layers of transformers that do what nn.Linear does, the first with its matrix transposed; by module and name, as it is
# not imported here.
_LIKE_LINEAR = {
    ("transformers.pytorch_utils", "Conv1D"),
    ("transformers.models.falcon.modeling_falcon", "FalconLinear"),
}


def chosen_format(bits: int, format: str | None) -> Codec:
    """The format of a width, or the one that is named: as `kbit quantize --bits` and `--format` have it.

    Raises:
        UsageError: there is none.
    """
    if format is not None:
        return parse_format(format)
    if type(bits) is not int or not MIN_BITS <= bits <= MAX_BITS:
        raise UsageError(f"bits {bits!r}: use a whole number from {MIN_BITS} to {MAX_BITS}")
    return QuantFormat(dtype=default_dtype(bits), bits=bits)


def quantize_(
    module: M, bits: int = 4, *, format: str | None = None, skip: Sequence[str] = (), compute: str = "fp32"
) -> M:
    """Rounds the weights of every nn.Linear inside a module to nearest, in place.

    Subclasses of nn.Linear are left alone, as they may compute something else (but for Falcon's, which does not).

    Args:
        module: any; a model of transformers, too, whose Conv1D layers (GPT-2) count as linear.
        bits: per weight, 2 to 8; scales come on top.
        format: instead of `bits`, the whole format ("int3-b32").
        skip: regular expressions of the names of layers to leave; the head of a language model, say ("lm_head").
        compute: see `KbitLinear`.

    Returns:
        The module.

    Raises:
        UsageError: a format that does not exist; no layer is left to quantize.
        KbitError: weights that are no numbers, or that the format cannot hold.
    """
    codec = chosen_format(bits, format)
    check_compute(compute)
    found = [
        (name, layer)
        for name, layer in module.named_modules()
        if is_linear(layer) and not any(re.fullmatch(pattern, name) for pattern in skip)
    ]
    if not found:
        raise UsageError(f"{type(module).__name__} has no linear layer to quantize: there is none, or all are skipped")
    if found[0][0] == "":
        raise UsageError("a single nn.Linear cannot be replaced in place: put it into a module (nn.Sequential(layer))")
    for name, layer in found:
        module.set_submodule(name, packed_linear(layer, codec, name, compute))
    return module


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer is x W^T + b and nothing else."""
    kind = type(layer)
    return kind is nn.Linear or (kind.__module__, kind.__name__) in _LIKE_LINEAR


def packed_linear(layer: Any, codec: Codec, name: str, compute: str, weight: torch.Tensor | None = None) -> KbitLinear:
    """A linear layer in k bits.

    Args:
        layer: one that `is_linear`.
        codec: the format.
        name: what to call it in errors.
        compute: see `KbitLinear`.
        weight: in place of the layer's.

    Raises:
        KbitError: see `Codec.encode`.
    """
    values = layer.weight if weight is None else weight
    values = (values.T if type(layer).__name__ == "Conv1D" else values).detach()
    matrix = codec.encode(lambda start, stop: values[start:stop].float(), tuple(values.shape), name=f"{name}.weight")
    return KbitLinear([matrix.to(values.device)], layer.bias, compute=compute, dtype=values.dtype)


def dequantize_(module: M) -> M:
    """Puts plain layers in place of k-bit ones, with the values that the codes stand for."""
    for name, layer in list(kbit_layers(module)):
        plain: nn.Module
        if isinstance(layer, KbitEmbedding):
            plain = nn.Embedding(layer.num_embeddings, layer.embedding_dim, _weight=layer.weight)
        else:
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(layer.weight)
            plain.register_parameter("bias", layer.bias)
        plain.train(layer.training)
        module.set_submodule(name, plain)
    return module


def set_compute(module: M, compute: str) -> M:
    """Chooses how k-bit layers multiply on the CPU: "fp32", which rounds nothing, "int8" or "bf16".

    Raises:
        UsageError: there is no such way.
    """
    check_compute(compute)
    for _, layer in kbit_layers(module):
        if isinstance(layer, KbitLinear):
            layer.compute = compute
    return module


def kbit_layers(module: nn.Module) -> Iterator[tuple[str, KbitLinear | KbitEmbedding]]:
    """The k-bit layers of a module, by name."""
    for name, layer in module.named_modules():
        if isinstance(layer, (KbitLinear, KbitEmbedding)):
            yield name, layer
