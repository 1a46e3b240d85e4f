"""Configurations of every family, as transformers and as the hub write them; what changes the result is read or refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from config_cases import EPSILONS, HEADS, KV_HEADS, UNKNOWN, config_of, spec
from decoder_cases import CASES, FULL, SLIDING, tiny_config

from kbit.host.errors import CheckpointError, KbitError, UnsupportedError
from kbit.models.families import FAMILIES, spec_from_config

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    "family",
    [name for name, f in FAMILIES.items() if f.task is None and f.encoder is None and name not in UNKNOWN],
)
def test_absent_keys_take_transformers_defaults(family: str) -> None:
    """And the configuration that transformers writes in full means the same as the sparse one."""
    sparse = config_of(family, **HEADS.get(family, {}))
    theirs = transformers.AutoConfig.for_model(**sparse)
    theirs.allow_global_per_layer_attribute_access = True  # of layers that differ, what most have
    spec = spec_from_config(sparse)
    assert spec.kv_heads == KV_HEADS.get(family, getattr(theirs, "num_key_value_heads", None))
    # (With latent attention head_dim is what of a key turns.)
    assert spec.head_dim == (getattr(theirs, "qk_head_dim", None) or getattr(theirs, "head_dim", None) or 8)
    # (BLOOM's is what its models were trained with.)
    assert spec.rope.max_positions == getattr(theirs, "max_position_embeddings", 2048)
    # (OPT's is torch's own, in no configuration.)
    assert spec.norm_eps == next((getattr(theirs, key) for key in EPSILONS if hasattr(theirs, key)), 1e-5)
    assert spec.tied_embeddings == theirs.tie_word_embeddings
    ropes = getattr(theirs, "rope_parameters", None) or {"rope_theta": spec.rope.theta}  # a table, or rotations
    assert spec.rope.theta == ropes.get(FULL, ropes)["rope_theta"]
    if SLIDING in ropes and ropes[SLIDING]["rope_theta"] != spec.rope.theta:
        assert spec.window_rope is not None
        assert spec.window_rope.theta == ropes[SLIDING]["rope_theta"]
    types = getattr(theirs, "layer_types", None)
    if types is not None:
        lengths = {SLIDING: "sliding_window", "chunked_attention": "attention_chunk_size"}
        assert spec.windows == tuple(getattr(theirs, lengths[kind]) if kind in lengths else None for kind in types)
    written = json.loads(theirs.to_json_string())
    assert spec_from_config({**written, "architectures": None}) == spec


@pytest.mark.parametrize("case", CASES)
def test_expected_tensors_are_those_of_the_model(case: str) -> None:
    """In number of weights: fused tensors are the sum of their parts."""
    spec = spec_from_config(tiny_config(case))
    model = _model(case)
    # What is added where experts are chosen, and what layers are scaled by, is no parameter there, but is stored.
    stored = ("e_score_correction_bias", "expert_bias", "layer_scalar", "act_fn.beta", "act_fn.eps")
    added = [buffer for name, buffer in model.named_buffers() if name.endswith(stored)]
    ours = spec.expected_tensors()
    if FAMILIES[spec.family].layout.plain_norms:  # which are no parameters there
        ours = {name: shape for name, shape in ours.items() if "norm" not in name}
    assert sum(math.prod(shape) for shape in ours.values()) == sum(
        tensor.numel() for tensor in (*model.parameters(), *added)
    )


def _model(case: str) -> Any:
    from decoder_cases import CLASSES, CONFIGS, TINY

    family, own = CASES[case]
    config = getattr(transformers, f"{CONFIGS.get(family, family)}Config")(**{**TINY, **own})
    return getattr(transformers, CLASSES.get(family, f"{family}ForCausalLM"))(config)


def test_gemma_as_the_hub_has_it() -> None:
    """The first files say gelu and mean its approximation; and the root of the width is rounded as weights are."""
    first = spec(
        "gemma", hidden_act="gelu", hidden_activation=None, torch_dtype="bfloat16", hidden_size=2048, head_dim=64
    )
    assert first.activation == "gelu_tanh"
    assert first.embedding_multiplier == 45.25
    assert spec("gemma", dtype="float16", hidden_size=2048).embedding_multiplier == 45.25
    assert spec("gemma", hidden_size=2048).embedding_multiplier == pytest.approx(2048**0.5, rel=1e-7)
    assert spec("gemma2", dtype="bfloat16", hidden_size=3584).embedding_multiplier == 59.75
    with pytest.raises(UnsupportedError, match="hidden_activation 'relu' is not supported for model_type 'gemma'"):
        spec("gemma", hidden_activation="relu")


def test_gemma3_as_the_hub_has_it() -> None:
    """One key for the theta of windows; a pattern; scaling of the full layers alone."""
    old = spec(
        "gemma3_text",
        rope_theta=1e6,
        rope_local_base_freq=10000,
        sliding_window=512,
        sliding_window_pattern=3,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        query_pre_attn_scalar=168,
    )
    assert old.windows == (512, 512, None, 512, 512, None, 512)
    assert (old.rope.kind, old.rope.factor, old.rope.theta) == ("linear", 8.0, 1e6)
    assert old.window_rope is not None
    assert (old.window_rope.kind, old.window_rope.theta) == ("default", 1e4)
    assert old.attention_scale == pytest.approx(168**-0.5)
    with pytest.raises(UnsupportedError, match="rope_parameters should give each layer type its own settings"):
        spec("gemma3_text", rope_parameters={"rope_type": "default", "rope_theta": 5.0})
    with pytest.raises(CheckpointError, match=r"rope_parameters.sliding_attention is 3; it should be an object"):
        spec("gemma3_text", rope_parameters={SLIDING: 3, FULL: {"rope_type": "default"}})
    with pytest.raises(UnsupportedError, match="gives each layer type its own settings"):
        spec("qwen3", rope_parameters={SLIDING: {}, FULL: {"rope_type": "default"}})


def test_gemma4_as_the_hub_has_it() -> None:
    """Heads of layers without a window by keys of their own, or by layer; the last layers have others' keys."""
    types = [SLIDING, SLIDING, FULL, SLIDING, FULL, SLIDING, FULL]
    large = spec(
        "gemma4_text",
        layer_types=types,
        head_dim=16,
        num_key_value_heads=8,
        global_head_dim=64,
        num_global_key_value_heads=2,
        attention_k_eq_v=True,
        hidden_size_per_layer_input=0,
        use_bidirectional_attention="vision",
    )
    assert [(shape.kv_heads, shape.head_dim, shape.keys_as_values) for shape in large.shapes[1:3]] == [
        (8, 16, False),
        (2, 64, True),
    ]
    assert large.cache_heads == ((8, 8, 2, 8, 2, 8, 2), (16, 16, 64, 16, 64, 16, 64))
    assert (large.rope.kind, large.rope.dim, large.rope.turning) == ("proportional", 64, 8)
    assert large.window_rope is not None
    assert (large.window_rope.kind, large.window_rope.dim, large.window_rope.theta) == ("default", 16, 1e4)
    assert (large.attention_scale, large.layer_features, large.experts) == (1.0, 0, None)
    by_layer = {str(layer): {"head_dim": 64, "num_key_value_heads": 2} for layer in (2, 4, 6)}
    written = {"per_layer_config": by_layer, "layer_types": types, "head_dim": 16, "num_key_value_heads": 8}
    assert spec("gemma4_text", **written, attention_k_eq_v=True, hidden_size_per_layer_input=0) == large
    # Without keys as values the full layers have as many heads as the others.
    small = spec("gemma4_text", layer_types=types, num_kv_shared_layers=3, num_global_key_value_heads=2)
    assert [shape.source for shape in small.shapes] == [0, 1, 2, 3, 2, 3, 2]
    assert small.cache_heads == ((4,) * 4, (256, 256, 512, 256))
    assert (small.layer_features, small.layer_tokens) == (256, 262144)
    wide = spec("gemma4_text", layer_types=types, num_kv_shared_layers=3, use_double_wide_mlp=True)
    assert [shape.width for shape in wide.shapes] == [20] * 4 + [40] * 3
    # The last layer has no window, whatever the configuration says.
    assert spec("gemma4_text", layer_types=[FULL] + [SLIDING] * 6).windows == (None, *(512,) * 5, None)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("use_bidirectional_attention", "all", "use_bidirectional_attention 'all' is not supported"),
        ("num_kv_shared_layers", 7, "num_kv_shared_layers is 7; it should be a whole number from 0 to 6"),
        ("num_kv_shared_layers", 6, "num_kv_shared_layers is 6; it should be less, as no layer before has the keys"),
        ("num_global_key_value_heads", 5, "num_global_key_value_heads is 5; it should be a divisor"),
        ("vocab_size_per_layer_input", 36, "vocab_size_per_layer_input is 36; it should be a whole number from 37"),
        ("per_layer_config", {"6": {"sliding_window": 4}}, "per_layer_config.6.'sliding_window' is not supported"),
        ("per_layer_config", {"7": {"head_dim": 4}}, "per_layer_config is .*; it should be an object of objects"),
        ("per_layer_config", {"1": {"head_dim": 64}}, "layers with a window have different head_dim"),
        ("enable_moe_block", True, "num_experts is missing"),
    ],
)
def test_gemma4_refuses_what_it_does_not_do(key: str, value: Any, message: str) -> None:
    with pytest.raises(KbitError, match=message):
        spec("gemma4_text", **{"attention_k_eq_v": True, key: value})


@pytest.mark.parametrize("key", ["num_kv_shared_layers", "attention_k_eq_v", "per_layer_config", "global_head_dim"])
def test_keys_of_gemma4_are_not_ignored_elsewhere(key: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{key} .* is not supported for model_type 'llama'"):
        spec("llama", **{key: {"1": {}} if key == "per_layer_config" else True if "eq" in key else 2})


def test_phi3_as_the_hub_has_it() -> None:
    """Its scaling has had three names; the factor comes from the two lengths."""
    for name in ("su", "yarn", "longrope"):
        found = spec(
            "phi3",
            hidden_size=128,
            max_position_embeddings=131072,
            original_max_position_embeddings=4096,
            rope_scaling={"type": name, "short_factor": [1.0, 1.5], "long_factor": [2, 8.0]},
        )
        assert found.rope.kind == "longrope"
        assert found.rope.long_factors == (2.0, 8.0)
        assert found.rope.attention_factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
        assert found.context_length == 131072
        assert found.longest_in_pieces == 4096
    wrong: dict[str, Any] = {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0]}
    with pytest.raises(
        CheckpointError, match=r"rope_scaling.long_factor is \[2.0\]; it should be a list of 2 positive"
    ):
        spec("phi3", hidden_size=128, rope_scaling=wrong)
    wrong["long_factor"] = [2.0, -1.0]
    with pytest.raises(CheckpointError, match=r"rope_scaling.long_factor.1 is -1.0"):
        spec("phi3", hidden_size=128, rope_scaling=wrong)
    with pytest.raises(UnsupportedError, match="RoPE scaling 'llama3' is not supported"):
        spec("phi3", rope_scaling={"type": "llama3"})


def test_layers_that_do_not_rotate() -> None:
    assert spec("smollm3").rotated == (True, True, True, False, True, True, True)
    assert spec("smollm3", no_rope_layers=[1] * 7).rotated == ()
    assert spec("smollm3", no_rope_layers=[0] + [1] * 6).rotated == (False,) + (True,) * 6
    with pytest.raises(CheckpointError, match="no_rope_layers is .*; it should be a list of 7 numbers"):
        spec("smollm3", no_rope_layers=[1, 0])
    types = [SLIDING, SLIDING, SLIDING, FULL] * 2
    windowed = spec("exaone4", sliding_window=9, layer_types=types[:7], sliding_window_pattern="LLLG")
    assert windowed.rotated == (True, True, True, False, True, True, True)
    assert spec("exaone4", sliding_window=None, layer_types=[FULL] * 7).rotated == ()
    assert spec("exaone4", sliding_window=None).windows == (None,) * 7
    with pytest.raises(UnsupportedError, match="sliding_window_pattern 'LLLG' without layer_types"):
        spec("exaone4", sliding_window_pattern="LLLG")
    with pytest.raises(CheckpointError, match="without sliding_attention, as sliding_window says"):
        spec("exaone4", sliding_window=None, layer_types=types[:7])


def test_temperature_and_alpha() -> None:
    settings = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100, "llama_4_scaling_beta": 0.2}
    assert spec("ministral3", rope_parameters=settings).query_temperature == (0.2, 100)
    assert spec("ministral3").query_temperature == (0.1, 16384)
    with pytest.raises(CheckpointError, match="llama_4_scaling_beta is missing"):
        spec("ministral3", rope_parameters={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100})
    with pytest.raises(UnsupportedError, match=r"rope_parameters.llama_4_scaling_beta 0.2 is not supported"):
        spec("qwen3", rope_parameters=settings)
    longer = {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}
    found = spec("hunyuan_v1_dense", rope_scaling=longer, head_dim=128, use_qk_norm=True).rope
    assert (found.kind, found.theta) == ("default", pytest.approx(10000 * 1000.0 ** (128 / 126)))
    assert not found.depends_on_length
    with pytest.raises(CheckpointError, match=r"rope_scaling.alpha is 100000000.0; it should be less"):
        spec("hunyuan_v1_dense", rope_scaling={**longer, "alpha": 1e8}, rope_theta=1e25)
    with pytest.raises(UnsupportedError, match=r"rope_scaling.alpha 1000.0 is not supported"):
        spec("llama", rope_scaling=longer)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("clip_qkv", 8.0),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("logit_scale", 0.0625),
        ("logits_scaling", 8.0),
        ("embedding_multiplier", 12.0),
        ("residual_multiplier", 0.22),
        ("attention_multiplier", 0.0156),
        ("query_pre_attn_scalar", 256),
        ("use_bidirectional_attention", True),
        ("no_rope_layers", [1, 0, 1, 0, 1, 1, 1]),
        ("num_experts", 16),
        ("num_local_experts", 16),
        ("qk_layernorm", True),
        ("use_qk_norm", True),
        ("scale_emb", 12),
        ("attention_chunk_size", 8192),
        ("partial_rotary_factor", 0.5),
    ],
)
def test_what_another_family_reads_is_refused_where_it_is_not(key: str, value: Any) -> None:
    """By every family: it reads the key, and then means it, or names it."""
    refused = 0
    for family in FAMILIES:
        try:
            found = spec(family, **{key: value})
        except KbitError as error:
            assert key in str(error)
            refused += 1
        else:
            unturned = key == "partial_rotary_factor" and not _turns(family)
            same = unturned or key in FAMILIES[family].ignored or _default(family, key) == value
            same = same or value in FAMILIES[family].fixed.get(key, ())
            assert found != spec(family) or same
    some = {
        "partial_rotary_factor": lambda family: not _turns(family.model_type) or family.rope.share is not None,
        "num_experts": lambda family: family.experts is not None,
        "num_local_experts": lambda family: family.experts is not None,
    }.get(key, lambda family: False)
    assert refused >= len(FAMILIES) - 5 - sum(map(some, FAMILIES.values()))
    assert spec("llama", **{key: {"num_experts": 1, "partial_rotary_factor": 1.0}.get(key)}) == spec("llama")


def _turns(family: str) -> bool:
    """Whether positions are angles, and not looked up, or a matter of distance."""
    found = FAMILIES[family]
    return found.names.positions is None and not found.sloped and found.distances is None


def _default(family: str, key: str) -> Any:
    return FAMILIES[family].defaults.get(key, FAMILIES[family].rope.share if key == "partial_rotary_factor" else None)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("gemma2", "query_pre_attn_scalar", 0),
        ("gemma2", "attn_logit_softcapping", -3.0),
        ("gemma3_text", "final_logit_softcapping", "strong"),
        ("gemma3_text", "sliding_window_pattern", -1),
        ("granite", "logits_scaling", 0),
        ("granite", "logits_scaling", 1e-300),
        ("granite", "residual_multiplier", None),
        ("granite", "embedding_multiplier", math.nan),
        ("glm", "partial_rotary_factor", 1.5),
        ("glm", "partial_rotary_factor", 0.001),
        ("ernie4_5", "use_bias", None),
        ("smollm3", "no_rope_layer_interval", 0),
    ],
)
def test_senseless_values_are_named(family: str, key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: {key} is "):
        spec(family, **{key: value})


def test_positions_in_a_table() -> None:
    """OPT's begins with two rows of padding; the context is what is left."""
    gpt2 = spec("gpt2", n_positions=48)
    assert (gpt2.position_rows, gpt2.first_position, gpt2.context_length) == (48, 0, 48)
    assert gpt2.rotated == (False,) * 7
    assert spec("gpt2", n_inner=None).intermediate_size == 4 * 256
    opt = spec("opt", max_position_embeddings=48)
    assert (opt.position_rows, opt.first_position, opt.context_length) == (50, 2, 48)


def test_pythia_as_the_hub_has_it() -> None:
    old = spec("gpt_neox", rotary_pct=0.25, rotary_emb_base=20000, num_attention_heads=8)
    assert (old.rope.dim, old.rope.theta, old.parallel) == (8, 20000, True)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True is not supported"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights False is not supported"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention True is not supported"),
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm True is not supported"),
        ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual True is not supported"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm True is not supported"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm True is not supported"),
        (
            "falcon",
            {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
            "num_ln_in_parallel_attn 1 is not supported",
        ),
        ("mpt", {"attn_config": {"qk_ln": True}}, "attn_config.qk_ln True is not supported"),
        ("mpt", {"attn_config": {"clip_qkv": 6.0}}, "attn_config.clip_qkv 6.0 is not supported"),
        (
            "mpt",
            {"num_attention_heads": 12, "hidden_size": 240},
            "12 heads are no power of two, as kbit has mpt slopes for",
        ),
        ("falcon", {"alibi": True}, "multi_query True is not supported"),
        ("falcon", {"multi_query": False}, "multi_query False is not supported"),
        ("falcon", {"parallel_attn": False}, "parallel_attn False is not supported"),
    ],
)
def test_other_models_of_a_name(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        spec(family, **changes)


@pytest.mark.parametrize(
    ("model_type", "why"),
    [("gemma3n_text", "AltUp"), ("deepseek_v32", "chooses the tokens"), ("deberta-v2", "matrices of its own")],
)
def test_what_is_known_and_does_not_run_is_refused_with_the_reason(model_type: str, why: str) -> None:
    with pytest.raises(
        UnsupportedError, match=f"model_type '{model_type}' is not supported .*{why}.*; kbit runs llama"
    ):
        spec_from_config({"model_type": model_type})
