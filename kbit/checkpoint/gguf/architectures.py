"""The GGUF architectures that kbit reads: names, row order, and what llama.cpp knows that the file does not say.

Not in a file, only in llama.cpp's code: the activation; Gemma's factor on embeddings; Gemma's score scale, which is
that of the head size but for the 27B models; which layers of Gemma and EXAONE have windows, in files without a pattern;
in which layers SmolLM3 does not rotate. Norm weights of Gemma have their 1 added already.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kbit.checkpoint.gguf import gemma4
from kbit.checkpoint.gguf.delta_nets import DeltaTensors
from kbit.checkpoint.gguf.experts import SIGMOID, SOFTMAX_OF_CHOSEN, ExpertTensors
from kbit.checkpoint.gguf.keys import Keys, short_float
from kbit.checkpoint.gguf.names import MLP_BIASES, Architecture
from kbit.checkpoint.source import CANONICAL
from kbit.host.errors import UnsupportedError

_FULL, _SLIDING = "full_attention", "sliding_attention"
_GELU = "gelu_pytorch_tanh"

_NORMS_AROUND = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_MLP_NORM_AFTER_ATTENTION = {"attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}
_POST_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_WINDOWED = frozenset({"attention.sliding_window_pattern", "rope.freq_base_swa"})


def _pattern(keys: Keys, config: dict[str, Any]) -> bool:
    """Sets the layers' types where the file has them; whether it has."""
    flags = keys.flags("attention.sliding_window_pattern", int(config["num_hidden_layers"]))
    if flags is not None:
        config["layer_types"] = [_SLIDING if slides else _FULL for slides in flags]
    return flags is not None


def _same_rope(keys: Keys, config: dict[str, Any]) -> None:
    """Refuses a rotation of their own in layers with a window."""
    theta = keys.real("rope.freq_base_swa", float(config["rope_theta"]))
    if theta != config["rope_theta"]:
        raise UnsupportedError(
            f"{keys.header.path}: '{keys.arch}.rope.freq_base_swa' is {theta}, another base than the other layers', "
            "which kbit does not support for this architecture"
        )


def _gemma_scores(config: dict[str, Any], layers_of_27b: int) -> None:
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    large = config["num_hidden_layers"] == layers_of_27b
    config["query_pre_attn_scalar"] = hidden // heads if large else config["head_dim"]


def _gemma2(keys: Keys, config: dict[str, Any]) -> None:
    _gemma_scores(config, 46)
    _same_rope(keys, config)
    _pattern(keys, config)
    window = keys.count("attention.sliding_window")
    if window:
        config["sliding_window"] = window


def _gemma3(keys: Keys, config: dict[str, Any]) -> None:
    _gemma_scores(config, 62)
    config["rope_local_base_freq"] = keys.real("rope.freq_base_swa", 10000.0)
    config["sliding_window"] = keys.count("attention.sliding_window") or None
    if not _pattern(keys, config) and config["sliding_window"] is None:
        config["layer_types"] = [_FULL] * int(config["num_hidden_layers"])


def _phi3(keys: Keys, config: dict[str, Any]) -> None:
    config["sliding_window"] = keys.count("attention.sliding_window") or None
    if config["rope_scaling"] and "original_max_position_embeddings" in config["rope_scaling"]:
        config["original_max_position_embeddings"] = config["rope_scaling"].pop("original_max_position_embeddings")


def _olmo2(keys: Keys, config: dict[str, Any]) -> None:
    window = keys.count("attention.sliding_window")
    if not window:
        return
    # OLMo 3 has no architecture of its own. Only its layers without a window are scaled.
    _same_rope(keys, config)
    config["architectures"], config["model_type"] = ["Olmo3ForCausalLM"], "olmo3"
    config["sliding_window"] = window
    _pattern(keys, config)


def _exaone4(keys: Keys, config: dict[str, Any]) -> None:
    _same_rope(keys, config)
    config["sliding_window"] = keys.count("attention.sliding_window") or None
    if not _pattern(keys, config) and config["sliding_window"] is not None and config["num_hidden_layers"] != 64:
        raise UnsupportedError(
            f"{keys.header.path}: '{keys.arch}.attention.sliding_window' without a pattern is known of models of 64 "
            "layers alone; convert the model again"
        )


def _granite(keys: Keys, config: dict[str, Any]) -> None:
    _no_window(keys, config)
    config.setdefault("attention_multiplier", float(config["head_dim"]) ** -0.5)


def _seed_oss(keys: Keys, config: dict[str, Any]) -> None:
    _no_window(keys, config)
    config["attention_out_bias"] = "attn_output" in keys.biases


def _mistral3(keys: Keys, config: dict[str, Any]) -> None:
    _no_window(keys, config)
    if f"{keys.arch}.attention.temperature_scale" not in keys.header:
        config["architectures"], config["model_type"] = ["MistralForCausalLM"], "mistral"
        config["sliding_window"] = None
    elif not config["rope_scaling"] or config["rope_scaling"]["rope_type"] != "yarn":
        keys.header.fail(f"'{keys.arch}.attention.temperature_scale' without YaRN's original context length")
    else:
        config["rope_scaling"]["llama_4_scaling_beta"] = keys.real("attention.temperature_scale")


def _llama(keys: Keys, config: dict[str, Any]) -> None:
    window, experts = keys.count("attention.sliding_window"), "num_local_experts" in config
    if (window or experts) and keys.biases:
        raise UnsupportedError(f"{keys.header.path}: biases with a sliding window, or experts, are not supported")
    # Hugging Face's Llama class has no window and no experts; Mistral and Mixtral are the same model with them.
    if experts:
        config["architectures"], config["model_type"] = ["MixtralForCausalLM"], "mixtral"
    elif window:
        config["architectures"], config["model_type"] = ["MistralForCausalLM"], "mistral"
    if window:
        config["sliding_window"] = window


def _gpt_oss(keys: Keys, config: dict[str, Any]) -> None:
    # Every other layer slides; YaRN's borders are not rounded; the gate's clamp is the family's.
    config["sliding_window"] = keys.size("attention.sliding_window")
    if config["rope_scaling"]:
        config["rope_scaling"]["truncate"] = False


def _deepseek2(keys: Keys, config: dict[str, Any]) -> None:
    _no_window(keys, config)
    if config.get("n_group", 1) > 1 and config["model_type"] == "deepseek_v2":
        config["topk_method"] = "group_limited_greedy"
    if "n_routed_experts" not in config:
        config["architectures"], config["model_type"] = ["YoutuForCausalLM"], "youtu"
    scaling = config["rope_scaling"]
    if scaling and "mscale_all_dim" in scaling:
        # Of this architecture the file has a tenth of it.
        scaling["mscale"] = scaling["mscale_all_dim"] = short_float(10.0 * scaling["mscale_all_dim"])


def _no_window(keys: Keys, config: dict[str, Any]) -> None:
    if keys.count("attention.sliding_window"):
        raise UnsupportedError(
            f"{keys.header.path}: metadata key '{keys.arch}.attention.sliding_window' is not supported"
        )


_DEEPSEEK_EXPERTS = ExpertTensors(
    count="n_routed_experts",
    shared="mlp.shared_experts",
    normalises=False,
    entry="norm_topk_prob",
    scaled=True,
    grouped=True,
    leading=True,
    optional=True,
)
_GATED_EXPERTS = ExpertTensors(shared="mlp.shared_expert", switch="mlp.shared_expert_gate", entry="norm_topk_prob")

ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture(
            "llama",
            "llama",
            "LlamaForCausalLM",
            interleaved=True,
            biases=None,
            experts=ExpertTensors(
                count="num_local_experts",
                width="intermediate_size",
                block="block_sparse_moe",
                names=("w1", "w3", "w2"),
                optional=True,
            ),
            configure=_llama,
        ),
        Architecture(
            "qwen3moe",
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            qk_norm="head",
            experts=ExpertTensors(entry="norm_topk_prob"),
            configure=_no_window,
        ),
        Architecture(
            "qwen2moe",
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            biases=("attn_q", "attn_k", "attn_v"),
            experts=ExpertTensors(
                shared="mlp.shared_expert",
                switch="mlp.shared_expert_gate",
                normalises=False,
                entry="norm_topk_prob",
            ),
            configure=_no_window,
        ),
        Architecture(
            "olmoe",
            "olmoe",
            "OlmoeForCausalLM",
            qk_norm="whole",
            experts=ExpertTensors(width="intermediate_size", normalises=False, entry="norm_topk_prob"),
            configure=_no_window,
        ),
        Architecture(
            "glm4moe",
            "glm4_moe",
            "Glm4MoeForCausalLM",
            biases=None,
            bias_groups=(("attn_q", "attn_k", "attn_v"),),
            norms=_MLP_NORM_AFTER_ATTENTION,
            qk_norm="head",
            qk_optional=True,
            partial=True,
            constants={CANONICAL: True},
            experts=ExpertTensors(
                count="n_routed_experts",
                selection_bias="mlp.gate.e_score_correction_bias",
                shared="mlp.shared_experts",
                scores=SIGMOID,
                entry="norm_topk_prob",
                scaled=True,
                grouped=True,
                leading=True,
            ),
            configure=_no_window,
        ),
        Architecture(
            "minimax-m2",
            "minimax_m2",
            "MiniMaxM2ForCausalLM",
            qk_norm="whole",
            partial=True,
            experts=ExpertTensors(
                count="num_local_experts",
                width="intermediate_size",
                block="block_sparse_moe",
                names=("w1", "w3", "w2"),
                selection_bias="block_sparse_moe.e_score_correction_bias",
                scores=SIGMOID,
            ),
            configure=_no_window,
        ),
        Architecture(
            "gpt-oss",
            "gpt_oss",
            "GptOssForCausalLM",
            biases=None,
            bias_groups=(("attn_q", "attn_k", "attn_v", "attn_output"),),
            norms=_MLP_NORM_AFTER_ATTENTION,
            sinks=True,
            constants={CANONICAL: True},
            experts=ExpertTensors(
                count="num_local_experts",
                width="intermediate_size",
                router="router",
                biases=True,
                scores=SOFTMAX_OF_CHOSEN,
                normalises=False,
            ),
            configure=_gpt_oss,
        ),
        Architecture(
            "deepseek2",
            "deepseek_v2",
            "DeepseekV2ForCausalLM",
            latent=True,
            yarn_log_multiplier=True,
            constants={CANONICAL: True},
            experts=_DEEPSEEK_EXPERTS,
            sigmoid=(
                "deepseek_v3",
                "DeepseekV3ForCausalLM",
                replace(_DEEPSEEK_EXPERTS, scores=SIGMOID, selection_bias="mlp.gate.e_score_correction_bias"),
            ),
            configure=_deepseek2,
        ),
        Architecture(
            "qwen3next",
            "qwen3_next",
            "Qwen3NextForCausalLM",
            norms=_MLP_NORM_AFTER_ATTENTION,
            qk_norm="head",
            partial=True,
            constants={CANONICAL: True},
            experts=_GATED_EXPERTS,
            delta=DeltaTensors(tiled=False, together=True),
            configure=_no_window,
        ),
        Architecture(
            "qwen35",
            "qwen3_5_text",
            "Qwen3_5ForCausalLM",
            norms=_MLP_NORM_AFTER_ATTENTION,
            qk_norm="head",
            partial=True,
            constants={CANONICAL: True},
            delta=DeltaTensors(tiled=True, together=False),
            configure=_no_window,
        ),
        Architecture(
            "qwen35moe",
            "qwen3_5_moe_text",
            "Qwen3_5MoeForCausalLM",
            norms=_MLP_NORM_AFTER_ATTENTION,
            qk_norm="head",
            partial=True,
            constants={CANONICAL: True},
            experts=_GATED_EXPERTS,
            delta=DeltaTensors(tiled=True, together=False),
            configure=_no_window,
        ),
        Architecture("qwen2", "qwen2", "Qwen2ForCausalLM", biases=("attn_q", "attn_k", "attn_v")),
        Architecture("qwen3", "qwen3", "Qwen3ForCausalLM", qk_norm="head", configure=_no_window),
        Architecture(
            "gemma",
            "gemma",
            "GemmaForCausalLM",
            constants={"hidden_act": _GELU, CANONICAL: True},
            configure=_no_window,
        ),
        Architecture(
            "gemma2",
            "gemma2",
            "Gemma2ForCausalLM",
            norms=_NORMS_AROUND,
            keys=_WINDOWED,
            constants={"hidden_activation": _GELU, CANONICAL: True},
            numbers={
                "attn_logit_softcapping": "attn_logit_softcapping",
                "final_logit_softcapping": "final_logit_softcapping",
            },
            configure=_gemma2,
        ),
        Architecture(
            "gemma3",
            "gemma3_text",
            "Gemma3ForCausalLM",
            norms=_NORMS_AROUND,
            qk_norm="head",
            keys=_WINDOWED,
            constants={"hidden_activation": _GELU, CANONICAL: True},
            numbers={"final_logit_softcapping": "final_logit_softcapping"},
            configure=_gemma3,
        ),
        Architecture(
            "gemma4",
            "gemma4_text",
            "Gemma4ForCausalLM",
            norms=_NORMS_AROUND,
            qk_norm="head",
            keys=gemma4.KEYS,
            constants={"hidden_activation": _GELU, CANONICAL: True},
            numbers={"final_logit_softcapping": "final_logit_softcapping"},
            configure=gemma4.configure,
            special=gemma4.SPECIAL,
        ),
        Architecture(
            "phi3",
            "phi3",
            "Phi3ForCausalLM",
            fused={"attn_qkv": ("attn_q", "attn_k", "attn_v"), "ffn_up": ("ffn_gate", "ffn_up")},
            partial=True,
            scaled=True,
            constants={CANONICAL: True},
            configure=_phi3,
        ),
        Architecture(
            "granite",
            "granite",
            "GraniteForCausalLM",
            interleaved=True,
            biases=None,
            numbers={
                "attention.scale": "attention_multiplier",
                "embedding_scale": "embedding_multiplier",
                "residual_scale": "residual_multiplier",
                "logit_scale": "logits_scaling",
            },
            configure=_granite,
        ),
        Architecture(
            "mistral3",
            "ministral3",
            "Ministral3ForCausalLM",
            interleaved=True,
            yarn_log_multiplier=True,
            keys=frozenset({"attention.temperature_scale"}),
            configure=_mistral3,
        ),
        Architecture("smollm3", "smollm3", "SmolLM3ForCausalLM", interleaved=True, configure=_no_window),
        Architecture(
            "olmo2",
            "olmo2",
            "Olmo2ForCausalLM",
            norms=_POST_NORMS,
            qk_norm="whole",
            keys=_WINDOWED,
            configure=_olmo2,
        ),
        Architecture(
            "exaone4",
            "exaone4",
            "Exaone4ForCausalLM",
            norms=_POST_NORMS,
            qk_norm="head",
            keys=_WINDOWED,
            configure=_exaone4,
        ),
        Architecture(
            "glm4",
            "glm4",
            "Glm4ForCausalLM",
            interleaved=True,
            biases=None,
            bias_groups=(("attn_q", "attn_k", "attn_v"),),
            norms={
                "attn_norm": "input_layernorm",
                "post_attention_norm": "post_self_attn_layernorm",
                "ffn_norm": "post_attention_layernorm",
                "post_ffw_norm": "post_mlp_layernorm",
            },
            fused={"ffn_up": ("ffn_gate", "ffn_up")},
            partial=True,
            constants={CANONICAL: True},
            configure=_no_window,
        ),
        Architecture(
            "seed_oss",
            "seed_oss",
            "SeedOssForCausalLM",
            biases=None,
            bias_groups=(("attn_q", "attn_k", "attn_v"), ("attn_output",), MLP_BIASES),
            norms={"attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"},
            configure=_seed_oss,
        ),
        Architecture(
            "hunyuan-dense",
            "hunyuan_v1_dense",
            "HunYuanDenseV1ForCausalLM",
            qk_norm="head",
            qk_names=("self_attn.query_layernorm", "self_attn.key_layernorm"),
            configure=_no_window,
        ),
        Architecture(
            "ernie4_5",
            "ernie4_5",
            "Ernie4_5ForCausalLM",
            interleaved=True,
            constants={CANONICAL: True},
            configure=_no_window,
        ),
    )
}
