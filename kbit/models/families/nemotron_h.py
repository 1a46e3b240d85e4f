"""Nemotron-H, Nemotron 3: layers that are Mamba-2, attention without positions, an MLP or experts, one of these each.

MLPs and experts are plain, of squared relus.
"""

from kbit.models.expert_config import ExpertRules
from kbit.models.family import Family
from kbit.models.layout import Layout, Stacked
from kbit.models.params_recurrent import SCAN
from kbit.models.scan_config import DEFAULTS as SCAN_DEFAULTS
from kbit.models.tensor_names import TensorNames

_LAYER = "backbone.layers.{layer}"
_MIXER = f"{_LAYER}.mixer"
_EXPERT = f"{_MIXER}.experts.{{expert}}"

FAMILY = Family(
    model_type="nemotron_h",
    architectures=("NemotronHForCausalLM",),
    defaults={
        **SCAN_DEFAULTS,
        "head_dim": 128,
        "layer_norm_epsilon": 1e-5,
        "mamba_head_dim": 64,
        "mamba_hidden_act": "silu",
        "mamba_num_heads": 128,
        "max_position_embeddings": 4096,
        "mlp_bias": False,
        "mlp_hidden_act": "relu2",
        "moe_intermediate_size": 7688,
        "moe_shared_expert_intermediate_size": 7688,
        "n_groups": 8,
        "n_routed_experts": 8,
        "norm_topk_prob": True,
        "n_group": 1,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
        "routed_scaling_factor": 1.0,
        "ssm_state_size": 128,
        "tie_word_embeddings": False,
        "topk_group": 1,
    },
    keys={
        "mamba_conv_bias": "use_conv_bias",
        "mamba_d_conv": "conv_kernel",
        "mamba_d_head": "mamba_head_dim",
        "mamba_d_state": "ssm_state_size",
        "mamba_n_groups": "n_groups",
        "mamba_n_heads": "mamba_num_heads",
    },
    qkv_bias=False,
    output_bias=False,
    mlp_bias="mlp_bias",
    windows="none",
    rotated="typed",
    scan="mixed",
    names=TensorNames(
        embedding="backbone.embeddings",
        final_norm="backbone.norm_f",
        head="lm_head",
        attention_norm=f"{_LAYER}.norm",
        q=f"{_MIXER}.q_proj",
        k=f"{_MIXER}.k_proj",
        v=f"{_MIXER}.v_proj",
        o=f"{_MIXER}.o_proj",
        mlp_norm=f"{_LAYER}.norm",
        gate=None,
        up=f"{_MIXER}.up_proj",
        down=f"{_MIXER}.down_proj",
        router=f"{_MIXER}.gate",
        selection_bias=f"{_MIXER}.gate.e_score_correction_bias",
        expert_up=f"{_EXPERT}.up_proj",
        expert_down=f"{_EXPERT}.down_proj",
        shared_up=f"{_MIXER}.shared_experts.up_proj",
        shared_down=f"{_MIXER}.shared_experts.down_proj",
        scan_z=f"{_MIXER}.z_proj",
        scan_x=f"{_MIXER}.xbc_proj",
        scan_steps=f"{_MIXER}.dt_proj",
        scan_bias=f"{_MIXER}.dt_bias",
        scan_rates=f"{_MIXER}.A_log",
        scan_skips=f"{_MIXER}.D",
        scan_taps=f"{_MIXER}.conv1d",
        scan_norm=f"{_MIXER}.norm",
        scan_out=f"{_MIXER}.out_proj",
    ),
    norm_eps="layer_norm_epsilon",
    activation="mlp_hidden_act",
    experts=ExpertRules(
        count=("n_routed_experts",),
        layers="typed",
        score="sigmoid",
        normalise="norm_topk_prob",
        scale="routed_scaling_factor",
        grouped=True,
        shared="moe_shared_expert_intermediate_size",
        selection_bias=True,
    ),
    fixed={
        "attention_bias": (False,),
        "expand": tuple(range(65)),  # (whatever it is, heads say how wide they are)
        "moe_latent_size": (None,),
        "n_shared_experts": (1,),
        "sliding_window": (None,),
        "use_bias": (False,),
    },
    layout=Layout(
        fused={f"{_MIXER}.in_proj": (*SCAN, "scan_steps")},
        stacked={
            f"{_MIXER}.experts.up_proj": Stacked(("up",)),
            f"{_MIXER}.experts.down_proj": Stacked(("down",)),
        },
        # (Layers that predict tokens further on.)
        unused=(r"mtp\..*",),
    ),
)
