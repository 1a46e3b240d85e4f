"""A tiny random Whisper as transformers saves it, with windows of two seconds, and sounds to hear."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from encoder_decoder_cases import VOCABULARY, made, save_tokenizer
from numpy.typing import NDArray

Floats = NDArray[np.float32]

BINS, POSITIONS, SECONDS = 20, 100, 2
FRAMES = 2 * POSITIONS
# Words have the ids below that of the end; a timestamp follows another in steps of 0.02 seconds.
END, START, ENGLISH, GERMAN, TRANSCRIBE, TRANSLATE, NO_TIMES, FIRST_TIME = range(90, 98)
WORDS = 90
SIZE = FIRST_TIME + POSITIONS + 1

_IDS = {"pad_token_id": END, "bos_token_id": END, "eos_token_id": END, "decoder_start_token_id": START}
CONFIG = {
    "vocab_size": SIZE,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 29,
    "max_source_positions": POSITIONS,
    "max_target_positions": 80,
    "num_mel_bins": BINS,
    "begin_suppress_tokens": None,
    **_IDS,
}
GENERATION = {
    **_IDS,
    "max_length": 80,  # (of less transformers makes more with every window)
    "no_timestamps_token_id": NO_TIMES,
    "max_initial_timestamp_index": 50,
    "suppress_tokens": [3, 7, START, TRANSCRIBE, TRANSLATE],
    "begin_suppress_tokens": [5, END],
    "is_multilingual": True,
    "lang_to_id": {"<|en|>": ENGLISH, "<|de|>": GERMAN},
    "task_to_id": {"transcribe": TRANSCRIBE, "translate": TRANSLATE},
}


def whisper(seed: int = 0, **changes: Any) -> Any:
    """A model with weights that make differences large."""
    return made("Whisper", CONFIG, seed=seed, **changes)


def saved_whisper(model: Any, folder: Path, generation: dict[str, Any] | None = None) -> Path:
    """The model in a folder, with a tokenizer of words alone, and what is said of how it generates."""
    from transformers import GenerationConfig

    generation = GENERATION if generation is None else generation
    model.generation_config = GenerationConfig(**generation)
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"feature_size": BINS, "chunk_length": SECONDS, "sampling_rate": 16000, "n_fft": 400})
    )
    save_tokenizer(folder, ["<pad>", "</s>", "<unk>"])
    return folder


def features(*lengths: int, seed: int = 3) -> list[Floats]:
    """Random frames (T, BINS)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, BINS, generator=generator).numpy() for length in lengths]


def sound(seconds: float, seed: int = 5) -> Floats:
    """A tone that glides, with noise that comes and goes."""
    count = int(16_000 * seconds)
    times, draws = np.arange(count) / 16_000, np.random.default_rng(seed)
    noise = draws.standard_normal(count) * (0.5 + 0.5 * np.sin(3.1 * times))
    return (0.4 * np.sin(2 * np.pi * (300 + 150 * times) * times) + 0.1 * noise).astype(np.float32)


def theirs(model: Any, frames: Floats, text: Sequence[int]) -> tuple[Floats, Floats]:
    """What transformers makes of frames and a whole text: the encoder's states (T / 2, hidden) and logits (T, V)."""
    with torch.no_grad():
        out = model(torch.from_numpy(frames.T[None]), decoder_input_ids=torch.tensor([list(text)]))
    return out.encoder_last_hidden_state[0].numpy(), out.logits[0].numpy()


assert SIZE > VOCABULARY
