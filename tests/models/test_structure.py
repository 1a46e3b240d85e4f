"""What is computed from what, read off a recording: which matrices share an input, and who made it."""

from __future__ import annotations

from decoder_cases import tiny_config

from kbit.models.families import spec_from_config
from kbit.models.structure import recorded


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
