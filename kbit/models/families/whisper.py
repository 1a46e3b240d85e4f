"""Whisper: BART with norms first, keys without a bias, and sound in place of the text that is read."""

from dataclasses import replace

from kbit.models.families.bart import STACK, both
from kbit.models.layout import Layout

_EMBEDDING = "model.decoder.embed_tokens"

_COMMON = both(
    replace(
        STACK,
        model_type="whisper",
        architectures=("WhisperForConditionalGeneration", "WhisperModel"),
        defaults={
            **STACK.defaults,
            "max_source_positions": 1500,
            "max_target_positions": 448,
            "num_mel_bins": 80,
        },
        scaled_embedding=None,
        first_position=0,
        extra_positions=0,
        key_bias=False,
        # (Read, and then used for nothing.)
        ignored=("scale_embedding",),
        fixed={},
        layout=Layout(
            prefix="model.",
            flattened=("sound_first", "sound_second"),
        ),
    ),
    norms_first=True,
    embedding_norm=False,
)
assert _COMMON.encoder is not None

_NAMES = replace(_COMMON.names, embedding=_EMBEDDING, copies=(), head="proj_out", logit_bias=None)

FAMILY = replace(
    _COMMON,
    names=_NAMES,
    keys={**_COMMON.keys, "max_position_embeddings": "max_target_positions"},
    encoder=replace(
        _COMMON.encoder,
        names=replace(
            _COMMON.encoder.names,
            embedding=_EMBEDDING,
            copies=(),
            head="proj_out",
            logit_bias=None,
            sound_first="model.encoder.conv1",
            sound_second="model.encoder.conv2",
        ),
        keys={**_COMMON.encoder.keys, "max_position_embeddings": "max_source_positions"},
        sound="num_mel_bins",
    ),
)
