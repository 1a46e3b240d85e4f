"""GGUF tensor names and shapes in Hugging Face terms, and the row order of Q and K.

llama.cpp's converter stores the q_proj and k_proj rows of the architecture `llama` for interleaved RoPE (value
pairs 2i, 2i+1 rotate together), Hugging Face for rotate-half RoPE (pairs i, i + D/2). Within each head of D rows,
GGUF row 2i + h holds Hugging Face row h * D/2 + i (h = 0, 1; i = 0 .. D/2-1). `qwen2` rows keep their order.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

ROPE_FREQS = "rope_freqs.weight"

_GLOBAL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.([a-z_]+)\.(weight|bias)")

ATTENTION_BIASES = ("attn_q", "attn_k", "attn_v", "attn_output")
MLP_BIASES = ("ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True)
class Architecture:
    """What differs between the GGUF architectures kbit reads.

    Attributes:
        name: `general.architecture`, also the prefix of its metadata keys.
        model_type: Hugging Face model type.
        hf_class: Hugging Face class name for `architectures`.
        interleaved: whether Q and K rows are stored for interleaved RoPE.
        biases: layer parts that always have a bias (None: the file decides, all or none of each group).
    """

    name: str
    model_type: str
    hf_class: str
    interleaved: bool
    biases: tuple[str, ...] | None


ARCHITECTURES = {
    "llama": Architecture("llama", "llama", "LlamaForCausalLM", True, None),
    "qwen2": Architecture("qwen2", "qwen2", "Qwen2ForCausalLM", False, ("attn_q", "attn_k", "attn_v")),
}


def hf_name(gguf_name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor, or None when the name means nothing in these architectures."""
    if gguf_name in _GLOBAL:
        return _GLOBAL[gguf_name]
    match = _BLOCK.fullmatch(gguf_name)
    if match is None:
        return None
    layer, part, kind = match.groups()
    if part not in _LAYER or (kind == "bias" and part.endswith("_norm")):
        return None
    return f"model.layers.{layer}.{_LAYER[part]}.{kind}"


def layer_of(gguf_name: str) -> int | None:
    """The layer number in `blk.N.…`, or None."""
    match = _BLOCK.fullmatch(gguf_name)
    return None if match is None else int(match.group(1))


@dataclass(frozen=True)
class Dimensions:
    """The sizes that fix every tensor's shape: hidden (D), mlp (F), heads (H), kv_heads, head_dim, vocab (V)."""

    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    def layer_shapes(self) -> dict[str, tuple[int, int]]:
        """Shape (out, in) of each linear layer's weight by GGUF part name."""
        q_rows, kv_rows = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "attn_q": (q_rows, self.hidden),
            "attn_k": (kv_rows, self.hidden),
            "attn_v": (kv_rows, self.hidden),
            "attn_output": (self.hidden, q_rows),
            "ffn_gate": (self.mlp, self.hidden),
            "ffn_up": (self.mlp, self.hidden),
            "ffn_down": (self.hidden, self.mlp),
        }

    def expected(self, layer: int, biases: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
        """Every tensor of one layer by GGUF name, with its shape (outermost dimension first)."""
        shapes: dict[str, tuple[int, ...]] = {}
        for part in ("attn_norm", "ffn_norm"):
            shapes[f"blk.{layer}.{part}.weight"] = (self.hidden,)
        for part, shape in self.layer_shapes().items():
            shapes[f"blk.{layer}.{part}.weight"] = shape
            if part in biases:
                shapes[f"blk.{layer}.{part}.bias"] = shape[:1]
        return shapes

    def expected_global(self, tied: bool) -> dict[str, tuple[int, ...]]:
        """The tensors outside the layers by GGUF name, with their shapes."""
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (self.vocab, self.hidden),
            "output_norm.weight": (self.hidden,),
        }
        if not tied:
            shapes["output.weight"] = (self.vocab, self.hidden)
        return shapes
