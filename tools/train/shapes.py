"""Sizes of the models of a family, by name or as HIDDENxINTERMEDIATExLAYERS."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from kbit.host.errors import UsageError


@dataclass(frozen=True)
class Shape:
    """A Llama-style decoder: RMS norm, rotary positions, SwiGLU, tied embeddings, no biases, as many KV heads as heads.

    Attributes:
        name: as in the folder's name.
        hidden: width of the residual stream; a multiple of 32.
        intermediate: width of the MLP.
        layers: decoder layers.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int

    @property
    def head_dim(self) -> int:
        """64 where the width divides by it, as in the models people run; 32 otherwise."""
        return 64 if self.hidden % 64 == 0 else 32

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.hidden // self.head_dim

    @property
    def non_embedding_parameters(self) -> int:
        """Everything but the embedding: matrices and norms."""
        layer = 4 * self.hidden**2 + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.layers * layer + self.hidden

    def config(self, vocabulary: int, context: int, eos_id: int) -> dict[str, Any]:
        """config.json of the exported folder."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": context,
            "rms_norm_eps": RMS_NORM_EPS,
            "rope_theta": ROPE_THETA,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": eos_id,
            "eos_token_id": eos_id,
            "torch_dtype": "float16",
        }


RMS_NORM_EPS = 1e-5
ROPE_THETA = 10000.0

# Named by parameters outside the embedding, roughly. 0.7m, 2m and 5m are the shapes of the novels-* models that kbit is
# measured on; the others fill the gaps and go on. Every row length is a multiple of 128, so blocks of 64 and of 128
# weights are whole.
PRESETS = {
    shape.name: shape
    for shape in (
        Shape("0.25m", 128, 128, 2),
        Shape("0.3m", 128, 256, 2),
        Shape("0.7m", 128, 256, 4),
        Shape("1.3m", 256, 512, 2),
        Shape("2m", 256, 512, 3),
        Shape("5m", 256, 768, 6),
        Shape("11m", 384, 1024, 6),
        Shape("25m", 512, 1408, 8),
        Shape("57m", 768, 2048, 8),
    )
}


def parse_size(text: str) -> Shape:
    """A preset by name, or "256x512x3".

    Raises:
        UsageError: neither, or a shape that cannot be built.
    """
    if text in PRESETS:
        return PRESETS[text]
    match = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})x([0-9]{1,4})", text)
    if match is None:
        known = ", ".join(PRESETS)
        raise UsageError(f"size {text!r}: use one of {known}, or HIDDENxINTERMEDIATExLAYERS such as 256x512x3")
    hidden, intermediate, layers = (int(part) for part in match.groups())
    if hidden == 0 or hidden % 32 or intermediate == 0 or intermediate % 16 or layers == 0:
        raise UsageError(
            f"size {text!r}: the hidden width must be a multiple of 32 (a head has 64 or 32 features), the "
            "intermediate width of 16 (kbit's smallest block), and there must be at least one layer"
        )
    return Shape(text, hidden, intermediate, layers)
