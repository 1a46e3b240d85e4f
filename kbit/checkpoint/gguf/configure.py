"""What is particular to the configuration of a GGUF architecture: a function for each that has such things.

Each is given the keys of a file and the configuration made so far, which it completes (`Architecture.configure`). Not
in a file, only in llama.cpp's code: Gemma's score scale, which is that of the head size but for the 27B models; which
layers of Gemma and EXAONE have windows, in files without a pattern.
"""

from __future__ import annotations

from typing import Any

from kbit.checkpoint.gguf.keys import Keys, short_float
from kbit.host.errors import UnsupportedError

_FULL, _SLIDING = "full_attention", "sliding_attention"


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


def gemma2(keys: Keys, config: dict[str, Any]) -> None:
    _gemma_scores(config, 46)
    _same_rope(keys, config)
    _pattern(keys, config)
    window = keys.count("attention.sliding_window")
    if window:
        config["sliding_window"] = window


def gemma3(keys: Keys, config: dict[str, Any]) -> None:
    _gemma_scores(config, 62)
    config["rope_local_base_freq"] = keys.real("rope.freq_base_swa", 10000.0)
    config["sliding_window"] = keys.count("attention.sliding_window") or None
    if not _pattern(keys, config) and config["sliding_window"] is None:
        config["layer_types"] = [_FULL] * int(config["num_hidden_layers"])


def phi3(keys: Keys, config: dict[str, Any]) -> None:
    config["sliding_window"] = keys.count("attention.sliding_window") or None
    if config["rope_scaling"] and "original_max_position_embeddings" in config["rope_scaling"]:
        config["original_max_position_embeddings"] = config["rope_scaling"].pop("original_max_position_embeddings")


def olmo2(keys: Keys, config: dict[str, Any]) -> None:
    window = keys.count("attention.sliding_window")
    if not window:
        return
    # OLMo 3 has no architecture of its own. Only its layers without a window are scaled.
    _same_rope(keys, config)
    config["architectures"], config["model_type"] = ["Olmo3ForCausalLM"], "olmo3"
    config["sliding_window"] = window
    _pattern(keys, config)


def exaone4(keys: Keys, config: dict[str, Any]) -> None:
    _same_rope(keys, config)
    config["sliding_window"] = keys.count("attention.sliding_window") or None
    if not _pattern(keys, config) and config["sliding_window"] is not None and config["num_hidden_layers"] != 64:
        raise UnsupportedError(
            f"{keys.header.path}: '{keys.arch}.attention.sliding_window' without a pattern is known of models of 64 "
            "layers alone; convert the model again"
        )


def granite(keys: Keys, config: dict[str, Any]) -> None:
    no_window(keys, config)
    config.setdefault("attention_multiplier", float(config["head_dim"]) ** -0.5)


def seed_oss(keys: Keys, config: dict[str, Any]) -> None:
    no_window(keys, config)
    config["attention_out_bias"] = "attn_output" in keys.biases


def mistral3(keys: Keys, config: dict[str, Any]) -> None:
    no_window(keys, config)
    if f"{keys.arch}.attention.temperature_scale" not in keys.header:
        config["architectures"], config["model_type"] = ["MistralForCausalLM"], "mistral"
        config["sliding_window"] = None
    elif not config["rope_scaling"] or config["rope_scaling"]["rope_type"] != "yarn":
        keys.header.fail(f"'{keys.arch}.attention.temperature_scale' without YaRN's original context length")
    else:
        config["rope_scaling"]["llama_4_scaling_beta"] = keys.real("attention.temperature_scale")


def llama(keys: Keys, config: dict[str, Any]) -> None:
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


def gpt_oss(keys: Keys, config: dict[str, Any]) -> None:
    # Every other layer slides; YaRN's borders are not rounded; the gate's clamp is the family's.
    config["sliding_window"] = keys.size("attention.sliding_window")
    if config["rope_scaling"]:
        config["rope_scaling"]["truncate"] = False


def deepseek2(keys: Keys, config: dict[str, Any]) -> None:
    no_window(keys, config)
    if config.get("n_group", 1) > 1 and config["model_type"] == "deepseek_v2":
        config["topk_method"] = "group_limited_greedy"
    if "n_routed_experts" not in config:
        config["architectures"], config["model_type"] = ["YoutuForCausalLM"], "youtu"
    scaling = config["rope_scaling"]
    if scaling and "mscale_all_dim" in scaling:
        # Of this architecture the file has a tenth of it.
        scaling["mscale"] = scaling["mscale_all_dim"] = short_float(10.0 * scaling["mscale_all_dim"])


def minicpm3(keys: Keys, config: dict[str, Any]) -> None:
    """Factors that no file names: those of MiniCPM3 4B."""
    no_window(keys, config)
    config |= {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256}
    if config["rope_scaling"] and config["rope_scaling"]["rope_type"] == "longrope":
        config["original_max_position_embeddings"] = config["rope_scaling"].pop("original_max_position_embeddings")


def no_window(keys: Keys, config: dict[str, Any]) -> None:
    if keys.count("attention.sliding_window"):
        raise UnsupportedError(
            f"{keys.header.path}: metadata key '{keys.arch}.attention.sliding_window' is not supported"
        )


def dots1(keys: Keys, config: dict[str, Any]) -> None:
    """(The converter writes no window, and llama.cpp has none.)"""
    no_window(keys, config)
    config["sliding_window"] = None


def cohere2(keys: Keys, config: dict[str, Any]) -> None:
    """Every fourth layer has no window; llama.cpp knows that of all files without a pattern."""
    _same_rope(keys, config)
    config["sliding_window"] = keys.size("attention.sliding_window")
    if not _pattern(keys, config):
        config["sliding_window_pattern"] = 4
