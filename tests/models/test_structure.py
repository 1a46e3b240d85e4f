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
