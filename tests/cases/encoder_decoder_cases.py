"""Tiny random encoder-decoders as transformers saves them, and what transformers makes of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from encoder_cases import assert_near as assert_near
from numpy.typing import NDArray

from kbit.backends.cpu.backend import NativeBackend
from kbit.graph.backend import Backend
from kbit.models.encoder_decoder import EncoderDecoder, load_encoder_decoder
from kbit.models.opening import open_model

VOCABULARY = 99
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 37,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 29,
    "max_position_embeddings": 310,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_MARIAN = {**_BART, "pad_token_id": 98, "eos_token_id": 0, "bos_token_id": None, "decoder_start_token_id": 98}

# By name: prefix of transformers' classes, and what the configuration has of its own.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5", _T5),
    "flan-t5": ("T5", {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": ("MT5", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "umt5": ("UMT5", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "marian": ("Marian", {**_MARIAN, "activation_function": "swish", "scale_embedding": True}),
    "marian-two": ("Marian", {**_MARIAN, "decoder_vocab_size": 99, "share_encoder_decoder_embeddings": False}),
    "bart": ("Bart", {**_BART, "forced_eos_token_id": 2}),
    "mbart": ("MBart", {**_BART, "scale_embedding": True, "activation_function": "relu"}),
    "m2m_100": ("M2M100", {**_BART, "scale_embedding": True, "activation_function": "relu"}),
    "pegasus": ("Pegasus", {**_BART, "pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 1}),
}
# Those whose head is a matrix of its own though the configuration cannot say so (`_untied`).
_UNTIED = ("flan-t5", "mt5")


def model_of(name: str, seed: int = 0, **changes: Any) -> Any:
    """One of MODELS with weights that make differences large."""
    return made(*MODELS[name], seed=seed, untied=name in _UNTIED, **changes)


def made(prefix: str, values: dict[str, Any], *, seed: int, untied: bool = False, **changes: Any) -> Any:
    """A model of transformers' classes of this name: norms and biases are random, too; computed tables are not."""
    config = getattr(transformers, f"{prefix}Config")(**{**values, "init_std": 0.3, **changes})
    torch.manual_seed(seed)
    kind = "MarianMTModel" if prefix == "Marian" else f"{prefix}ForConditionalGeneration"
    model = getattr(transformers, kind)(config).eval()
    if untied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
    return model


def saved(model: Any, folder: Path) -> Path:
    """The model in a folder; where its head is its own, config.json says so, as in published folders."""
    model.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if config["model_type"] in ("t5", "mt5") and model.lm_head.weight is not model.shared.weight:
        config["tie_word_embeddings"] = False
        config.pop("scale_decoder_outputs", None)
        path.write_text(json.dumps(config))
    return folder


def native(kv: str = "fp32") -> NativeBackend:
    return NativeBackend(2, compute="fp32", kv=kv)


def loaded(folder: Path, backend: Backend | None = None) -> EncoderDecoder:
    with open_model(str(folder)) as source:
        return load_encoder_decoder(source, backend or native())


def ids_of(*lengths: int, seed: int = 4) -> list[list[int]]:
    """Token ids without special ones."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 95, (length,), generator=generator).tolist() for length in lengths]


def theirs(model: Any, source: Sequence[int], text: Sequence[int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What transformers makes of a source and a whole text: the encoder's states (S, hidden) and logits (T, V)."""
    with torch.no_grad():
        out = model(torch.tensor([source]), decoder_input_ids=torch.tensor([text]))
    return out.encoder_last_hidden_state[0].numpy(), out.logits[0].numpy()


def generated(model: Any, sources: Sequence[Sequence[int]], **settings: Any) -> list[list[int]]:
    """What transformers generates of each source by itself, without what it fills up with."""
    found = []
    for source in sources:
        with torch.no_grad():
            ids = model.generate(torch.tensor([source]), attention_mask=torch.ones(1, len(source)), **settings)[0]
        found.append(ids.tolist())
    return found


WORDS = ["the", "cat", "sat", "on", "mat", "a", "dog", "ran", "far", "away", "translate", "summarize", ":", "."]


def save_tokenizer(
    folder: Path, special: Sequence[str], *, end: str = "</s>", languages: Sequence[str] = (), **settings: Any
) -> None:
    """A tokenizer of few words that puts `end` behind a text; special tokens have the first ids, languages the last."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    texts = [*special, *(f"\u2581{word}" for word in WORDS)]
    texts += [f"\u2581w{index}" for index in range(VOCABULARY - len(texts) - len(languages))] + list(languages)
    made = Tokenizer(models.Unigram([(text, -1.0) for text in texts], special.index("<unk>"), byte_fallback=False))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, texts.index(end))])
    made.add_special_tokens([*special, *languages])
    made.save(str(folder / "tokenizer.json"))
    named = {"eos_token": end, "unk_token": "<unk>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named, **settings})
    )
