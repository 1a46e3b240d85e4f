"""Replay: a recorded model as launches of Triton kernels, one for each fused operation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kbit.backends.split_norm import norm_of_parts
from kbit.backends.triton.experts import GroupedExperts
from kbit.backends.triton.kv_cache import TritonPages
from kbit.backends.triton.states import PassStates, convolve, heads_of, recur, scan
from kbit.backends.triton.weight import merge, round_activations, triton_vector, triton_weight
from kbit.graph.backend import Group
from kbit.graph.operations import (
    Activate,
    Adapt,
    Add,
    Attend,
    Columns,
    Convolve,
    CrossAttend,
    Embed,
    FitHeads,
    Given,
    Mix,
    Multiply,
    Norm,
    Operation,
    Project,
    Recur,
    Rotate,
    Scale,
    Scan,
    SigmoidGate,
    SoftCap,
    StoreKeys,
    SumParts,
    Symbol,
    reads,
)
from kbit.graph.ops import Attention, Vector, refuse_attention
from kbit.host.errors import UnsupportedError
from kbit.kernels import reference
from kbit.kernels.triton.attention.decode import attention_decode
from kbit.kernels.triton.attention.kv_append import kv_append
from kbit.kernels.triton.attention.prefill import attention_prefill_paged
from kbit.kernels.triton.attention.rotary import rotary
from kbit.kernels.triton.attention.softcap import softcap
from kbit.kernels.triton.codecs.layout import TritonWeight
from kbit.kernels.triton.product.matmul import gated_matmul, matmul
from kbit.kernels.triton.rows.activate import activate
from kbit.kernels.triton.rows.embed import embed
from kbit.kernels.triton.rows.norm import layer_norm, rms_norm


@dataclass(frozen=True, eq=False)
class EncoderTexts:
    """What cross attention reads.

    Attributes:
        pages: keys and values.
        block_table: int32 (B, pages of a row).
        lengths: int32 (B,), tokens of each row.
    """

    pages: TritonPages
    block_table: torch.Tensor
    lengths: torch.Tensor


@dataclass(frozen=True, eq=False)
class Pass:
    """The tokens of one pass, N in all, and where they stand. Everything is on the device.

    Attributes:
        pages: where keys and values go.
        block_table: int32 (B, pages of a row), the pages of each row.
        slots: int64 (N,), places in the pages.
        cos, sin: float32 (rows, R/2), rotary tables.
        angles: int64 (N,), row of the tables for each token.
        positions: int64 (B, T) where every row has the same T <= DECODE_TOKENS new tokens, else None.
        bounds: int32 (B + 1,): row b's tokens are bounds[b] .. bounds[b + 1]; None with positions, where every
            attention is causal.
        lengths: int32 (B,), tokens of each row, the new ones included.
        longest: most new tokens of a row.
        reach: a bound on lengths.
        encoder: what cross attention reads, if there is any.
        places: int64 (N,), the tokens' positions, where a table of them is looked up.
        types: int64 (N,), the tokens' types; None: all 0.
        states: of recurrent layers, if there are any.
        features: float32 (N, F), what stands in place of ids; None: they do.
    """

    pages: TritonPages
    block_table: torch.Tensor
    slots: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    angles: torch.Tensor
    positions: torch.Tensor | None
    bounds: torch.Tensor | None
    lengths: torch.Tensor
    longest: int
    reach: int
    encoder: EncoderTexts | None = None
    places: torch.Tensor | None = None
    types: torch.Tensor | None = None
    states: PassStates | None = None
    features: torch.Tensor | None = None


class Replay:
    """A recorded function of one symbol as launches.

    Args:
        operations: fused (`kbit.graph.fuse.fuse`).
        input: the symbol it is called with.
        result: the symbol it returns.
        dtype: of what is multiplied.
        group: processes over which parts of sums are added up.
        activations: what products with many tokens round these to, "int8" or "fp8"; "" for not at all.

    Raises:
        UnsupportedError: a weight's format cannot be multiplied with such activations; an attention or a layer that
            has no kernel.
    """

    def __init__(
        self,
        operations: Sequence[Operation],
        input: Symbol,
        result: Symbol,
        dtype: torch.dtype,
        group: Group | None = None,
        activations: str = "",
    ) -> None:
        if any(isinstance(operation, Adapt) for operation in operations):
            raise UnsupportedError(
                "the triton backend runs no LoRA adapters beside a model: open the adapter's folder as the model, "
                "which adds it to the weights, or use --device cpu"
            )
        self._operations = list(operations)
        self._input, self._result, self._dtype, self._group = input, result, dtype, group
        last = {symbol: index for index, operation in enumerate(operations) for symbol in reads(operation)}
        last[result] = len(operations)
        # Symbols that nobody reads after an operation: their memory is free for the next one.
        self._dead = [[symbol for symbol, index in last.items() if index == i] for i in range(len(operations))]
        self._experts: dict[Operation, GroupedExperts] = {}
        # What is added or normalised, or chooses experts, stays in float32, as does what comes out.
        self._exact = {result}
        for operation in operations:
            if isinstance(operation, Add | SumParts | Norm | Scale | SoftCap):
                self._exact.update(reads(operation))
            elif isinstance(operation, Attend):
                refuse_attention(operation.attention, "triton", mask=("causal", "bidirectional"))
                two_sided = operation.attention.window is not None and operation.attention.mask != "causal"
                if two_sided or operation.by_distance is not None:
                    kind = "a window to both sides" if two_sided else "scores that depend on the distance"
                    raise UnsupportedError(
                        f"the triton backend has no attention with {kind}; use --backend native or reference"
                    )
            elif isinstance(operation, Mix):
                self._exact.add(operation.logits)
                self._experts[operation] = GroupedExperts(operation)
            elif isinstance(operation, Recur):
                heads_of(operation.recurrence)
                self._exact.update((operation.decay, operation.write))
            elif isinstance(operation, Scan):
                heads_of(operation.space)
                self._exact.add(operation.steps)
        self._merged: dict[Operation, TritonWeight] = {}
        if activations:
            projects = [operation for operation in operations if isinstance(operation, Project)]
            round_activations([weight for project in projects for weight in project.weights], activations)
        for operation in operations:
            if isinstance(operation, Project) and operation.activation is None and len(operation.weights) > 1:
                merged = merge(operation.weights) if all(bias is None for bias in operation.biases) else None
                if merged is not None:
                    self._merged[operation] = merged

    def held(self) -> list[TritonWeight]:
        """The weights it reads as they lie now, for who keeps their addresses: another width of the model may move
        those that it multiplies as one."""
        read = [operation for operation in self._operations if isinstance(operation, Project | Embed)]
        several = (operation.weights if isinstance(operation, Project) else (operation.weight,) for operation in read)
        return [*self._merged.values(), *(triton_weight(weight) for weights in several for weight in weights)]

    def __call__(self, x: torch.Tensor, step: Pass | None) -> torch.Tensor:
        """x: token ids (N,), or hidden states (N, hidden) float32 -> (N, width) float32."""
        values = {self._input: x}
        for operation, dead in zip(self._operations, self._dead, strict=True):
            self._run(operation, values, step)
            for symbol in dead:
                del values[symbol]
        return values[self._result]

    def _run(self, operation: Operation, values: dict[Symbol, torch.Tensor], step: Pass | None) -> None:
        if isinstance(operation, Embed):
            ids = values[self._input] if operation.of == "tokens" else _places(operation, step)
            values[operation.out] = embed(triton_weight(operation.weight), ids, dtype=torch.float32)
        elif isinstance(operation, Given):
            assert step is not None
            assert step.features is not None
            values[operation.out] = step.features
        elif isinstance(operation, Norm):
            dtype = torch.float32 if operation.out in self._exact else self._dtype
            values[operation.out] = self._normalised(values[operation.x], operation, dtype)
        elif isinstance(operation, Add):
            values[operation.out] = values[operation.x].float() + values[operation.y]
        elif isinstance(operation, Multiply):
            values[operation.out] = values[operation.x] * values[operation.y]
        elif isinstance(operation, Scale):
            factor = operation.factor if isinstance(operation.factor, float) else triton_vector(operation.factor)
            values[operation.out] = values[operation.x].float() * factor
        elif isinstance(operation, Columns):
            first = operation.first
            values[operation.out] = values[operation.x][:, first : first + operation.out.width].contiguous()
        elif isinstance(operation, SoftCap):
            values[operation.out] = softcap(values[operation.x], operation.cap, out_dtype=torch.float32)
        elif isinstance(operation, Rotate):
            assert step is not None
            values[operation.out] = self._rotated(operation, values[operation.x], step)
        elif isinstance(operation, FitHeads):
            shared = None if operation.shared is None else values[operation.shared]
            head_dim = operation.out.width // operation.heads
            values[operation.out] = reference.fit_heads(values[operation.x], operation.heads, head_dim, shared)
        elif isinstance(operation, SumParts):
            values[operation.out] = self._sum(values[operation.x].float(), operation.bias)
        elif isinstance(operation, Activate):
            up = None if operation.up is None else values[operation.up]
            values[operation.out] = activate(values[operation.gate], up, operation.kind, out_dtype=self._dtype)
        elif isinstance(operation, SigmoidGate):
            values[operation.out] = torch.sigmoid(values[operation.gate].float()) * values[operation.x]
        elif isinstance(operation, Mix):
            x = values[operation.x].to(self._dtype)
            logits = values[operation.logits]
            if self._group is not None:  # one choice for all: sums that differ in a last bit may choose others
                logits = self._group.from_first(logits)
            values[operation.out] = self._experts[operation](x, logits)
        elif isinstance(operation, Attend):
            assert step is not None
            values[operation.out] = self._attend(operation, values, step)
        elif isinstance(operation, StoreKeys):
            assert step is not None
            k, v = values[operation.k], values[operation.v]
            self._append(operation.attention, k, k, v, step)
        elif isinstance(operation, CrossAttend):
            assert step is not None
            values[operation.out] = self._cross(operation, values[operation.q], step)
        elif isinstance(operation, Recur | Scan | Convolve):
            assert step is not None
            assert step.states is not None
            values[operation.out] = self._recurrent(operation, values, step.states)
        elif isinstance(operation, Project):
            self._project(operation, values)

    def _recurrent(
        self, operation: Recur | Scan | Convolve, values: dict[Symbol, torch.Tensor], states: PassStates
    ) -> torch.Tensor:
        x, out = values[operation.x], torch.float32 if operation.out in self._exact else self._dtype
        if isinstance(operation, Recur):
            return recur(operation, x, values[operation.decay], values[operation.write], states, out)
        if isinstance(operation, Scan):
            return scan(operation, x, values[operation.steps], states, out)
        return convolve(operation, x, states, out)

    def _project(self, operation: Project, values: dict[Symbol, torch.Tensor]) -> None:
        x = values[operation.x]
        if operation.norm is not None:
            x = self._normalised(x, operation.norm, self._dtype)
        elif x.dtype != self._dtype:
            x = x.to(self._dtype)
        outs = operation.outs
        biases = tuple(None if bias is None else triton_vector(bias) for bias in operation.biases)
        if operation in self._merged:
            product = matmul(x, self._merged[operation])
            values.update(zip(outs, torch.split(product, [out.width for out in outs], dim=1), strict=True))
            return
        weights = [triton_weight(weight) for weight in operation.weights]
        if operation.activation is not None:
            if len(weights) == 2 and all(bias is None for bias in biases):
                values[outs[0]] = gated_matmul(x, weights[0], weights[1], operation.activation)
                return
            products = [matmul(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
            values[outs[0]] = activate(products[0], products[1] if len(products) > 1 else None, operation.activation)
            return
        residual = None if operation.residual is None else values[operation.residual]
        if operation.parts and self._group is not None:
            # In float32, as one process sums: half precision would halve what travels and round every part.
            total = self._sum(matmul(x, weights[0], out_dtype=torch.float32), operation.biases[0])
            values[outs[0]] = total if residual is None else total.add_(residual)
            return
        for weight, bias, out in zip(weights, biases, outs, strict=True):
            exact = residual is not None or out in self._exact
            values[out] = matmul(x, weight, bias, residual, out_dtype=torch.float32 if exact else None)

    def _normalised(self, x: torch.Tensor, norm: Norm, dtype: torch.dtype) -> torch.Tensor:
        if norm.parts and self._group is not None:
            return norm_of_parts(x, triton_vector(norm.weight), norm.eps, self._group).to(dtype)
        return _normalised(x, norm, dtype)

    def _sum(self, part: torch.Tensor, bias: Vector | None) -> torch.Tensor:
        """The sum of every process's part (N, K) float32, plus a bias; `part` may be overwritten."""
        total = part if self._group is None else self._group.sum(part)
        return total if bias is None else total + triton_vector(bias)

    def _attend(self, operation: Attend, values: dict[Symbol, torch.Tensor], step: Pass) -> torch.Tensor:
        a, store = operation.attention, step.pages
        if operation.k is None or operation.v is None:
            q = self._turned(a, values[operation.q], step)
        else:
            q = self._append(a, values[operation.q], values[operation.k], values[operation.v], step)
        pages = (store.keys[a.layer], store.values[a.layer])
        k_kind, v_kind = store.k_kind, store.v_kind
        sinks = None if operation.sinks is None else triton_vector(operation.sinks)
        if step.positions is not None and a.mask == "causal":
            batch, tokens = step.positions.shape
            q = q.view(batch, tokens, a.heads, a.head_dim)
            out = attention_decode(
                q, *pages, step.block_table, step.positions, step.lengths, a.scale, window=a.window,
                soft_cap=a.soft_cap, sinks=sinks, chunked=a.chunked, max_length=step.reach, k_kind=k_kind,
                v_kind=v_kind,
            )  # fmt: skip
        else:
            assert step.bounds is not None
            out = attention_prefill_paged(
                q, step.bounds, *pages, step.block_table, step.lengths, a.scale, window=a.window,
                soft_cap=a.soft_cap, sinks=sinks, chunked=a.chunked, max_queries=step.longest,
                causal=a.mask == "causal", k_kind=k_kind, v_kind=v_kind,
            )  # fmt: skip
        return out.reshape(-1, operation.out.width)

    def _turned(self, a: Attention, q: torch.Tensor, step: Pass) -> torch.Tensor:
        """Queries (N, H D) as attention wants them, where keys and values are in the pages already."""
        q = q.view(len(q), -1, a.head_dim)
        if a.positions != "rotary":
            return q.to(self._dtype)
        columns = slice(*a.angles) if a.angles is not None else slice(None)
        cos, sin = (table[step.angles, columns] for table in (step.cos, step.sin))
        return rotary(q, cos, sin, out_dtype=self._dtype)

    def _append(self, a: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Pass) -> torch.Tensor:
        """Keys and values into the pages; queries (N, any number of heads times D) as attention wants them."""
        store = step.pages
        q, k, v = (x.view(len(x), -1, a.head_dim) for x in (q, k, v))
        cos, sin = (step.cos, step.sin) if a.positions == "rotary" else (None, None)
        if a.angles is not None and cos is not None and sin is not None:
            first, stop = a.angles
            cos, sin = cos[:, first:stop], sin[:, first:stop]
        return kv_append(
            q, k, v, cos, sin, step.slots, store.keys[a.layer], store.values[a.layer],
            rope_rows=step.angles, k_kind=store.k_kind, v_kind=store.v_kind,
        )  # fmt: skip

    def _rotated(self, operation: Rotate, x: torch.Tensor, step: Pass) -> torch.Tensor:
        first, stop = operation.angles
        cos, sin = (table[step.angles, first:stop] for table in (step.cos, step.sin))
        return rotary(x.view(len(x), -1, operation.head_dim), cos, sin, out_dtype=self._dtype).view(x.shape)

    def _cross(self, operation: CrossAttend, q: torch.Tensor, step: Pass) -> torch.Tensor:
        a, texts = operation.attention, step.encoder
        assert texts is not None
        assert step.bounds is not None
        store = texts.pages
        out = attention_prefill_paged(
            q.view(-1, a.heads, a.head_dim), step.bounds, store.keys[a.layer], store.values[a.layer],
            texts.block_table, texts.lengths, a.scale, max_queries=step.longest, causal=False, k_kind=store.k_kind,
            v_kind=store.v_kind,
        )  # fmt: skip
        return out.reshape(-1, operation.out.width)


def _places(operation: Embed, step: Pass | None) -> torch.Tensor:
    """int64 (N,): the rows of positions or types."""
    assert step is not None
    if operation.of == "positions":
        assert step.places is not None
        return step.places + operation.first
    return torch.full_like(step.slots, operation.first) if step.types is None else step.types + operation.first


def _normalised(x: torch.Tensor, norm: Norm, dtype: torch.dtype) -> torch.Tensor:
    """RMS norm, of runs of features as wide as its weight, or LayerNorm of x (N, K), in `dtype`."""
    weight = triton_vector(norm.weight)
    if norm.groups > 1:
        runs = x.reshape(len(x), norm.groups, -1)
        same = torch.ones_like(weight[: runs.shape[-1]])
        return (rms_norm(runs, same, norm.eps, out_dtype=torch.float32)[0].view(x.shape) * weight).to(dtype)
    if len(weight) < x.shape[1]:
        return rms_norm(x.reshape(len(x), -1, len(weight)), weight, norm.eps, out_dtype=dtype)[0].view(x.shape)
    if norm.centred:
        bias = None if norm.bias is None else triton_vector(norm.bias)
        return layer_norm(x, weight, bias, norm.eps, out_dtype=dtype)[0]
    return rms_norm(x, weight, norm.eps, out_dtype=dtype)[0]
