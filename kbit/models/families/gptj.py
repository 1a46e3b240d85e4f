"""GPT-J and CodeGen: one norm, after which attention and MLP stand side by side; pairs that turn lie side by side.

CodeGen's queries, values and keys are in one matrix, a quarter of all heads at a time.
"""

from dataclasses import replace

from kbit.models.family import Family
from kbit.models.layout import Grouped, Layout
from kbit.models.rope_config import RopeRules
from kbit.models.tensor_names import TensorNames

_LAYER = "transformer.h.{layer}"

FAMILY = Family(
    model_type="gptj",
    architectures=("GPTJForCausalLM",),
    defaults={
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "n_positions": 2048,
        "rotary_dim": 64,
        "tie_word_embeddings": False,
    },
    keys={
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    },
    activation="activation_function",
    qkv_bias=False,
    output_bias=False,
    mlp_bias=True,
    head_bias=True,
    windows="none",
    rope=RopeRules(share=1.0, dim="rotary_dim"),
    names=TensorNames(
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
        head="lm_head",
        attention_norm=f"{_LAYER}.ln_1",
        q=f"{_LAYER}.attn.q_proj",
        k=f"{_LAYER}.attn.k_proj",
        v=f"{_LAYER}.attn.v_proj",
        o=f"{_LAYER}.attn.out_proj",
        gate=None,
        up=f"{_LAYER}.mlp.fc_in",
        down=f"{_LAYER}.mlp.fc_out",
    ),
    norm="layer",
    norm_bias=True,
    norm_eps="layer_norm_epsilon",
    parallel=True,
    mlp_ratio=4,
    layout=Layout(interleaved=True),
)

CODEGEN = replace(
    FAMILY,
    model_type="codegen",
    architectures=("CodeGenForCausalLM",),
    layout=Layout(grouped={f"{_LAYER}.attn.qkv_proj": Grouped(("q", "v", "k"), "quarters")}, interleaved=True),
)
