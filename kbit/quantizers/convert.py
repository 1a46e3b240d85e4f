"""Turning a checkpoint into a k-bit one: tensor by tensor, resumable, nothing half-written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kbit.checkpoint.ladder import ORDER
from kbit.checkpoint.output_folder import finished_plan
from kbit.checkpoint.readers.kbit_folder import LAYOUT_VERSION, KbitFolder
from kbit.checkpoint.source import CheckpointSource
from kbit.checkpoint.writer import CheckpointWriter, remove_leftovers
from kbit.formats.blockwise import CHUNK_WEIGHTS
from kbit.formats.codec import Codec, no_kernel
from kbit.formats.outlier_weights import encode_apart
from kbit.formats.quant_format import QuantFormat
from kbit.formats.quant_tensor import SAFETENSORS_TO_TORCH, QuantTensor
from kbit.formats.trellis import TrellisFormat
from kbit.formats.trellis_code import searching_with
from kbit.host.errors import CheckpointError, KbitError
from kbit.host.progress import Progress
from kbit.quantizers.method import Encode, MethodInput, QuantizedSource
from kbit.quantizers.plan import Plan, TensorPlan, check_disk
from kbit.quantizers.stored import read_as_stored

# transformers reads a folder of ours with `kbit.transformers` only. Without, it would warn, and run random weights: so
# the configuration names a weight file, which transformers then refuses by that name.
NEEDS_PLUGIN = "packed by kbit: import kbit.transformers before from_pretrained, or kbit export to plain floats"
# The layer a tensor belongs to.
_LAYER = re.compile(r"\blayers\.([0-9]+)\.")


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        out: the finished folder.
        written: weights written by this run.
        resumed: weights that an earlier run had left, finished or interrupted.
        nbytes: size of the weight files.
        already_complete: the folder was there, made by the same plan; nothing was done.
        notes: what a user should know of how the method made it.
    """

    out: Path
    written: int
    resumed: int
    nbytes: int
    already_complete: bool = False
    notes: tuple[str, ...] = ()


def convert(
    source: CheckpointSource,
    plan: Plan,
    out: Path,
    *,
    resume: bool = True,
    overwrite: bool = False,
    on_tensor: Callable[[TensorPlan], None] | None = None,
    encode: Encode | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Carry out a plan: write what its method makes of the source, layer by layer.

    Args:
        source: the model the plan was made for.
        plan: what to do.
        out: folder to create; a finished one of the same plan is left as it is, unless `overwrite`.
        resume: continue an interrupted run of the same plan.
        overwrite: replace a finished model.
        on_tensor: called after each tensor (also for those found finished on resuming).
        encode: who rounds, where the method leaves that open; None: the CPU (`Codec.encode`).
        progress: see MethodInput.

    Raises:
        KbitError and its kinds: see CheckpointWriter and Codec.encode; everything written stays for a rerun.
    """
    if finished_plan(out) == plan.plan_id and not overwrite:
        try:
            KbitFolder(out).close()
        except CheckpointError as error:
            raise CheckpointError(f"{error}; or make {out} anew with --force") from None
        remove_leftovers(out)
        nbytes = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        return Conversion(out, 0, len(plan.tensors), nbytes, already_complete=True)
    check_disk(plan, out)  # before the writer gives its files their full size
    weights = [tensor.stored() for tensor in plan.tensors]
    with CheckpointWriter(
        out, weights, plan.plan_id, shard_bytes=plan.shard_bytes, resume=resume, overwrite=overwrite
    ) as writer:
        found = writer.done
        made = plan.method.apply(MethodInput(source, plan, encode=encode, progress=progress))
        for tensor in sorted(plan.tensors, key=_layer):
            if tensor.source.name not in found:
                if tensor.format is None:
                    _write_kept(made, tensor, writer)
                else:
                    _write_quantized(source, made, tensor, writer)
            if on_tensor is not None:
                on_tensor(tensor)
        writer.finish(quantized_config(source.config, plan), source.sidecar_files(), {"method": plan.method.identity})
        return Conversion(out, len(plan.tensors) - len(found), len(found), writer.nbytes, notes=made.notes)


def quantized_config(config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """The model's config with kbit's quantization_config in it (see kbit_folder for the layout)."""
    tensors, codebooks = {}, {}
    for tensor in plan.tensors:
        format = tensor.format
        if format is None:
            continue
        tensors[tensor.source.name] = {"format": str(format), "shape": list(tensor.source.shape)}
        columns = tensor.source.shape[1]
        key = format.codebook_key(columns)
        if key is not None and key not in codebooks:
            codebooks[key] = format.codebook(columns).tolist()
    section: dict[str, Any] = {
        "quant_method": "kbit",
        "version": LAYOUT_VERSION,
        "format": str(plan.default_format),
        "bits": plan.default_format.bits,
        "tensors": tensors,
        "codebooks": codebooks,
    }
    if plan.nested is not None:
        section[ORDER] = plan.nested.order.to_json()
    return {**config, "transformers_weights": NEEDS_PLUGIN, "quantization_config": section}


def on_gpu(device: torch.device | str = "cuda") -> Encode:
    """Rounding on a GPU, by the Triton kernels: the same bytes as on the CPU.

    A tensor is read whole, as float32, on the host and on the GPU. Of trellis codes only the search runs there.
    """
    from kbit.kernels.triton.target import active

    def run(source: CheckpointSource, name: str, format: Codec) -> QuantTensor:
        if isinstance(format, TrellisFormat):
            weight = source.read(name).float()
            with trellises_on_gpu(device):
                return format.encode(
                    lambda start, stop: weight[start:stop], (weight.shape[0], weight.shape[1]), name=name
                )
        with active(device):
            return _nearest_on_gpu(source.read(name), _planes_format(format), name, device)

    return run


def _nearest_on_gpu(weight: torch.Tensor, format: QuantFormat, name: str, device: torch.device | str) -> QuantTensor:
    """A matrix of the host's rounded on a GPU. Which weights are kept apart the host finds."""
    from kbit.kernels.triton.codecs.quantize import quantize

    if not format.outliers:
        return quantize(weight.to(device), format, name=name).to("cpu")
    return encode_apart(
        format, lambda start, stop: weight[start:stop], (weight.shape[0], weight.shape[1]),
        lambda plain, others: _nearest_on_gpu(others(0, len(weight)), _planes_format(plain), name, device),
    )  # fmt: skip


@contextmanager
def trellises_on_gpu(device: torch.device | str = "cuda") -> Iterator[None]:
    """Within this block trellis codes are searched for on a GPU, by whatever method: the same codes as on the CPU."""
    from kbit.kernels.triton.codecs.trellis_search import search_on_gpu

    with searching_with(lambda format, tiles, factors: search_on_gpu(format, tiles, device, factors)):
        yield


def _planes_format(format: Codec) -> QuantFormat:
    if not isinstance(format, QuantFormat):
        raise no_kernel("triton", format, {QuantFormat.family: None, TrellisFormat.family: None})
    return format


def _layer(tensor: TensorPlan) -> int:
    """The number of a tensor's layer; -1 for what stands outside of layers."""
    found = _LAYER.search(tensor.source.name)
    return int(found[1]) if found else -1


def _write_quantized(
    source: CheckpointSource, made: QuantizedSource, tensor: TensorPlan, writer: CheckpointWriter
) -> None:
    name, format = tensor.source.name, tensor.format
    stored = format if tensor.as_stored and isinstance(format, QuantFormat) else None
    weight = made.read_weight(name) if stored is None else read_as_stored(source, name, stored)
    if not isinstance(weight, QuantTensor) or weight.format != tensor.format:
        raise RuntimeError(f"{name}: the method did not make the planned {tensor.format} of it")
    writer.write(name, {f"{name}.{suffix}": [_bytes(array)] for suffix, array in weight.stored.items()})


def _write_kept(made: QuantizedSource, tensor: TensorPlan, writer: CheckpointWriter) -> None:
    name = tensor.source.name
    pieces: Iterable[memoryview] = _kept_pieces(made, tensor)
    writer.write(name, {name: pieces})


def _kept_pieces(made: QuantizedSource, tensor: TensorPlan) -> Iterator[memoryview]:
    name, shape = tensor.source.name, tensor.source.shape
    dtype = SAFETENSORS_TO_TORCH[tensor.keep_as]
    rows = shape[0] if shape else 1
    step = max(1, CHUNK_WEIGHTS * rows // max(1, tensor.source.numel))
    for start in range(0, rows, step):
        values = made.read_rows(name, start, min(start + step, rows))
        kept = values.to(dtype)
        if not bool(torch.isfinite(kept).all()):
            bad = int((~torch.isfinite(kept)).sum())
            if not bool(torch.isfinite(values).all()):
                raise KbitError(f"{name}: {bad} values are NaN or infinite: mend the source")
            raise KbitError(f"{name}: {bad} values do not fit {tensor.keep_as}: keep it with --override '{name}=f32'")
        largest = values.abs().max().item() if values.numel() else 0.0
        # (What was of this type, or float32 holds, is held exactly.)
        if 0 < largest < torch.finfo(dtype).tiny and not torch.equal(kept.to(values.dtype), values):
            raise KbitError(
                f"{name}: values of at most {largest:.3g} would lose their bits in {tensor.keep_as}: keep it with "
                f"--override '{name}=f32'"
            )
        yield _bytes(kept)


def _bytes(array: torch.Tensor) -> memoryview:
    """A tensor's bytes without a copy."""
    return array.contiguous().reshape(-1).view(torch.uint8).numpy().data
