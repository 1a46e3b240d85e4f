"""Marian (OPUS-MT): BART without a norm of the embedding, computed positions, perhaps a vocabulary for each side."""

from dataclasses import replace

from kbit.models.families.bart import STACK, both

_COMMON = both(
    replace(
        STACK,
        model_type="marian",
        architectures=("MarianMTModel", "MarianModel"),
        defaults={**STACK.defaults, "pad_token_id": 58100, "share_encoder_decoder_embeddings": True},
        fallbacks={"decoder_vocab_size": "vocab_size"},
        shared=("share_encoder_decoder_embeddings", STACK.names.embedding),
        sinusoids="marian",
        first_position=0,
        extra_positions=0,
    ),
    norms_first=False,
    embedding_norm=False,
)
assert _COMMON.encoder is not None

FAMILY = replace(
    _COMMON,
    keys={**_COMMON.keys, "vocab_size": "decoder_vocab_size"},
    names=replace(_COMMON.names, embedding="model.decoder.embed_tokens"),
    encoder=replace(_COMMON.encoder, names=replace(_COMMON.encoder.names, embedding="model.encoder.embed_tokens")),
)
