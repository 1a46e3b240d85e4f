"""The kernels as torch operators, so that torch.compile and torch.export see through what calls them.

    torch.ops.kbit.matmul           gated_matmul      embed
    torch.ops.kbit.rms_norm         add_rms_norm      layer_norm      activate      softcap
    torch.ops.kbit.kv_append        attention_decode  attention_prefill_paged
    torch.ops.kbit.gated_delta      state_space       short_convolution
    torch.ops.kbit.dequantize_planes

Importing this module registers them, each with a fake implementation that knows shapes and types only. They compute
what the launchers of the same names do, whose docstrings say what that is. An operator takes tensors, numbers and
strings, so a prepared weight travels as its tensors and a description (whether its products round their activations,
`rounded.with_activations`, is part of that):

    tensors, description = pack(weight)
    y = torch.ops.kbit.matmul(x, tensors, description)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch

from kbit.kernels.triton.attention import decode as _decode
from kbit.kernels.triton.attention import kv_append as _kv_append
from kbit.kernels.triton.attention import prefill as _prefill
from kbit.kernels.triton.attention import softcap as _softcap
from kbit.kernels.triton.codecs import dequantize as _dequantize
from kbit.kernels.triton.codecs.layout import TritonWeight
from kbit.kernels.triton.product import matmul as _matmul
from kbit.kernels.triton.recurrent import convolution as _convolution
from kbit.kernels.triton.recurrent import recurrence as _recurrence
from kbit.kernels.triton.recurrent.sizes import RecurrentHeads, Sequences
from kbit.kernels.triton.rows import activate as _activate
from kbit.kernels.triton.rows import embed as _embed
from kbit.kernels.triton.rows import norm as _norm
from kbit.kernels.triton.target import active

F = TypeVar("F", bound=Callable[..., Any])

_PARTS = (
    *("scales", "scales_super", "offsets", "offsets_super", "table", "table8", "dense"),
    *("rotation", "outlier_spans", "outlier_places", "outliers"),
)
_FIXED = ("format", "shape", "padded", "kind", "zero", "multiplier", "lift", "bits", "block_size", "mixed")
_FIXED_FURTHER = ("window", "half", "activations", "multiplier8")


def pack(weight: TritonWeight) -> tuple[list[torch.Tensor], str]:
    """A weight as arguments of the operators: its tensors, and everything else as JSON."""
    present = [name for name in _PARTS if getattr(weight, name) is not None]
    fixed: dict[str, Any] = {name: getattr(weight, name) for name in (*_FIXED, *_FIXED_FURTHER)}
    fixed["dtype"] = str(weight.dtype).removeprefix("torch.")
    fixed["parts"] = present
    return [*weight.planes, *(getattr(weight, name) for name in present)], json.dumps(fixed)


def unpack(tensors: list[torch.Tensor], description: str) -> TritonWeight:
    """The reverse of pack."""
    fixed = dict(_parsed(description))
    present = fixed.pop("parts")
    planes = tensors[: len(tensors) - len(present)]
    parts = dict(zip(present, tensors[len(planes) :], strict=True))
    return TritonWeight(planes=tuple(planes), **parts, **fixed)


@lru_cache(maxsize=4096)
def _parsed(description: str) -> dict[str, Any]:
    fixed = json.loads(description)
    fixed.update(shape=tuple(fixed["shape"]), padded=tuple(fixed["padded"]), dtype=getattr(torch, fixed["dtype"]))
    return dict(fixed)


def _rows_of(description: str) -> int:
    return int(_parsed(description)["shape"][0])


def _where_its_tensors_are(run: F) -> F:
    """Launches on the GPU of the first argument, as torch's own operators do, whichever is current."""

    @wraps(run)
    def there(first: Any, *others: Any, **options: Any) -> Any:
        tensor = first if isinstance(first, torch.Tensor) else first[0]
        with active(tensor.device):
            return run(first, *others, **options)

    return there  # type: ignore[return-value]


@torch.library.custom_op("kbit::matmul", mutates_args=())
@_where_its_tensors_are
def matmul(
    x: torch.Tensor,
    tensors: list[torch.Tensor],
    description: str,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    return _matmul.matmul(x, unpack(tensors, description), bias, residual, out_dtype)


@matmul.register_fake
def _(x, tensors, description, bias=None, residual=None, out_dtype=None):
    return x.new_empty((x.shape[0], _rows_of(description)), dtype=out_dtype or x.dtype)


@torch.library.custom_op("kbit::gated_matmul", mutates_args=())
@_where_its_tensors_are
def gated_matmul(
    x: torch.Tensor,
    gate: list[torch.Tensor],
    gate_description: str,
    up: list[torch.Tensor],
    up_description: str,
    kind: str,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    return _matmul.gated_matmul(x, unpack(gate, gate_description), unpack(up, up_description), kind, out_dtype)


@gated_matmul.register_fake
def _(x, gate, gate_description, up, up_description, kind, out_dtype=None):
    return x.new_empty((x.shape[0], _rows_of(gate_description)), dtype=out_dtype or x.dtype)


@torch.library.custom_op("kbit::embed", mutates_args=())
@_where_its_tensors_are
def embed(
    tensors: list[torch.Tensor], description: str, ids: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    return _embed.embed(unpack(tensors, description), ids, dtype)


@embed.register_fake
def _(tensors, description, ids, dtype=None):
    fixed = _parsed(description)
    return tensors[0].new_empty((*ids.shape, fixed["shape"][1]), dtype=dtype or fixed["dtype"])


@torch.library.custom_op("kbit::rms_norm", mutates_args=())
@_where_its_tensors_are
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    return _norm.rms_norm(x, weight, eps, out_dtype=out_dtype)[0]


@rms_norm.register_fake
def _(x, weight, eps, out_dtype=None):
    return x.new_empty(x.shape, dtype=out_dtype or x.dtype)


@torch.library.custom_op("kbit::add_rms_norm", mutates_args=())
@_where_its_tensors_are
def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, out_dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    return _norm.rms_norm(x, weight, eps, residual, out_dtype)


@add_rms_norm.register_fake
def _(x, residual, weight, eps, out_dtype=None):
    return x.new_empty(x.shape, dtype=out_dtype or x.dtype), torch.empty_like(residual)


@torch.library.custom_op("kbit::layer_norm", mutates_args=())
@_where_its_tensors_are
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    return _norm.layer_norm(x, weight, bias, eps, out_dtype=out_dtype)[0]


@layer_norm.register_fake
def _(x, weight, bias, eps, out_dtype=None):
    return x.new_empty(x.shape, dtype=out_dtype or x.dtype)


@torch.library.custom_op("kbit::activate", mutates_args=())
@_where_its_tensors_are
def activate(
    gate: torch.Tensor, up: torch.Tensor | None, kind: str, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    return _activate.activate(gate, up, kind, out_dtype)


@activate.register_fake
def _(gate, up, kind, out_dtype=None):
    return gate.new_empty(gate.shape, dtype=out_dtype or gate.dtype)


@torch.library.custom_op("kbit::softcap", mutates_args=())
@_where_its_tensors_are
def softcap(x: torch.Tensor, cap: float) -> torch.Tensor:
    return _softcap.softcap(x, cap)


@softcap.register_fake
def _(x, cap):
    return x.new_empty(x.shape)


@torch.library.custom_op("kbit::kv_append", mutates_args=("k_pages", "v_pages"))
@_where_its_tensors_are
def kv_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    slots: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k_kind: str,
    v_kind: str,
    rope_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    return _kv_append.kv_append(
        q, k, v, cos, sin, slots, k_pages, v_pages, k_kind=k_kind, v_kind=v_kind, rope_rows=rope_rows
    )


@kv_append.register_fake
def _(q, k, v, cos, sin, slots, k_pages, v_pages, k_kind, v_kind, rope_rows=None):
    return q.new_empty(q.shape)


@torch.library.custom_op("kbit::attention_decode", mutates_args=())
@_where_its_tensors_are
def attention_decode(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    positions: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    k_kind: str,
    v_kind: str,
    window: int | None = None,
    soft_cap: float | None = None,
    slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    max_length: int | None = None,
    chunked: bool = False,
) -> torch.Tensor:
    return _decode.attention_decode(
        q, k_pages, v_pages, block_table, positions, lengths, scale, k_kind=k_kind, v_kind=v_kind, window=window,
        soft_cap=soft_cap, slopes=slopes, sinks=sinks, max_length=max_length, chunked=chunked,
    )  # fmt: skip


@attention_decode.register_fake
def _(q, *others, **options):
    return q.new_empty(q.shape)


@torch.library.custom_op("kbit::attention_prefill_paged", mutates_args=())
@_where_its_tensors_are
def attention_prefill_paged(
    q: torch.Tensor,
    bounds: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    k_kind: str,
    v_kind: str,
    max_queries: int,
    window: int | None = None,
    soft_cap: float | None = None,
    slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    chunked: bool = False,
) -> torch.Tensor:
    return _prefill.attention_prefill_paged(
        q, bounds, k_pages, v_pages, block_table, lengths, scale, k_kind=k_kind, v_kind=v_kind,
        max_queries=max_queries, window=window, soft_cap=soft_cap, slopes=slopes, sinks=sinks,
        chunked=chunked,
    )  # fmt: skip


@attention_prefill_paged.register_fake
def _(q, *others, **options):
    return q.new_empty(q.shape)


@torch.library.custom_op("kbit::gated_delta", mutates_args=("states",))
@_where_its_tensors_are
def gated_delta(
    x: torch.Tensor,
    decay: torch.Tensor,
    write: torch.Tensor,
    log_rates: torch.Tensor,
    states: torch.Tensor,
    bounds: torch.Tensor,
    before: torch.Tensor,
    after: torch.Tensor,
    longest: int,
    key_heads: int,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    heads = RecurrentHeads(key_heads, *states.shape[1:])
    sequences = Sequences(bounds, before, after, longest)
    return _recurrence.gated_delta(x, decay, write, log_rates, states, sequences, heads, out_dtype=out_dtype)


@gated_delta.register_fake
def _(x, decay, write, log_rates, states, bounds, before, after, longest, key_heads, out_dtype=None):
    return x.new_empty((x.shape[0], states.shape[1] * states.shape[3]), dtype=out_dtype or x.dtype)


@torch.library.custom_op("kbit::state_space", mutates_args=("states",))
@_where_its_tensors_are
def state_space(
    x: torch.Tensor,
    steps: torch.Tensor,
    log_rates: torch.Tensor,
    skips: torch.Tensor,
    states: torch.Tensor,
    bounds: torch.Tensor,
    before: torch.Tensor,
    after: torch.Tensor,
    longest: int,
    key_heads: int,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    heads = RecurrentHeads(key_heads, *states.shape[1:])
    sequences = Sequences(bounds, before, after, longest)
    return _recurrence.state_space(x, steps, log_rates, skips, states, sequences, heads, out_dtype=out_dtype)


@state_space.register_fake
def _(x, steps, log_rates, skips, states, bounds, before, after, longest, key_heads, out_dtype=None):
    return x.new_empty((x.shape[0], states.shape[1] * states.shape[3]), dtype=out_dtype or x.dtype)


@torch.library.custom_op("kbit::short_convolution", mutates_args=("states",))
@_where_its_tensors_are
def short_convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    states: torch.Tensor,
    bounds: torch.Tensor,
    before: torch.Tensor,
    after: torch.Tensor,
    longest: int,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    sequences = Sequences(bounds, before, after, longest)
    return _convolution.short_convolution(x, weight, bias, states, sequences, states.shape[1] + 1, out_dtype)


@short_convolution.register_fake
def _(x, weight, bias, states, bounds, before, after, longest, out_dtype=None):
    return x.new_empty(x.shape, dtype=out_dtype or x.dtype)


@torch.library.custom_op("kbit::dequantize_planes", mutates_args=())
@_where_its_tensors_are
def dequantize_planes(
    planes: list[torch.Tensor],
    scales: torch.Tensor,
    scales_super: torch.Tensor | None,
    offsets: torch.Tensor | None,
    offsets_super: torch.Tensor | None,
    codebook: torch.Tensor,
    columns: int,
    bits: int,
    block_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    return _dequantize.dequantize_planes(
        planes, scales, scales_super, offsets, offsets_super, codebook, columns, bits, block_size, dtype
    )


@dequantize_planes.register_fake
def _(planes, scales, scales_super, offsets, offsets_super, codebook, columns, bits, block_size, dtype):
    return codebook.new_empty((planes[0].shape[0], columns), dtype=dtype)
