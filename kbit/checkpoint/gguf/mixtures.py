"""GGUF architectures whose layers have experts, or latent attention."""

from __future__ import annotations

from dataclasses import replace

from kbit.checkpoint.gguf import configure
from kbit.checkpoint.gguf.experts import SIGMOID, SOFTMAX_OF_CHOSEN, ExpertTensors
from kbit.checkpoint.gguf.names import MLP_NORM_AFTER_ATTENTION, Architecture
from kbit.checkpoint.source import CANONICAL

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

MIXTURES = (
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
        norms=MLP_NORM_AFTER_ATTENTION,
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
        norms=MLP_NORM_AFTER_ATTENTION,
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
        "minicpm3",
        "minicpm3",
        "MiniCPM3ForCausalLM",
        latent=True,
        halves=True,
        scaled=True,
        constants={CANONICAL: True},
        configure=configure.minicpm3,
    ),
    Architecture(
        "dots1",
        "dots1",
        "Dots1ForCausalLM",
        qk_norm="head",
        experts=ExpertTensors(
            count="n_routed_experts",
            selection_bias="mlp.gate.e_score_correction_bias",
            shared="mlp.shared_experts",
            scores=SIGMOID,
            normalises=False,
            entry="norm_topk_prob",
            scaled=True,
            grouped=True,
            leading=True,
        ),
        configure=configure.dots1,
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
)
