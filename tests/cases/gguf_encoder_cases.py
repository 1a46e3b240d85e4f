"""Tiny encoders and T5s as kbit exports them to GGUF, with tokenizers, and what transformers makes of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import encoder_cases
import encoder_decoder_cases
import numpy as np
import numpy.typing as npt
import torch
from piece_cases import save_t5

# Case: prefix of transformers' classes, and what is changed, so that llama.cpp computes the same.
_T5 = {"relative_attention_max_distance": 128, "n_positions": 64, "vocab_size": 160}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", _T5),
    "flan-t5": ("flan-t5", _T5),
    "mt5": ("mt5", _T5),
    "umt5": ("umt5", _T5),
    "bert": ("Bert", {}),
    "nomic-bert": ("NomicBert", {}),
    "modern-bert": ("ModernBert", {"norm_bias": False, "local_attention": 8}),
    "embedding-gemma": ("Gemma3Text", {"query_pre_attn_scalar": 16, "sliding_window": 10}),
}


def writes(case: str) -> bool:
    """Whether it is an encoder-decoder."""
    return "t5" in case


def saved(case: str, folder: Path, **more: Any) -> Any:
    """A case in a folder, with more changes; transformers' model."""
    name, changes = CASES[case][0], {**CASES[case][1], **more}
    if writes(case):
        model = encoder_decoder_cases.model_of(name, **changes)
        encoder_decoder_cases.saved(model, folder)
        save_t5(folder)
    else:
        model = encoder_cases.model_of(name, **changes)
        encoder_cases.saved(model, folder, tokenizer="bert" in case)
    return model


def texts_of(case: str) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of texts, and what a decoder has written of each."""
    texts = encoder_cases.ids_of(7, 1, 60)
    return texts, [[0, *each[:5]] for each in texts] if writes(case) else []


def values_of(model: Any, texts: list[list[int]], written: list[list[int]]) -> list[npt.NDArray[np.float32]]:
    """Hidden states of every text, or logits after what is written of it."""
    if not written:
        return [encoder_cases.states_of(model, ids) for ids in texts]
    found = []
    with torch.no_grad():
        for ids, after in zip(texts, written, strict=True):
            found.append(model(torch.tensor([ids]), decoder_input_ids=torch.tensor([after])).logits[0, -1].numpy())
    return found
