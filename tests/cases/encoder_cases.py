"""Tiny random encoders as transformers saves them, a tokenizer for them, and what transformers makes of both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 37,
    "max_position_embeddings": 310,
}
_DISTIL = {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 37, "max_position_embeddings": 310}
_ENDS = {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
_GROUPED = {"head_dim": 16, "num_key_value_heads": 1}

# Prefix of transformers' classes, and what its configuration has of its own.
FAMILIES: dict[str, dict[str, Any]] = {
    "Bert": SIZES,
    "Roberta": {**SIZES, "type_vocab_size": 1},
    "XLMRoberta": {**SIZES, "type_vocab_size": 1},
    "Camembert": {**SIZES, "type_vocab_size": 1},
    "DistilBert": _DISTIL,
    "MPNet": SIZES,
    "ModernBert": {**SIZES, **_ENDS, "num_hidden_layers": 4, "local_attention": 9, "norm_bias": True},
    "NomicBert": SIZES,
}
# Decoders whose hidden states are embeddings: windows to both sides (EmbeddingGemma), and causal (Qwen3-Embedding).
DECODERS: dict[str, dict[str, Any]] = {
    "Gemma3Text": {
        **SIZES,
        **_GROUPED,
        "use_bidirectional_attention": True,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "Qwen3": {**SIZES, **_GROUPED},
}
MODELS = [*FAMILIES, *DECODERS]

# Words of the tokenizer below.
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["the", "cat", "sat", "on", "mat", "a", "dog", "ran", "far", "away", "who", "where", "?", ".", "##s", "##ly"]


def model_of(family: str, head: str = "Model", seed: int = 0, **changes: Any) -> Any:
    """A model with weights that make differences large: norms and biases are random, too."""
    values = {**(FAMILIES | DECODERS)[family], "initializer_range": 0.3, **changes}
    config = getattr(transformers, f"{family}Config")(**values)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}{head}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def saved(model: Any, folder: Path, *, tokenizer: bool = True) -> Path:
    """The model in a folder, with the tokenizer."""
    model.save_pretrained(folder)
    if tokenizer:
        save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path, size: int = SIZES["vocab_size"], *, types: bool = True) -> None:
    """A WordPiece tokenizer of few words, which puts [CLS] and [SEP] around texts and pairs; types: the model takes
    token types."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    letters = [chr(ord("a") + i) for i in range(26)]
    words = [*SPECIAL, *WORDS, *(w for w in [*letters, *(f"##{x}" for x in letters)] if w not in WORDS)]
    words += [f"[unused{i}]" for i in range(size - len(words))]
    made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words[:size])}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    made.add_special_tokens(SPECIAL)
    made.save(str(folder / "tokenizer.json"))
    named = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    if types:
        about["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


def ids_of(*lengths: int, seed: int = 4) -> list[list[int]]:
    """Token ids without special ones."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 99, (length,), generator=generator).tolist() for length in lengths]


def states_of(model: Any, ids: Sequence[int], types: Sequence[int] | None = None) -> NDArray[np.float32]:
    """Last hidden states (T, hidden) of a headless model."""
    more = {} if types is None else {"token_type_ids": torch.tensor([types])}
    with torch.no_grad():
        found: NDArray[np.float32] = model(torch.tensor([ids]), **more).last_hidden_state[0].numpy()
    return found


def assert_near(found: Any, wanted: Any, relative: float = 1e-4) -> None:
    """Equal but for the order of float32 sums.

    A pass rounds sums of at most K = 310 terms, whose errors grow with K^(1/2) eps = 1e-6 of what is summed, in some
    ten blocks one after another: 1e-5; the scale of the weights here makes an error grow at most tenfold on the way.
    """
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.shape == wanted.shape
    assert float(np.abs(found - wanted).max()) <= relative * float(np.abs(wanted).max())
