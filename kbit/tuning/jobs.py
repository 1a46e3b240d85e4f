"""What there is to tune for a model: its products and its attention, as the runner launches them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
import triton

from kbit.backends.triton.weight import TritonMatrix, merge, triton_weight
from kbit.graph.backend import Definition
from kbit.graph.fuse import fuse
from kbit.graph.operations import Project, Symbol
from kbit.graph.recording import Recorder
from kbit.kernels import reference
from kbit.kernels.triton.attention.decode import MAX_ROWS, attention_decode
from kbit.kernels.triton.attention.kv_layout import (
    KVFormat,
    gather_row,
    new_pages,
    pages_for,
    plain_block_table,
    write_tokens,
)
from kbit.kernels.triton.attention.prefill import attention_prefill_paged
from kbit.kernels.triton.codecs.layout import TritonWeight
from kbit.kernels.triton.product.gemm import gemm
from kbit.kernels.triton.product.gemv import gemv, problem_of
from kbit.kernels.triton.product.limits import GEMV_TOKENS
from kbit.kernels.triton.rows.embed import embed
from kbit.kernels.triton.tuned import PRODUCT_TOKENS
from kbit.models.decoder import DecoderDefinition, DecoderWeights
from kbit.models.spec import ModelSpec
from kbit.tuning.stored import DecodeProblem, PrefillProblem
from kbit.tuning.timing import Job, Trial

QUICK_TOKENS = (1, 256)
CONTEXTS = (1024, 8192, 32768)
QUICK_CONTEXTS = (4096,)
PROMPTS = ((512, 512), (2048, 2048), (1024, 8192))  # (new tokens, cached tokens, the new ones included)
QUICK_PROMPTS = ((2048, 2048),)
DRAFTED = 4  # new tokens of a row where a drafted continuation is checked
CHECKED_ROWS = 512  # rows of a product that are compared with torch's: 2 MB of them decoded at K = 4096 in fp32
CHECKED_QUERIES = 32
TYPICAL = 8.0  # size of the largest products that are compared
# Rounding changes a head's output by up to 0.1 % of its length in fp16 and 0.4 % in bf16 (300 random tokens, in
# Triton's interpreter); a kernel that lost a tile of them, or wrote none, changes it by more than this.
ATTENTION_TOLERANCE = 0.05


@dataclass(frozen=True, eq=False)
class Product:
    """A matrix of a model, with the one that is multiplied along in a gated MLP.

    Attributes:
        weight: (N, K); the gate, where there is `up`.
        up: its partner, or None.
        kind: the activation, with `up`.
    """

    weight: TritonWeight
    up: TritonWeight | None = None
    kind: str = ""


def products_of(definition: Definition) -> list[Product]:
    """The quantized matrices of a model as the runner multiplies them, read off its recording: what shares an input as
    one where it can be, gate and up together. Of matrices with the same format and shape the first."""
    found = []
    merged: dict[object, TritonWeight | None] = {}
    body = Recorder(Symbol(1))
    hidden = definition.body(body, body.input)
    head = Recorder(Symbol(hidden.width))
    logits = definition.head(head, head.input)
    for operation in (*fuse(body.operations, hidden), *fuse(head.operations, logits)):
        if not isinstance(operation, Project):
            continue
        weights = [triton_weight(weight) for weight in operation.weights]
        plain = all(bias is None for bias in operation.biases)
        whole = None
        if operation.activation is not None and len(weights) == 2 and plain:
            found.append(Product(weights[0], weights[1], operation.activation))
            continue
        if operation.activation is None and len(weights) > 1 and plain and _formats(weights):
            key = tuple((weight.format, weight.shape) for weight in weights)
            if key not in merged:
                # Of copies: merging turns its arguments into views of the result.
                merged[key] = merge(tuple(TritonMatrix(weight) for weight in weights))
            whole = merged[key]
        found += [Product(weight) for weight in (weights if whole is None else [whole])]
    alike: dict[object, Product] = {}
    for product in found:
        parts = [part for part in (product.weight, product.up) if part is not None]
        if _formats(parts):
            alike.setdefault((product.kind, *((part.format, part.shape, part.kind) for part in parts)), product)
    return list(alike.values())


def model_jobs(weights: DecoderWeights, spec: ModelSpec, kv: str, device: torch.device, *, quick: bool) -> list[Job]:
    """The jobs of a model.

    Args:
        weights: prepared by a TritonBackend.
        spec: of the model.
        kv: what the cache stores, one of kv_layout.KINDS.
        device: where to tune.
        quick: fewer tokens and contexts.
    """
    jobs = []
    for product in products_of(DecoderDefinition(spec, weights)):
        for tokens in QUICK_TOKENS if quick else PRODUCT_TOKENS:
            jobs += product_jobs(product, tokens)
    dtype = torch.bfloat16 if kv == "bf16" else torch.float16
    attentions = {
        (shape.kv_heads, shape.head_dim): Heads(
            spec.heads, shape.kv_heads, shape.head_dim, spec.attention_scale, window, kv, dtype, device
        )
        for shape, window in reversed([(spec.shape(at), window) for at, window in enumerate(spec.windows)])
    }
    limit = spec.context_length
    contexts = [context for context in (QUICK_CONTEXTS if quick else CONTEXTS) if context <= limit] or [limit]
    for tokens in (1,) if quick else (1, DRAFTED):
        jobs += [heads.decode_job(tokens, contexts) for heads in attentions.values()]
    prompts = [(new, held) for new, held in (QUICK_PROMPTS if quick else PROMPTS) if held <= limit] or [(limit, limit)]
    jobs += [heads.prefill_job(prompts) for heads in attentions.values()]
    return list({job.key: job for job in reversed(jobs)}.values())[::-1]


def product_jobs(product: Product, tokens: int) -> list[Job]:
    """The launches of a product for so many tokens; for a gated one above GEMV_TOKENS, these are two."""
    weight, up = product.weight, product.up
    if up is None:
        return [_product_job(weight, None, "", tokens)]
    if tokens > GEMV_TOKENS:
        jobs = [] if weight.dense is not None else [_product_job(weight, None, "", tokens)]
        return jobs if up.dense is not None else [*jobs, _product_job(up, weight, product.kind, tokens)]
    if (weight.format, weight.kind) == (up.format, up.kind):
        return [_product_job(weight, up, product.kind, tokens)]
    return [_product_job(part, None, "", tokens) for part in (weight, up) if part.dense is None]


def _product_job(weight: TritonWeight, other: TritonWeight | None, kind: str, tokens: int) -> Job:
    kernel = "gemv" if tokens <= GEMV_TOKENS else "gemm"
    x = torch.empty((tokens, weight.shape[1]), dtype=weight.dtype, device="meta")
    problem = problem_of(x, weight, gated=other is not None)
    gated = " gated" if other is not None else ""
    label = f"{weight.shape[0]}x{weight.shape[1]} {weight.format}{gated}, {tokens} token{'s' if tokens > 1 else ''}"
    return Job(kernel, problem, label, partial(_product_trials, weight, other, kind, tokens))


def _product_trials(weight: TritonWeight, other: TritonWeight | None, kind: str, tokens: int) -> list[Trial]:
    """One trial. other: up to GEMV_TOKENS the matrix `up` of a gate; with more tokens, there is a gate's product."""
    device, (rows, columns) = weight.device, weight.shape
    generator = torch.Generator(device).manual_seed(tokens)
    x = torch.randn((tokens, columns), generator=generator, device=device).to(weight.dtype)
    sample = torch.linspace(0, rows - 1, min(rows, CHECKED_ROWS), device=device).round().long()
    # Far from the ends of half precision, also once two products are multiplied.
    largest = float(_expected(x, weight, sample)[0].abs().max())
    x = x * 2.0 ** round(math.log2(TYPICAL / max(largest, 1e-30)))
    expected, bound = _expected(x, weight, sample)
    launch: Callable[[Any], torch.Tensor]
    if other is None:
        run = gemv if tokens <= GEMV_TOKENS else gemm
        launch = lambda config: run(x, weight, config=config)  # noqa: E731
    elif tokens <= GEMV_TOKENS:
        launch = lambda config: gemv(x, weight, up=other, kind=kind, config=config)  # noqa: E731
        ups, ups_bound = _expected(x, other, sample)
        expected, bound = _gated(expected, bound, ups, ups_bound, kind)
    else:
        gates = torch.randn((tokens, rows), generator=generator, device=device)
        launch = lambda config: gemm(x, weight, gate=gates, kind=kind, config=config)  # noqa: E731
        chosen = gates[:, sample].contiguous()
        expected, bound = _gated(chosen, torch.zeros_like(chosen), expected, bound, kind)
    unit = torch.finfo(weight.dtype).eps
    limit = bound + unit * expected.abs() + torch.finfo(weight.dtype).smallest_normal
    # Not >: a NaN is wrong too.
    return [Trial(launch, lambda out: not bool(((out[:, sample].float() - expected).abs() <= limit).all()))]


def _expected(x: torch.Tensor, weight: TritonWeight, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x W^T at some rows in float32, and how far a kernel may be from it: three roundings of each factor to x's type,
    and K of the sum (Higham, Accuracy and Stability, section 3.1)."""
    decoded = embed(weight, rows, dtype=torch.float32)
    magnitudes = x.float().abs() @ decoded.abs().T
    relative = 2 * torch.finfo(x.dtype).eps + 2 * x.shape[1] * torch.finfo(torch.float32).eps
    # Not TF32 products, whatever torch is set to.
    return (x.double() @ decoded.double().T).float(), magnitudes * relative


def _gated(
    gate: torch.Tensor, gate_bound: torch.Tensor, up: torch.Tensor, up_bound: torch.Tensor, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """act(gate) * up and its bound; no activation here is steeper than 1.13 (GELU's maximum)."""
    active = reference.activate(gate, None, kind)
    return active * up, active.abs() * up_bound + 1.2 * gate_bound * (up.abs() + up_bound)


@dataclass(frozen=True)
class Heads:
    """A model's attention.

    Attributes:
        heads: H.
        kv_heads: H_kv.
        head_dim: D.
        scale: multiplies the dot products.
        window: tokens a query sees at most, or None.
        kv: what the cache stores, one of kv_layout.KINDS.
        dtype: of the queries.
        device: where.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    kv: str
    dtype: torch.dtype
    device: torch.device

    @property
    def format(self) -> KVFormat:
        return KVFormat(self.kv, self.head_dim)

    def decode_job(self, tokens: int, contexts: Sequence[int]) -> Job:
        """attention_decode of a row's `tokens` new tokens after several contexts."""
        bits = self.format.bits
        rows = min(MAX_ROWS, max(16, triton.next_power_of_2(tokens * (self.heads // self.kv_heads))))
        problem = DecodeProblem(self.head_dim, bits, bits, rows)
        label = f"decode attention {self._label}, {tokens} new, after {_list(contexts)}"
        return Job("decode", problem, label, lambda: [self._decode_trial(tokens, context) for context in contexts])

    def prefill_job(self, prompts: Sequence[tuple[int, int]]) -> Job:
        """attention_prefill_paged of (new tokens, tokens held)."""
        bits = self.format.bits
        label = f"prefill attention {self._label}, {_list([new for new, _ in prompts])} new"
        problem = PrefillProblem(self.head_dim, bits, bits)
        return Job("prefill", problem, label, lambda: [self._prefill_trial(new, held) for new, held in prompts])

    @property
    def _label(self) -> str:
        kind = f"{self.kv}-bit" if self.kv.isdigit() else self.kv
        return f"{self.heads}/{self.kv_heads} heads of {self.head_dim}, {kind} KV"

    def _decode_trial(self, tokens: int, held: int) -> Trial:
        q, k, v, table = self._tensors(tokens, held)
        positions = torch.arange(held - tokens, held, device=self.device)[None]
        lengths = torch.tensor([held], dtype=torch.int32, device=self.device)

        def launch(config: Any) -> torch.Tensor:
            return attention_decode(
                q[None], k, v, table, positions, lengths, self.scale, window=self.window, k_kind=self.kv,
                v_kind=self.kv, max_length=held, config=config,
            )[0]  # fmt: skip

        return Trial(launch, self._check(q, k, v, table, held))

    def _prefill_trial(self, new: int, held: int) -> Trial:
        q, k, v, table = self._tensors(new, held)
        bounds = torch.tensor([0, new], dtype=torch.int32, device=self.device)
        lengths = torch.tensor([held], dtype=torch.int32, device=self.device)

        def launch(config: Any) -> torch.Tensor:
            return attention_prefill_paged(
                q, bounds, k, v, table, lengths, self.scale, k_kind=self.kv, v_kind=self.kv, max_queries=new,
                window=self.window, config=config,
            )  # fmt: skip

        return Trial(launch, self._check(q, k, v, table, held))

    def _tensors(self, new: int, held: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Random queries (new, H, D), pages of keys and of values, and a block table (1, pages)."""
        generator = torch.Generator(self.device).manual_seed(held)
        q = torch.randn((new, self.heads, self.head_dim), generator=generator, device=self.device).to(self.dtype)
        pages = []
        for _ in range(2):
            store = new_pages(pages_for(held), self.kv_heads, self.format, self.device)
            for slots in torch.split(torch.arange(held, device=self.device), 4096):
                shape = (len(slots), self.kv_heads, self.head_dim)
                tokens = torch.randn(shape, generator=generator, device=self.device)
                write_tokens(store, self.format, slots, tokens)
            pages.append(store)
        return q, pages[0], pages[1], plain_block_table(1, held, self.device)

    def _check(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, held: int
    ) -> Callable[[torch.Tensor], bool]:
        """Compares the heads' outputs of some of the queries with the reference's."""
        new = len(q)
        some = torch.linspace(0, new - 1, min(new, CHECKED_QUERIES), device=self.device).round().long()
        keys, values = (gather_row(part, self.format, table, 0, held).transpose(0, 1)[None] for part in (k, v))
        lengths = torch.tensor([held], device=self.device)
        where = (some + held - new)[None]
        expected = reference.attend(q[some][None], keys, values, where, lengths, self.scale, self.window)[0]
        limit = ATTENTION_TOLERANCE * expected.norm(dim=-1)

        def is_wrong(out: torch.Tensor) -> bool:
            # Not >: a NaN is wrong too.
            return not bool(((out[some].float() - expected).norm(dim=-1) <= limit).all())

        return is_wrong


def _formats(weights: Sequence[TritonWeight]) -> bool:
    """Whether any of them is quantized: a float matrix runs in torch.matmul."""
    return any(weight.dense is None for weight in weights)


def _list(values: Sequence[int]) -> str:
    return ", ".join(str(value) for value in islice(values, 8))
