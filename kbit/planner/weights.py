"""The tensors of a model and what each is kept in: planned from a configuration, or as a checkpoint stores them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeAlias

from kbit.checkpoint.source import CheckpointSource
from kbit.formats.codec import Codec
from kbit.formats.nested import NestedFormat
from kbit.formats.quant_format import QuantFormat
from kbit.formats.registry import parse_format
from kbit.formats.trellis import TrellisFormat
from kbit.host.errors import UnsupportedError, UsageError
from kbit.models.parameter import Parameter
from kbit.models.params import parameters as declared
from kbit.models.spec import ModelSpec

# What a matrix is kept in: a format whose kernels are known here, or one of DENSE_BYTES.
Kept: TypeAlias = QuantFormat | TrellisFormat | str
# Bytes of a number of the types that weights are kept in without being quantized.
DENSE_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
# How files name these types; everything else that is not a k-bit format becomes float32 (kbit.models.load).
_DENSE_OF = {"F16": "fp16", "BF16": "bf16"}


@dataclass(frozen=True)
class Weight:
    """One tensor of a model and what it is kept in.

    Attributes:
        name: its name in a checkpoint.
        role: "linear", "embedding", "table" (tokens are looked up in it, too), "head", "router" (small, and stays as it
            is) or "other" (norms, biases).
        rows, columns: shape; a vector has one row.
        kept: a format, or one of DENSE_BYTES.
        steps: its scales are fp32 products of a step and a size, which the CPU engine keeps apart (GGUF's K types).
        active: the share of tokens that go through it, less than 1 of an expert's.
        nested: it is kept at several widths, `kept` being that of the widest.
    """

    name: str
    role: str
    rows: int
    columns: int
    kept: Kept
    steps: bool = False
    active: float = 1.0
    nested: bool = False

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.rows * self.columns

    @property
    def stored_bytes(self) -> int:
        """Bytes in a file."""
        if isinstance(self.kept, str):
            return self.numel * DENSE_BYTES[self.kept]
        return self.kept.nbytes(self.rows, self.columns)


@lru_cache(maxsize=1)  # a model is planned in many formats, one after another
def _declared(spec: ModelSpec) -> tuple[Parameter, ...]:
    return declared(spec)


def planned_weights(
    spec: ModelSpec,
    linear: Kept,
    *,
    embedding: Kept = "fp16",
    head: Kept = "fp16",
) -> tuple[Weight, ...]:
    """Every tensor of a model, as `kbit quantize` would keep it.

    Args:
        spec: the model.
        linear: what matrices inside layers become.
        embedding, head: likewise; `head` does not matter where it is tied.

    Raises:
        UsageError: a type that is neither a format nor one of DENSE_BYTES.
    """
    for kept in (linear, embedding, head):
        if isinstance(kept, str) and kept not in DENSE_BYTES:
            raise UsageError(f"weights kept as {kept!r}: use a format such as nf4-b64, or {', '.join(DENSE_BYTES)}")
    kinds = {"linear": linear, "embedding": embedding, "table": embedding, "head": head, "router": "fp16"}
    weights = []
    for p in _declared(spec):
        if len(p.shape) <= 1:  # a vector, or a number
            weights.append(Weight(p.name, "other", 1, math.prod(p.shape), "fp32", active=p.active))
        elif p.role == "taps":
            weights.append(Weight(p.name, "other", p.shape[0], p.shape[2], "fp32", active=p.active))
        else:
            role = p.role if p.role in kinds else "router"  # tables of positions and the like
            weights.append(Weight(p.name, role, p.shape[0], p.shape[1], kinds[role], active=p.active))
    return tuple(weights)


def stored_weights(source: CheckpointSource, spec: ModelSpec) -> tuple[Weight, ...]:
    """Every tensor of a checkpoint as it is loaded: k-bit formats packed, 16-bit floats as they are, others as fp32."""
    weights = []
    block_types = _packed_gguf_types()
    for planned in planned_weights(spec, "fp16"):
        kept: Kept = "fp32"
        steps = nested = False
        if planned.role != "other":
            stored = source.tensors[planned.name].stored_as
            kept = _DENSE_OF.get(stored) or block_types.get(stored) or _format_of(stored) or "fp32"
            nested = NestedFormat.claims(stored)
            steps = stored in block_types and block_types[stored].scale_dtype == "fp32"
        weights.append(replace(planned, kept=kept, steps=steps, nested=nested))
    return tuple(weights)


def narrowed_weights(weights: Sequence[Weight], widths: Mapping[str, int]) -> tuple[Weight, ...]:
    """A nested model's tensors at their widths, by name: each takes what a plain format with the same blocks does."""
    return tuple(
        weight
        if not (weight.nested and isinstance(weight.kept, QuantFormat))
        else replace(weight, kept=replace(weight.kept, bits=widths[weight.name]))
        for weight in weights
    )


def parameters(weights: Iterable[Weight], *roles: str) -> int:
    """Number of weights of these roles, or of all."""
    return sum(weight.numel for weight in weights if not roles or weight.role in roles)


def active_parameters(weights: Iterable[Weight]) -> int:
    """Number of weights that a token goes through: of experts, those that it chooses."""
    return round(sum(weight.active * weight.numel for weight in weights))


def stored_bits(weights: Iterable[Weight], *roles: str) -> int:
    """Bits in files of the tensors of these roles, or of all."""
    return 8 * sum(weight.stored_bytes for weight in weights if not roles or weight.role in roles)


def _packed_gguf_types() -> Mapping[str, QuantFormat]:
    from kbit.checkpoint.gguf.blocks import BLOCK_TYPES

    return {name: block_type.format for name, block_type in BLOCK_TYPES.items()}


def _format_of(stored: str) -> QuantFormat | TrellisFormat | None:
    try:
        format = parse_format(stored)
    except UsageError:
        return None
    if isinstance(format, NestedFormat):
        return format.plain(format.bits)
    return known_format(format)


def known_format(format: Codec) -> QuantFormat | TrellisFormat:
    """A format whose sizes and kernels are known here.

    Raises:
        UnsupportedError: it is of another codec.
    """
    if not isinstance(format, QuantFormat | TrellisFormat):
        raise UnsupportedError(
            f"kbit plan knows the sizes of planes and trellis formats, not of {format} (codec {format.family})"
        )
    return format
