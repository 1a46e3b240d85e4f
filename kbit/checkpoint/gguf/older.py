"""GGUF architectures with LayerNorms or MLPs without a gate: GPT-2 to Falcon, Phi-2, StarCoder 2, StableLM, Nemotron.

As llama.cpp's converter writes them: queries, keys and values in one tensor, all rows of one after all of the other,
whatever was published; matrices upright; norm weights as they multiply. Not in a file, only in llama.cpp's code: that
there are no windows, BLOOM's slopes, and the activation. For GELU it has the approximation by a tanh; here it is what
the models were published with.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kbit.checkpoint.gguf.configure import no_window
from kbit.checkpoint.gguf.experts import ExpertTensors
from kbit.checkpoint.gguf.names import (
    ATTENTION_BIASES,
    GELU,
    GRANITE_NUMBERS,
    LAYER_NORM_EPSILON,
    ONE_NORM,
    QKV,
    Architecture,
)
from kbit.checkpoint.source import CANONICAL
from kbit.host.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kbit.checkpoint.gguf.keys import Keys
    from kbit.checkpoint.gguf.metadata import GGUFHeader

_EPSILON = (LAYER_NORM_EPSILON[0], "layer_norm_epsilon")
_FUSED = {"attn_qkv": QKV}
_PLAIN_MLP = ("ffn_up", "ffn_down")
_ALL = (*ATTENTION_BIASES, *_PLAIN_MLP)
FALCON_LAYOUT = "jploski"  # tensor_data_layout of Falcon's files since their queries, keys and values are in turn
MOST_BIAS = 8.0  # of slopes: llama.cpp's for BLOOM, and the only one that models have


def _outside(embedding: str, norm: str, head: str = "lm_head", *, biases: bool = True) -> dict[str, str]:
    """Canonical names of what is outside of layers."""
    found = {"token_embd.weight": f"{embedding}.weight", "output_norm.weight": f"{norm}.weight"}
    if biases:
        found["output_norm.bias"] = f"{norm}.bias"
    return {**found, "output.weight": f"{head}.weight"}


def _linears(attention: str, output: str, up: str, down: str) -> dict[str, str]:
    """Canonical names of the matrices of a layer whose MLP has no gate."""
    queries = {part: f"{attention}.{part.removeprefix('attn_')}_proj" for part in QKV}
    return {**queries, "attn_output": f"{attention}.{output}", "ffn_up": f"mlp.{up}", "ffn_down": f"mlp.{down}"}


def _bias_keys(keys: Keys, config: dict[str, Any]) -> None:
    """StarCoder 2's and StableLM's names of what has biases; and no window, whatever config.json said."""
    no_window(keys, config)
    config["use_bias"] = config["use_qkv_bias"] = config["attention_bias"]
    config["sliding_window"] = None


def _gptneox(keys: Keys, config: dict[str, Any]) -> None:
    no_window(keys, config)
    parallel = keys.header.flag("gptneox.use_parallel_residual")
    config["use_parallel_residual"] = True if parallel is None else parallel


def _olmo(keys: Keys, config: dict[str, Any]) -> None:
    no_window(keys, config)
    config["clip_qkv"] = keys.real("attention.clamp_kqv", 0.0) or None  # (which kbit then refuses by that name)


def _mpt(keys: Keys, config: dict[str, Any]) -> None:
    no_window(keys, config)
    for name, wanted in (("attention.max_alibi_bias", MOST_BIAS), ("attention.clamp_kqv", 0.0)):
        value = keys.real(name, 0.0)
        if value != wanted:
            raise UnsupportedError(
                f"{keys.header.path}: 'mpt.{name}' is {value:g}; kbit runs MPT models of which it is {wanted:g}"
            )


def _falcon(keys: Keys, config: dict[str, Any]) -> None:
    no_window(keys, config)
    config["new_decoder_architecture"] = "blk.0.attn_norm_2.weight" in keys.tensors


def _falcon_of(header: GGUFHeader, arch: Architecture) -> Architecture:
    """With a norm each for attention and MLP in the larger models."""
    if "blk.0.attn_norm_2.weight" not in header.tensors:
        return arch
    return large_falcon(arch)


def large_falcon(arch: Architecture) -> Architecture:
    """Falcon 40B's kind of it."""
    return replace(arch, norms={"attn_norm_2": "ln_attn", "attn_norm": "ln_mlp"})


def _stablelm_of(header: GGUFHeader, arch: Architecture) -> Architecture:
    if "blk.0.ffn_norm.weight" not in header.tensors:
        raise UnsupportedError(
            f"{header.path}: a StableLM with attention and MLP side by side (StableLM 2 12B) is not supported"
        )
    return arch


def _granitemoe(keys: Keys, config: dict[str, Any]) -> None:
    no_window(keys, config)
    config.setdefault("attention_multiplier", float(config["head_dim"]) ** -0.5)
    if config["shared_intermediate_size"]:
        config["architectures"], config["model_type"] = ["GraniteMoeSharedForCausalLM"], "granitemoeshared"


_WTE = _outside("transformer.wte", "transformer.ln_f")
_BLOOM = _outside("transformer.word_embeddings", "transformer.ln_f")
_PHI = _outside("model.embed_tokens", "model.final_layernorm")
_MODEL = _outside("model.embed_tokens", "model.norm")
_BLOOM_LINEARS = _linears("self_attention", "dense", "dense_h_to_4h", "dense_4h_to_h")
_TWO_NORMS: Mapping[str, str] = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}

_GPT2 = Architecture(
    "gpt2",
    "gpt2",
    "GPT2LMHeadModel",
    biases=_ALL,
    norms={"attn_norm": "ln_1", "ffn_norm": "ln_2"},
    norm_bias=True,
    fused=_FUSED,
    layer="transformer.h",
    outside={**_WTE, "position_embd.weight": "transformer.wpe.weight"},
    linears=_linears("attn", "c_proj", "c_fc", "c_proj"),
    epsilon=_EPSILON,
    positions="table",
    constants={CANONICAL: True},
    configure=no_window,
)

OLDER = (
    _GPT2,
    replace(_GPT2, name="starcoder", model_type="gpt_bigcode", hf_class="GPTBigCodeForCausalLM"),
    Architecture(
        "gptneox",
        "gpt_neox",
        "GPTNeoXForCausalLM",
        biases=_ALL,
        norm_bias=True,
        own_head=True,
        fused=_FUSED,
        layer="gpt_neox.layers",
        outside=_outside("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out"),
        linears=_linears("attention", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        epsilon=LAYER_NORM_EPSILON,
        keys=frozenset({"use_parallel_residual"}),
        partial=True,
        constants={"hidden_act": "gelu", CANONICAL: True},
        configure=_gptneox,
    ),
    Architecture(
        "bloom",
        "bloom",
        "BloomForCausalLM",
        biases=_ALL,
        norm_bias=True,
        fused=_FUSED,
        layer="transformer.h",
        outside={
            **_BLOOM,
            "token_embd_norm.weight": "transformer.word_embeddings_layernorm.weight",
            "token_embd_norm.bias": "transformer.word_embeddings_layernorm.bias",
        },
        linears=_BLOOM_LINEARS,
        epsilon=_EPSILON,
        positions="slopes",
        constants={"hidden_act": GELU, CANONICAL: True},
        configure=no_window,
    ),
    Architecture(
        "falcon",
        "falcon",
        "FalconForCausalLM",
        norms=ONE_NORM,
        norm_bias=True,
        fused=_FUSED,
        layer="transformer.h",
        outside=_BLOOM,
        linears=_BLOOM_LINEARS,
        epsilon=_EPSILON,
        layout=FALCON_LAYOUT,
        variant=_falcon_of,
        constants={CANONICAL: True},
        configure=_falcon,
    ),
    Architecture(
        "mpt",
        "mpt",
        "MptForCausalLM",
        norms={"attn_norm": "norm_1", "ffn_norm": "norm_2"},
        fused=_FUSED,
        layer="transformer.blocks",
        outside=_outside("transformer.wte", "transformer.norm_f", biases=False),
        linears={
            **_linears("attn", "out_proj", "", ""),
            "ffn_up": "ffn.up_proj",
            "ffn_down": "ffn.down_proj",
        },
        epsilon=_EPSILON,
        positions="slopes",
        keys=frozenset({"attention.max_alibi_bias", "attention.clamp_kqv"}),
        constants={"hidden_act": "gelu", CANONICAL: True},
        configure=_mpt,
    ),
    Architecture(
        "phi2",
        "phi",
        "PhiForCausalLM",
        biases=_ALL,
        norms=ONE_NORM,
        norm_bias=True,
        own_head=True,
        outside={**_PHI, "output.bias": "lm_head.bias"},
        linears=_linears("self_attn", "dense", "fc1", "fc2"),
        epsilon=LAYER_NORM_EPSILON,
        partial=True,
        constants={"hidden_act": "gelu_new"},
        configure=no_window,
    ),
    Architecture(
        "starcoder2",
        "starcoder2",
        "Starcoder2ForCausalLM",
        biases=None,
        bias_groups=(_ALL,),
        norm_bias=True,
        outside=_MODEL,
        linears=_linears("self_attn", "o_proj", "c_fc", "c_proj"),
        epsilon=(LAYER_NORM_EPSILON[0], "norm_epsilon"),
        constants={"hidden_act": GELU},
        configure=_bias_keys,
    ),
    Architecture(
        "stablelm",
        "stablelm",
        "StableLmForCausalLM",
        biases=None,
        bias_groups=(QKV,),
        norm_bias=True,
        own_head=True,
        outside=_MODEL,
        epsilon=LAYER_NORM_EPSILON,
        keys=frozenset({"use_parallel_residual"}),  # (llama.cpp does not read it: the tensors say)
        partial=True,
        variant=_stablelm_of,
        configure=_bias_keys,
    ),
    Architecture(
        "nemotron",
        "nemotron",
        "NemotronForCausalLM",
        biases=None,
        bias_groups=(ATTENTION_BIASES, _PLAIN_MLP),
        norm_bias=True,
        own_head=True,
        outside=_MODEL,
        linears=_linears("self_attn", "o_proj", "up_proj", "down_proj"),
        epsilon=(LAYER_NORM_EPSILON[0], "norm_eps"),
        partial=True,
        constants={"hidden_act": "relu2", CANONICAL: True},
        configure=no_window,
    ),
    Architecture(
        "arcee",
        "arcee",
        "ArceeForCausalLM",
        interleaved=True,
        linears=_linears("self_attn", "o_proj", "up_proj", "down_proj"),
        constants={"hidden_act": "relu2"},
        configure=no_window,
    ),
    Architecture(
        "olmo",
        "olmo",
        "OlmoForCausalLM",
        interleaved=True,
        norms={},
        outside={"token_embd.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight"},
        epsilon=(LAYER_NORM_EPSILON[0], "norm_eps"),
        keys=frozenset({"attention.clamp_kqv"}),
        configure=_olmo,
    ),
    Architecture(
        "chatglm",
        "glm",
        "GlmForCausalLM",
        interleaved=True,
        biases=None,
        bias_groups=(QKV,),
        fused={"ffn_up": ("ffn_gate", "ffn_up")},
        partial=True,
        constants={CANONICAL: True},
        configure=no_window,
    ),
    Architecture(
        "granitemoe",
        "granitemoe",
        "GraniteMoeForCausalLM",
        interleaved=True,
        numbers=GRANITE_NUMBERS,
        constants={CANONICAL: True},
        experts=ExpertTensors(
            count="num_local_experts",
            width="intermediate_size",
            block="block_sparse_moe",
            router="router.layer",
            shared="shared_mlp",
            shared_width="shared_intermediate_size",
            shared_down="output_linear",
        ),
        configure=_granitemoe,
    ),
)
