"""Deciding, before anything is read, what becomes of every tensor and what that will take.

Linear weights get the default format; embeddings and the head stay as they are unless asked for; overrides by name
pattern come last and win. No torch here: `kbit quantize --dry-run` answers at once.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from kbit.checkpoint.planned_shards import StoredWeight
from kbit.checkpoint.readers.kbit_folder import LAYOUT_VERSION
from kbit.checkpoint.source import CheckpointSource, TensorInfo
from kbit.checkpoint.writer import DEFAULT_SHARD_BYTES, partial_folder
from kbit.formats.codec import Codec, Part
from kbit.formats.quant_format import LEVELS, QuantFormat
from kbit.formats.registry import parse_format
from kbit.formats.trellis import TrellisFormat
from kbit.host.errors import KbitError, UnsupportedError, UsageError
from kbit.quantizers.method import Method
from kbit.quantizers.roles import roles_of
from kbit.quantizers.rtn import RoundToNearest
from kbit.quantizers.stored import STORED, format_as_stored

if TYPE_CHECKING:
    from kbit.quantizers.nested_order import NestedOrder

# What a kept tensor is stored as, by how the source holds it. GGUF's block types have no plain equivalent: their
# values are multiples of an fp16 scale, which fp16 holds to 2^-11. fp8 times its scale needs bf16's range.
_KEEP_AS = {"F64": "F32", "F32": "F32", "F16": "F16", "BF16": "BF16", "F8_E4M3": "BF16", "F8_E5M2": "BF16"}
_KEEP_OTHERWISE = "F16"
# What an override may say instead of a format, and the type that it asks for.
_KEEP_WORDS = {"keep": None, STORED: None, "f16": "F16", "bf16": "BF16", "f32": "F32"}
_INTEGERS = ("BOOL", "U8", "I8", "I16", "I32", "I64")

# The method unless another is named; and what a plan without a method's name was made with, in folders of before.
_RTN = RoundToNearest()
_RTN_1 = {"name": "rtn", "version": 1, "settings": {}}

# Peak memory of a conversion beyond its results: interpreter, torch and libraries (measured: 350 MB), and the scratch
# of one chunk of 2^22 weights (measured: 30 to 60 MB, by format).
BASE_BYTES = 350_000_000
_CHUNK_BYTES = 60_000_000


@dataclass(frozen=True)
class TensorPlan:
    """What becomes of one tensor.

    Attributes:
        source: the tensor in the source.
        format: the k-bit format, or None to keep it.
        keep_as: for a kept tensor, the safetensors dtype it is stored in.
        role: "linear", "embedding", "table", "head" or "other" (norms, biases); see `kbit.quantizers.roles`.
        as_stored: the source holds it quantized, and it stays so: `format` is that of `kbit.quantizers.stored`.
    """

    source: TensorInfo
    format: Codec | None
    keep_as: str
    role: str
    as_stored: bool = False

    @property
    def label(self) -> str:
        return str(self.format) if self.format else self.keep_as.lower()

    def stored(self) -> StoredWeight:
        name, shape = self.source.name, self.source.shape
        if self.format is None:
            return StoredWeight(name, {name: Part(self.keep_as, shape)})
        parts = self.format.parts(shape[0], shape[1])
        return StoredWeight(name, {f"{name}.{suffix}": part for suffix, part in parts.items()})

    @property
    def nbytes(self) -> int:
        return self.stored().nbytes


@dataclass(frozen=True)
class Plan:
    """A whole conversion.

    Attributes:
        default_format: the format of linear weights.
        tensors: one entry per tensor, in the source's order.
        shard_bytes: largest size of one output file.
        plan_id: hex digest of everything that determines the output, the source's fingerprint included.
        method: who finds the codes.
        method_memory: bytes that the method works in.
        nested: mixed widths of nested matrices, where they have any.
    """

    default_format: Codec
    tensors: tuple[TensorPlan, ...]
    shard_bytes: int
    plan_id: str
    method: Method
    method_memory: int = 0
    nested: NestedOrder | None = None

    @property
    def bytes_before(self) -> int:
        return sum(tensor.source.nbytes for tensor in self.tensors)

    @property
    def bytes_after(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def bits_per_weight(self, *roles: str) -> float | None:
        """Stored bits per weight over the tensors of the given roles (all without); None where there are none."""
        chosen = [tensor for tensor in self.tensors if not roles or tensor.role in roles]
        numel = sum(tensor.source.numel for tensor in chosen)
        return 8 * sum(tensor.nbytes for tensor in chosen) / numel if numel else None

    @property
    def peak_memory(self) -> int:
        """Estimated peak resident memory, in bytes: constants, and the largest result or what the method takes."""
        largest = max((tensor.nbytes for tensor in self.tensors if tensor.format), default=0)
        return BASE_BYTES + max(_CHUNK_BYTES + largest, self.method_memory)


def make_plan(
    source: CheckpointSource,
    format: Codec,
    *,
    embedding_bits: int | None = None,
    formats: Mapping[str, Codec | str] | None = None,
    overrides: Sequence[tuple[str, str]] = (),
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    method: Method = _RTN,
) -> Plan:
    """Plan a conversion.

    Args:
        source: the model.
        format: for linear weights.
        embedding_bits: quantize embeddings and head too, to this many bits (16: keep), in that width's default data
            type with the same blocks and scales; in the format's own where the method has no use for that.
        formats: of single tensors, by name, instead of what the two above say: a format, or how to keep it ("f16").
        overrides: (pattern, what) pairs: a format string, or "keep" to leave the tensor as it is, or "f16", "bf16",
            "f32" to keep it in that type, or "stored" to keep it quantized as the source has it (what is not quantized
            there is kept). Patterns are shell-style and match whole tensor names; the last match wins.
        shard_bytes: largest output file.
        method: who finds the codes.

    Raises:
        UsageError: the method has no use for a format, an override matches nothing or asks for the impossible, or the
            source is quantized by kbit already.
        UnsupportedError: the source has integer tensors.
    """
    if (source.config.get("quantization_config") or {}).get("quant_method") == "kbit":
        raise UsageError(f"{source.path}: already quantized by kbit; start from the model it was made of")
    chosen = [(pattern, _override(pattern, text)) for pattern, text in overrides]
    unused = {pattern for pattern, _ in chosen}
    tensors = []
    roles = roles_of(source)
    tied = bool(source.config.get("tie_word_embeddings")) and "embedding" in roles.values()
    for info in source.tensors.values():
        role = roles[info.name]
        if role == "ignored":
            continue
        if info.stored_as in _INTEGERS:
            raise UnsupportedError(f"{info.file}: {info.name} is {info.stored_as}, but weights must be floating point")
        if role == "head" and tied:
            continue  # the same matrix under a second name; tied it stays, stored once
        target = (formats or {}).get(info.name) or _default_target(role, format, embedding_bits, method)
        for pattern, replacement in chosen:
            if fnmatchcase(info.name, pattern):
                unused.discard(pattern)
                target = replacement
        tensors.append(_tensor_plan(info, target, role, method))
    if unused:
        raise UsageError(f"override pattern {sorted(unused)[0]!r} matches no tensor; kbit info lists their names")
    if not any(tensor.format for tensor in tensors):
        raise UsageError(f"{source.path}: nothing to quantize: every one of the {len(tensors)} tensors is kept")
    for chosen_format in {tensor.format for tensor in tensors if tensor.format and not tensor.as_stored}:
        reason = method.refuses(chosen_format)
        if reason is not None:
            raise UsageError(f"method {method.name}, format {chosen_format}: {reason}")
    plan_id = _plan_id(source, format, tensors, shard_bytes, method)
    return Plan(format, tuple(tensors), shard_bytes, plan_id, method, method.memory(source))


def with_formats(source: CheckpointSource, plan: Plan, formats: Mapping[str, Codec]) -> Plan:
    """A plan of the source with other formats for some matrices, by name."""
    tensors = [
        replace(tensor, format=formats.get(tensor.source.name, tensor.format)) if tensor.format else tensor
        for tensor in plan.tensors
    ]
    plan_id = _plan_id(source, plan.default_format, tensors, plan.shard_bytes, plan.method)
    return replace(plan, tensors=tuple(tensors), plan_id=plan_id)


def parse_target(text: str) -> Codec | str:
    """What is to become of a tensor: a format, or one of "keep", "stored", "f16", "bf16", "f32".

    Raises:
        UsageError: it is neither.
    """
    return text if text in _KEEP_WORDS else parse_format(text)


def check_disk(plan: Plan, out: Path) -> int:
    """Bytes the output needs on disk (shards and 16 MB for the rest), refusing early where they are not free.

    What an interrupted run has written counts as free: it is continued, or removed.

    Raises:
        KbitError: the file system of `out` has too little room, or is not there.
    """
    needed = plan.bytes_after + 16_000_000
    try:
        folder = next((parent for parent in (out.absolute(), *out.absolute().parents) if parent.exists()), None)
        if folder is None:
            raise KbitError(f"{out}: there is no such drive; choose another --output")
        free = shutil.disk_usage(folder).free + _bytes_in(partial_folder(out))
    except OSError as error:
        raise KbitError(f"{out}: cannot be written ({error.strerror}); choose another --output") from None
    if free < needed:
        raise KbitError(
            f"{out}: needs {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free; make room or choose another "
            "--output"
        )
    return needed


def _tensor_plan(info: TensorInfo, target: Codec | str, role: str, method: Method) -> TensorPlan:
    keep_as = _KEEP_AS.get(info.stored_as, _KEEP_OTHERWISE)
    if target == STORED:
        as_stored = format_as_stored(info)
        if as_stored is not None and method.changes_weights:
            raise UsageError(
                f"{info.name}: method {method.name} changes weights before it rounds them, so none can stay as it is "
                "stored; use another --method"
            )
        return TensorPlan(info, as_stored, keep_as, role, as_stored=as_stored is not None)
    if isinstance(target, str):
        return TensorPlan(info, None, _KEEP_WORDS[target] or keep_as, role)
    if len(info.shape) != 2:
        raise UsageError(f"{info.name} has shape {info.shape}: only matrices can be quantized; narrow the pattern")
    if isinstance(target, QuantFormat) and target.dtype == LEVELS:
        raise UsageError(f'{info.name}: nothing is rounded to {target}; "stored" keeps what is quantized as it is')
    unreadable = isinstance(target, TrellisFormat) or target.outliers
    if unreadable and role in ("embedding", "table"):
        what = "a trellis" if isinstance(target, TrellisFormat) else "a matrix that keeps weights apart"
        raise UsageError(
            f"{info.name}: rows of {what} are not looked up one by one; give it another format, such as "
            f"--override '{info.name}=int8-b64'"
        )
    return TensorPlan(info, target, keep_as, role)


def _default_target(role: str, format: Codec, embedding_bits: int | None, method: Method) -> Codec | str:
    if role == "linear":
        return format
    if role in ("embedding", "table", "head") and embedding_bits is not None and embedding_bits != 16:
        usual = format.at_width(embedding_bits)
        # HQQ has offsets to find, which the width's default data type lacks.
        if method.refuses(usual) is not None and isinstance(format, QuantFormat):
            return replace(format, bits=embedding_bits)
        return usual
    return "keep"


def _bytes_in(folder: Path) -> int:
    """What the files of a folder occupy; of sparse files, only what was written."""
    if not folder.is_dir():
        return 0
    found = [path.stat() for path in folder.iterdir() if path.is_file()]
    return sum(s.st_blocks * 512 if hasattr(s, "st_blocks") else s.st_size for s in found)


def _override(pattern: str, text: str) -> Codec | str:
    """What an override asks for."""
    if not pattern:
        raise UsageError(
            "an override's pattern is empty; write PATTERN=FORMAT, for example '*.down_proj.weight=int8-b64'"
        )
    return parse_target(text)


def _plan_id(
    source: CheckpointSource, format: Codec, tensors: Sequence[TensorPlan], shard_bytes: int, method: Method
) -> str:
    description: dict[str, object] = {
        "layout": LAYOUT_VERSION,
        "format": str(format),
        "source": source.fingerprint(),
        "shard_bytes": shard_bytes,
        "tensors": [(tensor.source.name, tensor.source.shape, tensor.label) for tensor in tensors],
    }
    if method.identity != _RTN_1:
        description["method"] = method.identity
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
