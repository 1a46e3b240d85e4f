"""Solar Open: GLM-4.5's experts in every layer, without norms of queries and keys."""

from dataclasses import replace

from kbit.models.families.glm4_moe import FAMILY as GLM
from kbit.models.rope_config import RopeRules

assert GLM.experts is not None

FAMILY = replace(
    GLM,
    model_type="solar_open",
    architectures=("SolarOpenForCausalLM",),
    defaults={**GLM.defaults, "head_dim": 128, "moe_intermediate_size": 1280},
    names=replace(GLM.names, q_norm=None, k_norm=None),
    qk_norms=None,
    rope=RopeRules(theta=1e6),
    experts=replace(GLM.experts, layers="all"),
)
