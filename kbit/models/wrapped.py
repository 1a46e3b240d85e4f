"""The language model inside a checkpoint of several kinds of input: Gemma 3 from 4B on, Gemma 4, Mistral 3, Qwen3.5.

Such a checkpoint describes its parts in objects of its configuration (`text_config`), and keeps each under a prefix.
Text alone runs through the language model as if there were nothing else, so that is what is read; the tensors of the
other parts, which are for pictures and sound, are left out.
"""

from __future__ import annotations

import re

from kbit.checkpoint.source import CheckpointSource, StoredSource
from kbit.host.errors import CheckpointError
from kbit.host.notes import note
from kbit.models.renamed import RenamedSource

# Kinds of model whose language model computes the same with and without the rest, and what kind that is if the
# configuration does not say.
_WRAPPERS = {"gemma3": "gemma3_text", "gemma4": "gemma4_text", "mistral3": "mistral", "llava": "llama"}
_WRAPPERS |= {
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "kimi_k25": "deepseek_v3",
    "llama4": "llama4_text",
}
# What the configuration of the whole says of its language model, where that one's own does not.
_INHERITED = ("dtype", "torch_dtype", "quantization_config", "tie_word_embeddings")
# Prefixes of the language model before transformers 4.52 and since, and what they stand for.
_LANGUAGE = (
    # (As transformers 5.23 writes Kimi K2.5, by a rule that is meant for what sees.)
    (re.compile(r"^(model\.)?language_model\.(model\.)?blocks\."), "model.layers."),
    (re.compile(r"^language_model\.(model|lm_head)\."), r"\1."),
    (re.compile(r"^model\.language_model\."), "model."),
)
_OTHER_PARTS = re.compile(
    r"^(model\.)?(vision_tower|vision_model|mm_projector|visual|multi_modal_projector|image_newline|audio_tower|embed_vision|embed_audio)(\.|$)"
)


def unwrapped(source: CheckpointSource) -> CheckpointSource:
    """The language model of a checkpoint that has other parts, or the checkpoint itself where it has none.

    Raises:
        CheckpointError: `text_config` is no object.
    """
    kind = source.config.get("model_type")
    if not isinstance(kind, str) or kind not in _WRAPPERS or not isinstance(source, StoredSource):
        return source
    text = source.config.get("text_config", {})
    if not isinstance(text, dict):
        raise CheckpointError(f"config of {source.path}: text_config should be an object that describes the text model")
    inherited = {key: source.config[key] for key in _INHERITED if key in source.config}
    config = {"model_type": _WRAPPERS[kind], **inherited, **text}
    config.pop("architectures", None)  # an entry for the class of the whole would not fit, and model_type says enough
    names = {_name(name): name for name in source.tensors if not _OTHER_PARTS.match(name)}
    if not any(name.startswith("lm_head.") for name in names):
        # The whole and its language model may disagree (Mistral 3), and the whole's word was what counted.
        config["tie_word_embeddings"] = True
    left_out = sum(_OTHER_PARTS.match(name) is not None for name in source.tensors)
    if left_out:
        note(f"{source.path}: the language model is used; {left_out} tensors for pictures and sound are left out")
    return RenamedSource(source, names, config)


def _name(stored: str) -> str:
    for pattern, plain in _LANGUAGE:
        if pattern.match(stored):
            return pattern.sub(plain, stored)
    return stored
