"""What is computed from what, read off a recording: which matrices share an input, and who made it."""

from __future__ import annotations

import pytest
from decoder_cases import tiny_config

from kbit.models.families import spec_from_config
from kbit.models.structure import recorded


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "granite", "hunyuan", "ministral3", "smollm3", "olmo3", "glm4"])
def test_switches_change_neither_producers_nor_shared_inputs(name: str) -> None:
    """Norms of heads, rotations, factors and norms of what is added are looked through."""
    plain, other = (recorded(spec_from_config(tiny_config(each)), layers=2) for each in ("llama", name))
    assert other.producers() == plain.producers()
    assert other.sharing() == plain.sharing()


def test_seams_of_norms_around_blocks() -> None:
    """What a norm makes for products alone can be scaled there; what it makes for the residual stream or heads cannot."""
    spec = spec_from_config(tiny_config("gemma3"))
    seams = recorded(spec, layers=1).seams()
    layer = "model.layers.0."
    assert [(seam.kind, seam.producer) for seam in seams] == [
        ("norm", f"{layer}input_layernorm.weight"),
        ("values", f"{layer}self_attn.v_proj.weight"),
        ("norm", f"{layer}pre_feedforward_layernorm.weight"),
        ("product", f"{layer}mlp.up_proj.weight"),
    ]
    seams = recorded(spec_from_config(tiny_config("olmo2")), layers=1).seams()
    assert [seam.kind for seam in seams] == ["values", "product"]


def test_experts() -> None:
    """All of a layer's share their input; what is inside one is its own, and can be scaled there."""
    structure = recorded(spec_from_config(tiny_config("mixtral-window")), layers=1)
    block = "model.layers.0.block_sparse_moe.experts."
    inside = [tuple(f"{block}{expert}.{name}.weight" for name in ("w1", "w3", "w2")) for expert in range(3)]
    producers = structure.producers()
    before = "model.layers.0.self_attn.o_proj.weight"
    assert all(producers[gate] == producers[up] == before and producers[down] == up for gate, up, down in inside)
    shared = next(group for group in structure.sharing() if inside[0][0] in group)
    assert shared == ("model.layers.0.block_sparse_moe.gate.weight", *(name for one in inside for name in one[:2]))
    seams = {seam.consumers: seam.producer for seam in structure.seams() if seam.kind == "product"}
    assert seams == {(down,): up for _, up, down in inside}
    # A clamp keeps no scale; and the norm before is read by the router, too.
    clamped = recorded(spec_from_config(tiny_config("gpt-oss")), layers=1).seams()
    assert [seam.kind for seam in clamped] == ["norm", "values"]


def test_producers_and_shared_inputs() -> None:
    structure = recorded(spec_from_config(tiny_config("llama")), layers=2)
    layer = "model.layers.{}."
    first, second = layer.format(0), layer.format(1)
    embedding = "model.embed_tokens.weight"
    q, k, v, o = (f"self_attn.{name}_proj.weight" for name in "qkvo")
    gate, up, down = (f"mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
    assert structure.producers() == {
        **{first + name: embedding for name in (q, k, v)},
        first + o: first + v,
        **{first + name: first + o for name in (gate, up)},
        first + down: first + up,
        **{second + name: first + down for name in (q, k, v)},
        second + o: second + v,
        **{second + name: second + o for name in (gate, up)},
        second + down: second + up,
    }
    groups = [(q, k, v), (o,), (gate, up), (down,)]
    assert structure.sharing() == [tuple(part + name for name in group) for part in (first, second) for group in groups]
