"""The GGUF architectures that kbit reads: names, row order, and what llama.cpp knows that the file does not say.

What an architecture's configuration needs besides: `kbit.checkpoint.gguf.configure`. Not in a file, only in llama.cpp's
code: the activation; Gemma's factor on embeddings; in which layers SmolLM3 does not rotate. Norm weights of Gemma have
their 1 added already.
"""

from __future__ import annotations

from dataclasses import replace

from kbit.checkpoint.gguf import configure, gemma4
from kbit.checkpoint.gguf.delta_nets import DeltaTensors
from kbit.checkpoint.gguf.experts import SIGMOID, SOFTMAX_OF_CHOSEN, ExpertTensors
from kbit.checkpoint.gguf.names import MLP_BIASES, Architecture
from kbit.checkpoint.source import CANONICAL

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
            configure=configure.llama,
        ),
        Architecture(
            "qwen3moe",
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            qk_norm="head",
            experts=ExpertTensors(entry="norm_topk_prob"),
            configure=configure.no_window,
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
            configure=configure.no_window,
        ),
        Architecture(
            "olmoe",
            "olmoe",
            "OlmoeForCausalLM",
            qk_norm="whole",
            experts=ExpertTensors(width="intermediate_size", normalises=False, entry="norm_topk_prob"),
            configure=configure.no_window,
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
            configure=configure.no_window,
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
            configure=configure.no_window,
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
            configure=configure.gpt_oss,
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
            configure=configure.deepseek2,
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
            configure=configure.no_window,
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
            configure=configure.no_window,
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
            configure=configure.no_window,
        ),
        Architecture("qwen2", "qwen2", "Qwen2ForCausalLM", biases=("attn_q", "attn_k", "attn_v")),
        Architecture("qwen3", "qwen3", "Qwen3ForCausalLM", qk_norm="head", configure=configure.no_window),
        Architecture(
            "gemma",
            "gemma",
            "GemmaForCausalLM",
            constants={"hidden_act": _GELU, CANONICAL: True},
            configure=configure.no_window,
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
            configure=configure.gemma2,
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
            configure=configure.gemma3,
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
            configure=configure.phi3,
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
            configure=configure.granite,
        ),
        Architecture(
            "mistral3",
            "ministral3",
            "Ministral3ForCausalLM",
            interleaved=True,
            yarn_log_multiplier=True,
            keys=frozenset({"attention.temperature_scale"}),
            configure=configure.mistral3,
        ),
        Architecture("smollm3", "smollm3", "SmolLM3ForCausalLM", interleaved=True, configure=configure.no_window),
        Architecture(
            "olmo2",
            "olmo2",
            "Olmo2ForCausalLM",
            norms=_POST_NORMS,
            qk_norm="whole",
            keys=_WINDOWED,
            configure=configure.olmo2,
        ),
        Architecture(
            "exaone4",
            "exaone4",
            "Exaone4ForCausalLM",
            norms=_POST_NORMS,
            qk_norm="head",
            keys=_WINDOWED,
            configure=configure.exaone4,
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
            configure=configure.no_window,
        ),
        Architecture(
            "seed_oss",
            "seed_oss",
            "SeedOssForCausalLM",
            biases=None,
            bias_groups=(("attn_q", "attn_k", "attn_v"), ("attn_output",), MLP_BIASES),
            norms={"attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"},
            configure=configure.seed_oss,
        ),
        Architecture(
            "hunyuan-dense",
            "hunyuan_v1_dense",
            "HunYuanDenseV1ForCausalLM",
            qk_norm="head",
            qk_names=("self_attn.query_layernorm", "self_attn.key_layernorm"),
            configure=configure.no_window,
        ),
        Architecture(
            "ernie4_5",
            "ernie4_5",
            "Ernie4_5ForCausalLM",
            interleaved=True,
            constants={CANONICAL: True},
            configure=configure.no_window,
        ),
    )
}
