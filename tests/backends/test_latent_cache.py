"""A cache of latent vectors: what keys and values of every head say, in fewer bytes, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from decoder_cases import DictSource, quantized, tame_tensors, tiny_config
from native_cases import ISAS, assert_close, computes, exact, native, random_ids, reference
from trellis_cases import trellis_tensor

from kbit import _native
from kbit.backends.cpu.backend import NativeBackend
from kbit.backends.reference.backend import ReferenceBackend
from kbit.formats.blockwise import quantize_blockwise
from kbit.formats.quant_format import QuantFormat
from kbit.formats.quant_tensor import QuantTensor
from kbit.graph.backend import Backend
from kbit.graph.batch import Batch
from kbit.graph.ops import Ops, X
from kbit.host.errors import UnsupportedError
from kbit.kernels import reference as meaning
from kbit.models.decoder import Decoder
from kbit.models.load import load_decoder

pytestmark = pytest.mark.usefixtures("one_thread")

# Sizes are multiples of 16, which latents need, and each is another one.
SIZES = {"kv_lora_rank": 80, "qk_nope_head_dim": 48, "qk_rope_head_dim": 16, "v_head_dim": 32}
HEADS, ROWS, COLUMNS, FIRST = 3, 48, 96, 16
FAMILIES = ["deepseek-v2", "deepseek-v2-lite", "deepseek-v3", "mistral4", "minicpm3"]


def latent_source(name: str, format: str | None = None, **sizes: int) -> DictSource:
    config = {**tiny_config(name), **SIZES, **sizes}
    if name == "mistral4":  # queries that grow with their position
        config["rope_parameters"] = {**config["rope_parameters"], "partial_rotary_factor": 0.25}
    tensors = tame_tensors(config)
    return DictSource(config, tensors if format is None else quantized(tensors, format))


def run(model: Decoder, ids: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    cache = model.new_cache(len(ids), ids.shape[1])
    return torch.cat([model.forward(part, cache) for part in ids.split(cuts, dim=1)], dim=1)


@pytest.mark.parametrize("name", FAMILIES)
def test_latents_say_what_every_heads_keys_and_values_say(name: str) -> None:
    """The reference with either cache, and the native backend on every instruction set, with the same bits on all."""
    source, ids = latent_source(name), random_ids(1, 150)
    expanded = reference(source)
    assert not expanded.spec.keeps_latents
    wanted = run(expanded, ids, [150])
    short = load_decoder(source, ReferenceBackend(keeps_latents=True))
    assert short.spec.keeps_latents
    assert short.new_cache(1, 64).nbytes * 8 < expanded.new_cache(1, 64).nbytes * 3
    assert_close(run(short, ids, [150]), wanted)
    results = [run(exact(source, isa=isa), ids, [150]) for isa in ISAS]
    assert_close(results[0], wanted)
    assert all(torch.equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("format", ["nf4-b16", "int8-b16", "bf16"])
def test_packed_matrices_go_both_ways(format: str) -> None:
    """The matrix of keys is multiplied with by its transpose, whatever it is packed as."""
    source, ids = latent_source("deepseek-v2-lite", None if format == "bf16" else format), random_ids(1, 40)
    if format == "bf16":
        source.data = {n: x.bfloat16().float() if isinstance(x, torch.Tensor) else x for n, x in source.data.items()}
    assert_close(run(exact(source), ids, [40]), run(reference(source), ids, [40]))


@pytest.mark.parametrize("kv", ["fp16", "8", "4", "3"])
@pytest.mark.parametrize("compute", ["int8", "fp32"])
def test_threads_pieces_and_batches_change_no_bit(kv: str, compute: str) -> None:
    source, ids = latent_source("deepseek-v2", "nf4-b16"), random_ids(2, 140)
    one, three = (native(source, threads=threads, kv=kv, compute=compute) for threads in (1, 3))
    whole = run(one, ids, [140])
    assert torch.equal(run(three, ids, [140]), whole)
    assert torch.equal(run(three, ids, [129, 3, 1, 7]), whole)
    assert torch.equal(run(three, ids[1:], [140]), whole[1:])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv", ["fp32", "fp16", "8", "4", "3", "2"])
@pytest.mark.parametrize(("rope", "rank"), [(16, 32), (8, 24), (32, 64)])
def test_attention_is_over_what_the_cache_holds(isa: str, kv: str, rope: int, rank: int) -> None:
    """Its keys, read back from the pages, as keys and as values."""
    dim, heads, tokens = rope + rank, 5, 150
    if kv not in ("fp32", "fp16") and dim % 16:
        pytest.skip("codes come in groups of 16")
    context = _native.Context(isa, 2)
    pages = _native.KVPages(1, 1, dim, kv, 3, latent=True)
    assert pages.page_bytes * 2 == _native.KVPages(1, 1, dim, kv, 1).page_bytes
    generator = torch.Generator().manual_seed(dim)
    q, k = (torch.randn(tokens, count, dim, generator=generator) for count in (heads, 1))
    angles = torch.rand(tokens, rope // 2, generator=generator) * 6.3
    cos, sin, tables = angles.cos(), angles.sin(), np.arange(3, dtype=np.int32)[None]
    positions = np.arange(tokens, dtype=np.int32)
    found = _native.attention(
        context, q.numpy(), k.numpy(), k.numpy(), positions, np.zeros_like(positions), cos.numpy(), sin.numpy(), pages,
        tables, 0, dim**-0.5,
    )  # fmt: skip
    keys, values = (torch.from_numpy(x) for x in pages.dequantized(0, tables[0], tokens))
    assert torch.equal(keys, values)
    turned = meaning.rope(k[None], cos[None], sin[None])[0].transpose(0, 1)
    off = float((keys - turned).norm() / turned.norm())
    assert off <= {"fp32": 1e-6, "fp16": 5e-4, "8": 0.01, "4": 0.12, "3": 0.2, "2": 0.4}[kv]
    wanted = meaning.attend(
        meaning.rope(q[None], cos[None], sin[None]), keys[None], keys[None], torch.arange(tokens)[None],
        torch.tensor([tokens]), dim**-0.5, None,
    )[0]  # fmt: skip
    # Against codes queries are int8 by groups: scores of |q| |k| / sqrt(dim) are off by about 1/254 of that at most.
    bound = 1e-5 if kv in ("fp32", "fp16") else 0.03
    assert float((torch.from_numpy(found) - wanted).norm() / wanted.norm()) <= bound


class ByHeads:
    """Rows of a table, times a matrix by heads: a definition."""

    rotation_depends_on_length = False

    def __init__(
        self, backend: Backend, table: torch.Tensor, matrix: torch.Tensor | QuantTensor, backward: bool
    ) -> None:
        self.table, self.matrix = backend.prepare(table, lookup=True), backend.prepare(matrix)
        self.backward = backward

    def body(self, ops: Ops[X], ids: X) -> X:
        return ops.by_heads(self.matrix, ops.embed(self.table, ids), HEADS, FIRST, backward=self.backward)

    def head(self, ops: Ops[X], hidden: X) -> X:
        return hidden

    def rotation(self, positions: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        none = np.ones((*positions.shape, 0), dtype=np.float32)
        return none, none


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("backward", [False, True])
def test_products_by_heads_are_the_references(isa: str, backward: bool) -> None:
    """One row and many, dense, packed and with rotated columns, on every kind of compute."""
    generator = torch.Generator().manual_seed(5)
    dense = torch.randn(HEADS * ROWS, COLUMNS, generator=generator)
    table = torch.randn(70, HEADS * (FIRST + (ROWS if backward else COLUMNS)), generator=generator)
    packed = quantize_blockwise(dense, QuantFormat.parse("nf3-b16"))
    apart = QuantFormat.parse("nf3-b16-o128").encode(lambda start, stop: dense[start:stop], (HEADS * ROWS, COLUMNS))
    ids = torch.arange(70)
    for matrix in (dense, packed, apart, trellis_tensor("trellis3-o64", HEADS * ROWS, COLUMNS)):
        floats = matrix.dequantize() if isinstance(matrix, QuantTensor) else matrix
        wanted = meaning.by_heads(table, floats, HEADS, FIRST, backward)
        for compute in computes(isa):
            backend = NativeBackend(2, isa=isa, compute=compute)
            runner = backend.bind(ByHeads(backend, table, matrix, backward))  # type: ignore[arg-type]
            cache = backend.new_cache(1, 1, 1, 16, 71)
            cache.reserve([71])
            whole = torch.as_tensor(runner.hidden(Batch.of([ids.tolist()], [0], "all"), cache))
            # Backward sums are of float32 always; onward rows of x are as in all products.
            bound = 1e-5 if compute == "fp32" or backward else 0.02
            assert float((whole - wanted).norm() / wanted.norm()) < bound
            one = torch.as_tensor(runner.hidden(Batch.of([[7]], [70], "all"), cache))
            assert torch.equal(one[0], whole[7])
            if backward:
                kept = whole.view(70, HEADS, -1)[..., :FIRST]
                assert torch.equal(kept, table.view(70, HEADS, -1)[..., :FIRST])


def test_sizes_that_latents_do_not_have_are_expanded() -> None:
    """A rank of no whole panels: keys and values of every head, as before."""
    source, ids = latent_source("deepseek-v2", kv_lora_rank=40), random_ids(1, 20)
    model = exact(source)
    assert not model.spec.keeps_latents
    assert_close(run(model, ids, [20]), run(reference(source), ids, [20]))


def test_one_width_for_what_is_kept_once() -> None:
    with pytest.raises(UnsupportedError, match="--kv-bits 8,4: this model's cache keeps the vectors.*give one width"):
        native(latent_source("deepseek-v2"), kv="8,4")
