"""Experts on the native backend: which matrices are read, many rows, several formats, and routing against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from decoder_cases import DictSource, quantized, tame_tensors, tiny_config
from native_cases import ISAS, assert_close, computes, exact, native, random_ids, reference, source_of

from kbit import _native
from kbit.backends.cpu.backend import NativeBackend
from kbit.kernels.reference_experts import route
from kbit.models.decoder import Decoder

pytestmark = pytest.mark.usefixtures("one_thread")


def run(model: Decoder, ids: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    cache = model.new_cache(len(ids), ids.shape[1])
    return torch.cat([model.forward(part, cache) for part in ids.split(cuts, dim=1)], dim=1)


def test_experts_that_are_not_chosen_are_not_computed() -> None:
    """Two experts that no token chooses have weights whose products overflow: infinity times 0 would be seen."""
    source = source_of("gpt-oss")
    tensors = dict(source.data)
    for layer in range(3):
        bias = f"model.layers.{layer}.mlp.router.bias"
        tensors[bias] = tensors[bias] - torch.tensor([0.0, 1e4, 0.0, 1e4, 0.0])  # type: ignore[operator]
        for expert, name in ((1, "gate"), (1, "up"), (3, "down")):
            tensors[f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"].fill_(3e38)  # type: ignore[union-attr]
    ids = random_ids(2, 20)
    for model in (exact(DictSource(source.config, tensors)), reference(DictSource(source.config, tensors))):
        found = run(model, ids, [18, 1, 1])
        assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize("compute", ["int8", "fp32"])
def test_more_rows_than_a_block(compute: str) -> None:
    """400 tokens, 3 of 4 experts each: some have more rows than are multiplied at once."""
    source, ids = source_of("gpt-oss-no-biases", "int4-b16"), random_ids(1, 400)
    whole = run(native(source, compute=compute, threads=3), ids, [400])
    assert torch.equal(run(native(source, compute=compute, threads=1), ids, [8, 300, 92]), whole)
    if compute == "fp32":
        assert_close(run(exact(source), ids, [400]), run(reference(source), ids, [400]))


@pytest.mark.parametrize("isa", ISAS)
def test_experts_of_several_formats(isa: str) -> None:
    """Every expert has its own width, block and values; the same bits for one thread and three, at once and by token."""
    config = tiny_config("glm4-moe")
    tensors = dict(tame_tensors(config))
    formats = ["int2-b64", "nf3-b32", "int4-b16-asym", "float5-b64", None, "lloyd7-b32"]
    for expert, format in enumerate(formats):
        own = {name: x for name, x in tensors.items() if f"experts.{expert}." in name}
        assert own
        tensors |= quantized(own, format) if format else own
    source, ids = DictSource(config, tensors), random_ids(2, 20)
    assert_close(run(exact(source, isa=isa), ids, [20]), run(reference(source), ids, [20]))
    for compute in computes(isa):
        whole = run(native(source, isa=isa, compute=compute, threads=1), ids, [20])
        assert torch.equal(run(native(source, isa=isa, compute=compute, threads=3), ids, [1] * 20), whole)


@pytest.mark.parametrize("seed", range(8))
def test_routing_is_the_references(seed: int) -> None:
    """Experts that give back their token times a number of their own: the sum shows who was chosen, and their weights."""
    generator = torch.Generator().manual_seed(seed)
    experts, width = 8, 16
    settings = [
        ("softmax", False, 1.0, 1, 1),
        ("sigmoid", True, 2.5, 4, 2),
        ("softmax_of_chosen", False, 1.0, 1, 1),
        ("sigmoid", False, 1.0, 1, 1),
        ("softmax", False, 1.5, 4, 2),
        ("softmax", True, 1.0, 1, 1),
        ("sparsemixer", False, 1.5, 1, 1),
        ("sigmoid", False, 1.0, 1, 1),
    ][seed]
    by_best, scales_input = seed == 4, seed == 7
    score, normalise, scale, groups, taking_part = settings
    bias = torch.randn(experts, generator=generator) if score == "sigmoid" or seed == 5 else None
    logits = torch.randint(-3, 4, (30, experts), generator=generator).float()  # with many ties
    if score == "sparsemixer":  # whose logits are not integers, so that none lies just at the border of being near
        logits = logits + 0.01 * torch.randn(30, experts, generator=generator)
    count = 2 if score == "sparsemixer" else 3
    backend = NativeBackend(2, compute="fp32")
    program = _native.Program(backend.context, "fp32")
    table = torch.zeros(30, experts)
    table[:] = logits
    embedding = backend.prepare(table)
    ids, x, routed, out = (program.buffer(n) for n in (1, width, experts, width))
    del ids
    program.embed(embedding.matrix, routed)
    program.embed(backend.prepare(torch.ones(30, width)).matrix, x)
    one = backend.prepare(torch.eye(width)).matrix
    # relu(1) 1 = 1 (of scaled input w: w^2), and down is diagonal: expert e makes 2^e of it.
    downs = [backend.prepare(torch.eye(width) * 2.0**e).matrix for e in range(experts)]
    none = [None] * experts
    program.experts(
        x, routed, out, [one] * experts, [one] * experts, downs, none, none, none,
        None if bias is None else bias.numpy(), count, score, normalise, scale, groups, taking_part, "relu",
        best_of_group=by_best, jitter=0.2, scales_input=scales_input,
    )  # fmt: skip
    program.finish(out)
    found = np.empty((30, width), dtype=np.float32)
    cache = backend.new_cache(1, 1, 1, 16, 30)
    cache.reserve((30,))
    positions = np.arange(30, dtype=np.int32)
    angles = np.zeros((30, 0), dtype=np.float32)
    program.run(
        np.arange(30), np.zeros(30, dtype=np.int32), positions, angles, angles, positions,
        cache.pool.store, cache.tables, None, found,
    )  # fmt: skip
    chosen, weights = route(
        logits, bias, count, score, normalise, scale, groups, taking_part, "best" if by_best else "two best", 0.2
    )
    weights = weights.square() if scales_input else weights
    wanted = (weights * 2.0**chosen).sum(1)
    assert np.allclose(found, wanted.numpy()[:, None], rtol=1e-6)


def test_what_does_not_fit() -> None:
    program = _native.Program(_native.Context(None, 1), "fp32")
    backend = NativeBackend(1)
    x, logits, out = (program.buffer(n) for n in (16, 2, 16))
    one = backend.prepare(torch.eye(16)).matrix
    wide = backend.prepare(torch.randn(16, 32)).matrix

    def experts(**changes: object) -> None:
        usual = {
            "x": x, "logits": logits, "out": out, "gates": [one] * 2, "ups": [one] * 2, "downs": [one] * 2,
            "gate_biases": [None] * 2, "up_biases": [None] * 2, "down_biases": [None] * 2, "selection_bias": None,
            "chosen": 1, "score": "softmax", "normalise": False, "scale": 1.0, "groups": 1, "chosen_groups": 1,
            "activation": "silu",
        }  # fmt: skip
        program.experts(**{**usual, **changes})  # type: ignore[arg-type]

    experts()
    for wrong in (
        {"downs": [one, wide]},
        {"gates": [one]},
        {"chosen": 3},
        {"chosen": 0},
        {"groups": 2},
        {"logits": x},
        {"out": x},
        {"score": "tanh"},
        {"score": "sparsemixer"},
        {"limit": 1.0, "activation": "gelu"},
        {"selection_bias": np.zeros(3, dtype=np.float32)},
        {"gate_biases": [None, np.zeros(3, dtype=np.float32)]},
    ):
        with pytest.raises(ValueError, match="expert|fit|score|gate|write"):
            experts(**wrong)
