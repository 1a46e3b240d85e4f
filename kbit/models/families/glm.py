"""GLM-4 (9B and its like): pairs that turn lie side by side and fill half of a head; gate and up in one matrix."""

from kbit.models.families.llama import DEFAULTS, LAYER, NAMES
from kbit.models.family import Family
from kbit.models.layout import Layout
from kbit.models.params import GATE_UP
from kbit.models.rope_config import RopeRules

GLM_DEFAULTS = {
    **DEFAULTS,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rms_norm_eps": 1.5625e-7,
    "attention_bias": True,
}
LAYOUT = Layout(fused={f"{LAYER}.mlp.gate_up_proj": GATE_UP}, interleaved=True)
ROPE = RopeRules(share=0.5)

FAMILY = Family(
    model_type="glm",
    architectures=("GlmForCausalLM",),
    defaults=GLM_DEFAULTS,
    qkv_bias="attention_bias",
    output_bias=False,
    mlp_bias=False,
    windows="none",
    rope=ROPE,
    names=NAMES,
    layout=LAYOUT,
)
