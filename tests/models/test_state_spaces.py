"""Mamba-2: tokens in chunks against one by one, how the state is described, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from decoder_cases import DictSource, tame_tensors, tiny_config
from recurrent_cases import assert_the_same_function, made

from kbit.backends.reference.backend import ReferenceBackend
from kbit.host.errors import CheckpointError, KbitError
from kbit.kernels import reference_recurrent as recurrent
from kbit.models.families import spec_from_config
from kbit.models.load import load_decoder
from kbit.models.shard import shard

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 150])
def test_chunks_are_what_single_tokens_are(tokens: int) -> None:
    """And so are their gradients; 2 groups of keys for 6 heads."""
    keys = (tokens, 2, 12)
    parts = made((tokens, 6, 20), keys, keys, (tokens, 6), (6,), (6,))
    one_by_one, _ = recurrent.state_space(*parts, torch.zeros(6, 12, 20))
    together = recurrent.state_space_in_chunks(*(part[None] for part in parts[:4]), *parts[4:])[0]
    assert_the_same_function(together, one_by_one, parts)


def test_a_state_goes_on_where_it_was() -> None:
    """A text in two parts is the text; with no step nothing goes in, and only what skips the state comes out."""
    keys = (9, 1, 5)
    x, k, q, steps, rates, skips = (part.detach() for part in made((9, 3, 4), keys, keys, (9, 3), (3,), (3,)))
    start = torch.zeros(3, 5, 4)
    whole, last = recurrent.state_space(x, k, q, steps, rates, skips, start)
    first, state = recurrent.state_space(x[:4], k[:4], q[:4], steps[:4], rates, skips, start)
    second, end = recurrent.state_space(x[4:], k[4:], q[4:], steps[4:], rates, skips, state)
    assert torch.equal(torch.cat([first, second]), whole)
    assert torch.equal(end, last)
    still, state = recurrent.state_space(x, k, q, steps - 200.0, rates, skips, start)
    assert torch.equal(still, skips[:, None] * x)
    assert not bool(state.any())


def config(**changes: Any) -> dict[str, Any]:
    return {**tiny_config("granite-hybrid"), **changes}


def test_which_layers_and_how_large() -> None:
    """By the hub's names of layer types and transformers'; the convolution takes values, keys and queries."""
    spec = spec_from_config(config(layer_types=["mamba", "attention", "mamba"]))
    assert spec == spec_from_config(config())
    assert spec.attention_layers == (1,)
    assert spec.rotated == (False,) * 3
    assert spec.experts is None
    assert spec.intermediate_size == 40
    shapes = [state.shape for state in spec.states]
    assert shapes == [(3, 2 * 48 + 2 * 12), (2, 12, 48)] * 2
    assert spec_from_config(config(position_embedding_type="rope")).rotated == ()
    assert spec_from_config(config(time_step_limit=[0.0, math.inf])) == spec
    assert all(spec_from_config({**config(), "layer_types": None}).scan.layers)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mamba_n_groups": 2}, "mamba_n_groups 2 is not supported, only 1"),
        ({"mamba_proj_bias": True}, "mamba_proj_bias True is not supported, only False"),
        ({"time_step_limit": [0.001, 0.1]}, r"time_step_limit \[0.001, 0.1\] is not supported"),
        ({"mamba_d_head": 20}, "mamba_d_head is 20; it should be such that 2 heads"),
        ({"layer_types": ["mamba", "moe", "mamba"]}, "layer_types has 'moe', which kbit does not support"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type is 'alibi'; it should be null"),
        (
            {"model_type": "llama", "architectures": None, "layer_types": None},
            "is not supported for model_type 'llama'",
        ),
    ],
    ids=str,
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(KbitError, match=message):
        spec_from_config(config(**changes))
    bamba = {**tiny_config("bamba"), "attn_layer_indices": [3]}
    with pytest.raises(CheckpointError, match="attn_layer_indices is .*numbers from 0 to 2"):
        spec_from_config(bamba)


def test_several_processes_share_its_heads() -> None:
    """Keys and queries, which are those of all heads, are in the states of each; of the convolution's inputs, too."""
    source = DictSource(config(), tame_tensors(config()))
    assert load_decoder(source, ReferenceBackend()).spec.state_bytes == 2 * 4 * (3 * 120 + 2 * 12 * 48)
    part = load_decoder(shard(source, 1, 2), ReferenceBackend())
    assert part.spec.state_bytes == 2 * 4 * (3 * (48 + 24) + 12 * 48)
