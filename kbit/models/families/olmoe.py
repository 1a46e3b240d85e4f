"""OLMoE: Llama with norms of all queries and all keys together, and experts, 8 of 64 for each token as released."""

from kbit.models.expert_config import ExpertRules
from kbit.models.families.llama import DEFAULTS, QK_NORMS
from kbit.models.families.qwen3_moe import with_experts
from kbit.models.family import Family

FAMILY = Family(
    model_type="olmoe",
    architectures=("OlmoeForCausalLM",),
    defaults={
        **DEFAULTS,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "num_experts_per_tok": 8,
        "num_experts": 64,
        "norm_topk_prob": False,
    },
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias=False,
    windows="none",
    names=with_experts(QK_NORMS, "mlp", "gate_proj", "up_proj", "down_proj"),
    qk_norm="whole",
    experts=ExpertRules(width="intermediate_size", normalise="norm_topk_prob"),
)
