"""Writing a model for other programs: a Hugging Face folder of plain floats, whatever it was read from."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kbit.checkpoint.planned_shards import StoredWeight
from kbit.checkpoint.source import CANONICAL, CheckpointSource
from kbit.checkpoint.writer import DEFAULT_SHARD_BYTES, CheckpointWriter
from kbit.formats.codec import Part
from kbit.host.errors import KbitError
from kbit.models.check import check_tensors, stored_spec
from kbit.models.families import FAMILIES, spec_from_config
from kbit.models.family import Family, family_of
from kbit.models.parameter import Parameter
from kbit.models.published import Part as PublishedPart
from kbit.models.published import PublishedTensor, StackedTensor, published_tensors
from kbit.models.spec import ModelSpec

# What values can be written as: safetensors' name, torch's type, and its name in configurations.
DTYPES = {
    "fp16": ("F16", torch.float16, "float16"),
    "bf16": ("BF16", torch.bfloat16, "bfloat16"),
    "fp32": ("F32", torch.float32, "float32"),
}
_VALUES_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        nbytes: of the weights.
        tensors: how many.
        error: root mean square of what rounding to the type changed, relative to the values; 0.0: nothing.
    """

    nbytes: int
    tensors: int
    error: float


def export_safetensors(
    source: CheckpointSource,
    out: Path,
    dtype: str,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    resume: bool = True,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write a model as transformers and what follows it read it: tensors named and laid out as its family's are.

    Quantized weights become the floats that they stand for.

    Args:
        source: an open model (`kbit.models.opening`).
        out: folder to create.
        dtype: one of DTYPES.
        shard_bytes: largest file.
        resume: continue an interrupted run; else start over.
        overwrite: replace a folder that kbit wrote.
        progress: called as (bytes done, bytes in all).

    Raises:
        KbitError: values that the type cannot hold, or that are not finite; the folder cannot be written.
        CheckpointError, UnsupportedError: see kbit.models.load.
    """
    where = f"config of {source.path}"
    family, spec = family_of(FAMILIES, source.config, where), spec_from_config(source.config, where=where)
    if spec.task is not None:  # (of a decoder, a head that is missing is missed)
        spec = stored_spec(source, spec)
    check_tensors(source, spec)
    stored_as, _, name_of_type = DTYPES[dtype]
    tensors = (*published_tensors(spec, family.layout), *_beside(source, spec))
    weights = [StoredWeight(tensor.name, {tensor.name: Part(stored_as, tensor.shape)}) for tensor in tensors]
    identity = json.dumps(["export", source.fingerprint(), dtype, shard_bytes])
    plan_id = hashlib.sha256(identity.encode()).hexdigest()
    squares = [0.0, 0.0]  # of what rounding changes, and of the values
    with CheckpointWriter(out, weights, plan_id, shard_bytes=shard_bytes, resume=resume, overwrite=overwrite) as writer:
        done, total = 0, sum(weight.nbytes for weight in weights)
        for tensor, weight in zip(tensors, weights, strict=True):
            if tensor.name not in writer.done:
                writer.write(tensor.name, {tensor.name: float_pieces(source, tensor, dtype, squares)})
            done += weight.nbytes
            if progress is not None:
                progress(done, total)
        writer.finish(published_config(source, family, name_of_type), source.sidecar_files(), {"exported": dtype})
        return Exported(writer.nbytes, len(tensors), relative_error(squares))


def _beside(source: CheckpointSource, spec: ModelSpec) -> Iterator[PublishedTensor]:
    """What an encoder-decoder may have beside its parameters, and has here: what is added to its logits, and tables of
    positions that are computed as well."""
    if spec.encoder is None:
        return
    names = [f"{stack.names.positions}.weight" for stack in (spec.encoder, spec) if stack.sinusoids is not None]
    for name in dict.fromkeys(filter(None, (spec.names.logit_bias, *names))):
        if name in source.tensors:
            shape = source.tensors[name].shape
            yield PublishedTensor(name, shape, (PublishedPart(Parameter(name, "beside", None, "rows", shape)),))


def published_config(source: CheckpointSource, family: Family, dtype: str) -> dict[str, Any]:
    """A source's configuration as the family publishes it, of plain floats in a type (its name in configurations)."""
    ours = (CANONICAL, "quantization_config", "transformers_weights")
    config = {key: value for key, value in source.config.items() if key not in ours}
    config.pop("torch_dtype", None)
    return {"architectures": [family.architectures[0]], **config, "dtype": dtype}


def relative_error(squares: list[float]) -> float:
    """Of the sums of squares of what changed and of the values: the root of their quotient."""
    return math.sqrt(squares[0] / squares[1]) if squares[1] > 0 else 0.0


def float_pieces(
    source: CheckpointSource, tensor: PublishedTensor | StackedTensor, dtype: str, squares: list[float]
) -> Iterator[memoryview]:
    """The bytes of a published tensor in one of DTYPES, piece by piece.

    Args:
        source: of canonical tensors.
        tensor: which.
        dtype: of the result.
        squares: the sums of squares of what rounding changes, and of the values, are added to its two numbers.

    Raises:
        KbitError: values that are not finite, there or in the type.
    """
    type_ = DTYPES[dtype][1]
    for values in tensor.rows(source, _VALUES_AT_ONCE):
        if not bool(torch.isfinite(values).all()):
            raise KbitError(f"{source.path}: {tensor.name} holds NaN or infinity: mend the source")
        kept = values.to(type_)
        if not bool(torch.isfinite(kept).all()):
            largest = float(values.abs().max())
            raise KbitError(
                f"{source.path}: {tensor.name} holds values up to {largest:.3g}, which {dtype} cannot: use --dtype "
                "bf16 or fp32"
            )
        squares[0] += float((kept.float() - values).square().sum(dtype=torch.float64))
        squares[1] += float(values.square().sum(dtype=torch.float64))
        yield kept.contiguous().reshape(-1).view(torch.uint8).numpy().data
