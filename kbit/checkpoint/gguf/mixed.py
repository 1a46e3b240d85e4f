"""GGUF architectures whose layers differ, or do not all attend: Gemma 4, delta nets, convolutions, state spaces."""

from __future__ import annotations

from dataclasses import replace

from kbit.checkpoint.gguf import configure, gemma4, hybrids, nemotron_h
from kbit.checkpoint.gguf.delta_nets import DeltaTensors
from kbit.checkpoint.gguf.experts import SIGMOID, ExpertTensors
from kbit.checkpoint.gguf.names import (
    GELU,
    GRANITE_NUMBERS,
    LAYER_NORM_EPSILON,
    MLP_NORM_AFTER_ATTENTION,
    NORMS_AROUND,
    ONE_NORM,
    Architecture,
)
from kbit.checkpoint.source import CANONICAL

_LFM2_NORMS = {"attn_norm": "operator_norm", "ffn_norm": "ffn_norm"}
_LFM2_QK_NORMS = ("self_attn.q_layernorm", "self_attn.k_layernorm")
_GATED_EXPERTS = ExpertTensors(shared="mlp.shared_expert", switch="mlp.shared_expert_gate", entry="norm_topk_prob")

_NEMOTRON_H = Architecture(
    "nemotron_h",
    "nemotron_h",
    "NemotronHForCausalLM",
    norms={"attn_norm": "norm"},
    keys=nemotron_h.KEYS,
    constants={CANONICAL: True},
    layer="backbone.layers",
    outside=nemotron_h.OUTSIDE,
    linears=nemotron_h.LINEARS,
    epsilon=(LAYER_NORM_EPSILON[0], "layer_norm_epsilon"),
    configure=nemotron_h.configure,
    special=nemotron_h.SPECIAL,
)

MIXED = (
    Architecture(
        "gemma4",
        "gemma4_text",
        "Gemma4ForCausalLM",
        norms=NORMS_AROUND,
        qk_norm="head",
        keys=gemma4.KEYS,
        constants={"hidden_activation": GELU, CANONICAL: True},
        numbers={"final_logit_softcapping": "final_logit_softcapping"},
        configure=gemma4.configure,
        special=gemma4.SPECIAL,
    ),
    Architecture(
        "qwen3next",
        "qwen3_next",
        "Qwen3NextForCausalLM",
        norms=MLP_NORM_AFTER_ATTENTION,
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
        norms=MLP_NORM_AFTER_ATTENTION,
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
        norms=MLP_NORM_AFTER_ATTENTION,
        qk_norm="head",
        partial=True,
        constants={CANONICAL: True},
        experts=_GATED_EXPERTS,
        delta=DeltaTensors(tiled=True, together=False),
        configure=configure.no_window,
    ),
    Architecture(
        "lfm2",
        "lfm2",
        "Lfm2ForCausalLM",
        norms=_LFM2_NORMS,
        qk_norm="head",
        qk_names=_LFM2_QK_NORMS,
        keys=hybrids.LFM2_KEYS,
        constants={CANONICAL: True},
        outside=hybrids.LFM2_OUTSIDE,
        linears=hybrids.LFM2_LINEARS,
        configure=hybrids.lfm2,
        special=hybrids.LFM2,
    ),
    Architecture(
        "lfm2moe",
        "lfm2_moe",
        "Lfm2MoeForCausalLM",
        norms=_LFM2_NORMS,
        qk_norm="head",
        qk_names=_LFM2_QK_NORMS,
        keys=hybrids.LFM2_KEYS,
        constants={CANONICAL: True},
        outside=hybrids.LFM2_OUTSIDE,
        linears=hybrids.LFM2_LINEARS,
        experts=ExpertTensors(
            block="feed_forward",
            names=("w1", "w3", "w2"),
            selection_bias="feed_forward.expert_bias",
            scores=SIGMOID,
            entry="norm_topk_prob",
            scaled=True,
            leading=True,
        ),
        configure=hybrids.lfm2,
        special=hybrids.LFM2,
    ),
    Architecture(
        "granitehybrid",
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        interleaved=True,
        keys=hybrids.SCAN_KEYS,
        constants={CANONICAL: True},
        linears=hybrids.GRANITE_LINEARS,
        numbers=GRANITE_NUMBERS,
        experts=ExpertTensors(
            count="num_local_experts",
            width=hybrids.EXPERT_WIDTH,
            block="block_sparse_moe",
            router="router.layer",
            optional=True,
        ),
        variant=hybrids.granite_or_bamba,
        configure=hybrids.granite,
        special=hybrids.STATE_SPACES,
    ),
    Architecture(
        "falcon-h1",
        "falcon_h1",
        "FalconH1ForCausalLM",
        norms=ONE_NORM,  # (another one has a name of its own)
        keys=hybrids.SCAN_KEYS,
        constants={CANONICAL: True},
        outside=hybrids.FALCON_OUTSIDE,
        linears=hybrids.FALCON_LINEARS,
        configure=hybrids.falcon,
        special=hybrids.STATE_SPACES,
    ),
    _NEMOTRON_H,
    replace(_NEMOTRON_H, name="nemotron_h_moe"),
)
