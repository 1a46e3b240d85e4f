"""StarCoder 2: LayerNorms, biases everywhere, a plain MLP, a window in every layer where there is one."""

from dataclasses import replace

from kbit.models.families.llama import LAYER, NAMES
from kbit.models.family import Family

FAMILY = Family(
    model_type="starcoder2",
    architectures=("Starcoder2ForCausalLM",),
    defaults={
        "hidden_act": "gelu_pytorch_tanh",
        "norm_epsilon": 1e-5,
        "max_position_embeddings": 4096,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "use_bias": True,
    },
    qkv_bias="use_bias",
    output_bias="use_bias",
    mlp_bias="use_bias",
    windows="all",
    names=replace(NAMES, gate=None, up=f"{LAYER}.mlp.c_fc", down=f"{LAYER}.mlp.c_proj"),
    norm="layer",
    norm_bias=True,
    norm_eps="norm_epsilon",
)
