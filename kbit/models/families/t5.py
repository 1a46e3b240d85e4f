"""T5, and FLAN-T5: RMS norms, no factor on scores, and what is added to them by distance, of block 0 in all blocks.

Version 1.1, and with it FLAN, has a gated MLP and a head of its own; logits are scaled where there is none.
"""

from dataclasses import replace

from kbit.models.family import Family
from kbit.models.layout import Layout
from kbit.models.task_heads import HIDDEN
from kbit.models.tensor_names import TensorNames

_ENCODER, _DECODER = "encoder.block.{layer}.layer", "decoder.block.{layer}.layer"

ENCODER_NAMES = TensorNames(
    embedding="shared",
    final_norm="encoder.final_layer_norm",
    head="lm_head",
    distances="encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    attention_norm=f"{_ENCODER}.0.layer_norm",
    q=f"{_ENCODER}.0.SelfAttention.q",
    k=f"{_ENCODER}.0.SelfAttention.k",
    v=f"{_ENCODER}.0.SelfAttention.v",
    o=f"{_ENCODER}.0.SelfAttention.o",
    mlp_norm=f"{_ENCODER}.1.layer_norm",
    gate=f"{_ENCODER}.1.DenseReluDense.wi_0",
    up=f"{_ENCODER}.1.DenseReluDense.wi_1",
    down=f"{_ENCODER}.1.DenseReluDense.wo",
)

NAMES = TensorNames(
    embedding="shared",
    final_norm="decoder.final_layer_norm",
    head="lm_head",
    copies=("encoder.embed_tokens", "decoder.embed_tokens"),
    distances="decoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    attention_norm=f"{_DECODER}.0.layer_norm",
    q=f"{_DECODER}.0.SelfAttention.q",
    k=f"{_DECODER}.0.SelfAttention.k",
    v=f"{_DECODER}.0.SelfAttention.v",
    o=f"{_DECODER}.0.SelfAttention.o",
    cross_norm=f"{_DECODER}.1.layer_norm",
    cross_q=f"{_DECODER}.1.EncDecAttention.q",
    cross_k=f"{_DECODER}.1.EncDecAttention.k",
    cross_v=f"{_DECODER}.1.EncDecAttention.v",
    cross_o=f"{_DECODER}.1.EncDecAttention.o",
    mlp_norm=f"{_DECODER}.2.layer_norm",
    gate=f"{_DECODER}.2.DenseReluDense.wi_0",
    up=f"{_DECODER}.2.DenseReluDense.wi_1",
    down=f"{_DECODER}.2.DenseReluDense.wo",
)

_KEYS = {"hidden_size": "d_model", "intermediate_size": "d_ff", "num_attention_heads": "num_heads", "head_dim": "d_kv"}

FAMILY = Family(
    model_type="t5",
    architectures=("T5ForConditionalGeneration", "T5WithLMHeadModel"),
    defaults={
        "d_kv": 64,
        "feed_forward_proj": "relu",
        "layer_norm_epsilon": 1e-6,
        # No key of these configurations: distances set no limit, and this one only bounds memory.
        "max_position_embeddings": 16384,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "score_scale": 1.0,  # no key of these configurations
        "tie_word_embeddings": True,
    },
    keys={**_KEYS, "num_hidden_layers": "num_decoder_layers"},
    fallbacks={"num_decoder_layers": "num_layers"},
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    windows="none",
    names=NAMES,
    plain_up=f"{_DECODER}.2.DenseReluDense.wi",
    norm_eps="layer_norm_epsilon",
    activation="feed_forward_proj",
    activations={
        "gated-gelu": "gelu_tanh",
        "gated-gelu_new": "gelu_tanh",
        "gated-relu": "relu",
        "gated-silu": "silu",
    },
    score_scale="score_scale",
    scaled_logits="scale_decoder_outputs",
    distances=("relative_attention_num_buckets", "relative_attention_max_distance"),
    layout=Layout(
        renamed=(("encoder.embed_tokens.", "shared."), ("decoder.embed_tokens.", "shared."), ("lm_head.", "shared.")),
        unused=(r"decoder\.block\.\d+\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    ),
)
FAMILY = replace(
    FAMILY,
    encoder=replace(
        FAMILY,
        keys={**_KEYS, "num_hidden_layers": "num_layers"},
        names=ENCODER_NAMES,
        plain_up=f"{_ENCODER}.1.DenseReluDense.wi",
        mask="bidirectional",
        task=HIDDEN,
    ),
)
