"""GPT-BigCode (StarCoder, SantaCoder): GPT-2 with one head of keys and values, whose matrices do not lie down."""

from dataclasses import replace

from kbit.models.families.gpt2 import FAMILY as GPT2

FAMILY = replace(
    GPT2,
    model_type="gpt_bigcode",
    architectures=("GPTBigCodeForCausalLM",),
    defaults={**GPT2.defaults, "activation_function": "gelu_pytorch_tanh", "num_key_value_heads": 1},
    fixed={"multi_query": (True,)},
    layout=replace(GPT2.layout, transposed=False),
)
