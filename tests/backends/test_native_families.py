"""What newer families add to the native backend, on every instruction set: the reference's values, and always the same bits."""

from __future__ import annotations

import pytest
import torch
from decoder_cases import DictSource, tame_tensors, tiny_config
from native_cases import ISAS, assert_close, exact, native, random_ids, reference, source_of

from kbit.models.decoder import Decoder

pytestmark = pytest.mark.usefixtures("one_thread")

# Caps of scores and logits, factors, norms of heads, two rotations, rotation apart from attention, queries with a
# temperature, partial rotation; experts with a shared one behind a gate, in groups with a bias, with sinks and a clamp.
# Layers of two shapes, with shared keys, features of their own, and experts beside an MLP.
FAMILIES = ["gemma2", "gemma3", "granite", "hunyuan", "ministral3", "glm4", "qwen2-moe", "glm4-moe", "gpt-oss"]
# Latent attention, values narrower than keys; queries that grow of which a part turns; groups by their best expert.
FAMILIES += ["deepseek-v2", "deepseek-v3", "mistral4"]
LATENT = {"qk_nope_head_dim": 12, "qk_rope_head_dim": 4, "v_head_dim": 11}
FAMILIES += ["gemma4-e", "gemma4-moe"]
# Gated delta nets, and a gate on what attention makes.
FAMILIES += ["qwen3_5", "qwen3-next"]
# A bias of the head, a squared relu.
FAMILIES += ["phi", "nemotron"]
# Convolutions between gates; with biases, and experts chosen with a bias.
FAMILIES += ["lfm2-biases", "lfm2-moe"]
# Mamba-2, with and without a bias of its convolution.
FAMILIES += ["bamba", "granite-hybrid-moe"]
# Beside attention, with factors; with norms by group; layers that are one thing each, experts without gates.
FAMILIES += ["falcon-h1", "falcon-h1-norm", "nemotron-h-moe"]
# Learned factors; stretches of attention, experts of scaled input, one and two for each token; one after another.
FAMILIES += ["apertus", "llama4", "llama4-plain", "phimoe"]


def wide(name: str) -> DictSource:
    """Heads of 16 features: codes of keys and values come in groups of 16."""
    config = {**tiny_config(name), "head_dim": 16}
    if "kv_lora_rank" in config:
        config |= LATENT
    if name == "phimoe":
        rope = config["rope_parameters"]
        longer = {key: 2 * rope[key] for key in ("short_factor", "long_factor")}
        config["rope_parameters"] = {**rope, **longer, "original_max_position_embeddings": 256}  # beyond all pieces
    if name == "mistral4":
        config["rope_parameters"] = {**config["rope_parameters"], "partial_rotary_factor": 0.25}
    return DictSource(config, tame_tensors(config))


def run(model: Decoder, ids: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    cache = model.new_cache(len(ids), ids.shape[1])
    return torch.cat([model.forward(part, cache) for part in ids.split(cuts, dim=1)], dim=1)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_instruction_set_has_the_same_bits(name: str) -> None:
    """Those of float32 compute do not depend on the set; a text of more than a chunk of the cache."""
    source, ids = source_of(name), random_ids(1, 150)
    results = [run(exact(source, isa=isa), ids, [150]) for isa in ISAS]
    assert_close(results[0], run(reference(source), ids, [150]))
    for result in results[1:]:
        assert torch.equal(result, results[0])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("options", [{"compute": "int8", "kv": "8"}, {"compute": "fp32", "kv": "fp16"}], ids=str)
def test_threads_pieces_and_batches_change_no_bit(name: str, options: dict[str, str]) -> None:
    source, ids = wide(name), random_ids(2, 140)
    one, three = (native(source, threads=threads, **options) for threads in (1, 3))
    whole = run(one, ids, [140])
    assert torch.equal(run(three, ids, [140]), whole)
    assert torch.equal(run(three, ids, [129, 3, 1, 7]), whole)
    assert torch.equal(run(three, ids[1:], [140]), whole[1:])


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "hunyuan", "gemma4-e", "gemma4-dense"])
def test_keys_and_values_of_8_bits_change_little(name: str) -> None:
    """Each is off by at most 1/254 of its group's largest; what capped scores then say differs by a few percent."""
    source, ids = wide(name), random_ids(1, 100)
    found = run(native(source, compute="fp32", kv="8"), ids, [60, 40])
    wanted = run(reference(source), ids, [100])
    assert float((found - wanted).norm() / wanted.norm()) < 0.05


def test_scores_that_are_capped_to_nothing_weigh_alike() -> None:
    """A cap far below all scores leaves the mean of the values: attention without any."""
    flat = {**tiny_config("gemma2"), "attn_logit_softcapping": 1e-6}
    source, ids = DictSource(flat, tame_tensors(flat)), random_ids(1, 20)
    none = {name: (x * 0 if "q_proj" in name else x) for name, x in source.data.items() if isinstance(x, torch.Tensor)}
    assert_close(run(exact(source), ids, [20]), run(exact(DictSource(flat, none)), ids, [20]))
