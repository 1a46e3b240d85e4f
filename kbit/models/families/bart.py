"""BART: norms after every sum, a table of positions that begins at its third row, and a norm of the embedding.

`stack_names` and `both` are what mBART, M2M-100, Pegasus and Marian are made of, too.
"""

from dataclasses import replace

from kbit.models.family import Family
from kbit.models.layout import Layout
from kbit.models.task_heads import HIDDEN
from kbit.models.tensor_names import TensorNames

_SHARED = "model.shared"


def stack_names(stack: str, *, norms_first: bool, embedding_norm: bool) -> TensorNames:
    """The tensors of the encoder or the decoder.

    Args:
        stack: "encoder" or "decoder".
        norms_first: norms stand before blocks, and one at the end; else after each sum.
        embedding_norm: the embedding has one, too.
    """
    at, layer, cross = f"model.{stack}", f"model.{stack}.layers.{{layer}}", stack == "decoder"
    norms = {
        "attention": f"{layer}.self_attn_layer_norm",
        "cross": f"{layer}.encoder_attn_layer_norm" if cross else None,
        "mlp": f"{layer}.final_layer_norm",
    }
    place = "norm" if norms_first else "sum_norm"
    return TensorNames(
        embedding=_SHARED,
        copies=("model.encoder.embed_tokens", "model.decoder.embed_tokens"),
        positions=f"{at}.embed_positions",
        embedding_norm=f"{at}.layernorm_embedding" if embedding_norm else None,
        final_norm=f"{at}.layer_norm" if norms_first else None,
        head="lm_head",
        logit_bias="final_logits_bias",
        q=f"{layer}.self_attn.q_proj",
        k=f"{layer}.self_attn.k_proj",
        v=f"{layer}.self_attn.v_proj",
        o=f"{layer}.self_attn.out_proj",
        cross_q=f"{layer}.encoder_attn.q_proj" if cross else None,
        cross_k=f"{layer}.encoder_attn.k_proj" if cross else None,
        cross_v=f"{layer}.encoder_attn.v_proj" if cross else None,
        cross_o=f"{layer}.encoder_attn.out_proj" if cross else None,
        gate=None,
        up=f"{layer}.fc1",
        down=f"{layer}.fc2",
        **{f"{block}_{place}": name for block, name in norms.items()},
    )


def both(family: Family, *, norms_first: bool, embedding_norm: bool) -> Family:
    """The family of both stacks, of what they have in common."""
    encoder, decoder = (
        stack_names(stack, norms_first=norms_first, embedding_norm=embedding_norm) for stack in ("encoder", "decoder")
    )
    keys = {
        stack: {
            "hidden_size": "d_model",
            "intermediate_size": f"{stack}_ffn_dim",
            "num_attention_heads": f"{stack}_attention_heads",
            "num_hidden_layers": f"{stack}_layers",
        }
        for stack in ("encoder", "decoder")
    }
    family = replace(family, names=decoder, keys=keys["decoder"])
    return replace(
        family, encoder=replace(family, names=encoder, keys=keys["encoder"], mask="bidirectional", task=HIDDEN)
    )


STACK = Family(
    model_type="bart",
    architectures=("BartForConditionalGeneration", "BartModel"),
    defaults={
        "activation_function": "gelu",
        "layer_norm_eps": 1e-5,  # no key of these configurations
        "max_position_embeddings": 1024,
        "pad_token_id": 1,
        "scale_embedding": False,
        "tie_word_embeddings": True,
    },
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    windows="none",
    names=stack_names("decoder", norms_first=False, embedding_norm=True),
    norm="layer",
    norm_bias=True,
    norm_eps="layer_norm_eps",
    activation="activation_function",
    scaled_embedding="scale_embedding",
    first_position=2,
    extra_positions=2,
    # The keys and values of the encoder's text and the decoder's own have one size.
    equal=(("encoder_attention_heads", "decoder_attention_heads"),),
    fixed={"normalize_before": (False,)},
    layout=Layout(
        prefix="model.",
        renamed=(
            ("model.encoder.embed_tokens.", f"{_SHARED}."),
            ("model.decoder.embed_tokens.", f"{_SHARED}."),
            ("lm_head.", f"{_SHARED}."),
        ),
        unused=(r"(encoder|decoder)\.version",),
    ),
)
FAMILY = both(STACK, norms_first=False, embedding_norm=True)
