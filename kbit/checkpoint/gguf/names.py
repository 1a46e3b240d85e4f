"""GGUF tensor names and shapes in canonical (Hugging Face) terms, and the row order of Q and K.

Some architectures keep the q_proj and k_proj rows for interleaved RoPE (value pairs 2i, 2i+1 rotate together), where
canonical rows are for rotate-half RoPE (pairs i, i + R/2): llama.cpp's converter permutes those of `llama`, and others
are published so. Within the R rows of a head that rotate, GGUF row 2i + h is canonical row h * R/2 + i (h = 0, 1;
i = 0 .. R/2-1). Which architectures these are, and what else is theirs: `kbit.checkpoint.gguf.architectures`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from kbit.checkpoint.gguf.delta_nets import DeltaTensors
from kbit.checkpoint.gguf.experts import ExpertTensors

if TYPE_CHECKING:
    from kbit.checkpoint.gguf.keys import Keys
    from kbit.checkpoint.gguf.metadata import GGUFHeader, GGUFTensor
    from kbit.checkpoint.gguf.orders import Piece

ROPE_FREQS = "rope_freqs.weight"
ROPE_FACTORS = ("rope_factors_short.weight", "rope_factors_long.weight")

_GLOBAL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

# Norms of a layer, where an architecture says nothing else.
PRE_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
# What several architectures have instead.
NORMS_AROUND = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
MLP_NORM_AFTER_ATTENTION = {"attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}
POST_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
# Of which attention and MLP, side by side, both read what it makes.
ONE_NORM = {"attn_norm": "input_layernorm"}
WINDOW_KEYS = frozenset({"attention.sliding_window_pattern", "rope.freq_base_swa"})
GRANITE_NUMBERS = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
# How hidden states become a vector (`kbit.checkpoint.gguf.vectors`), and linear layers on that.
DENSE_MODULES = ("dense_2.weight", "dense_3.weight")
VECTOR_KEYS = frozenset(
    {"pooling_type", "attention.causal", *(f"dense_{at}_feat_{end}" for at in (2, 3) for end in ("in", "out"))}
)
GELU = "gelu_pytorch_tanh"

_LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.([a-z_]+[0-9]?)\.(weight|bias)")


RMS_EPSILON = ("attention.layer_norm_rms_epsilon", "rms_norm_eps")
LAYER_NORM_EPSILON = ("attention.layer_norm_epsilon", "layer_norm_eps")

QKV = ("attn_q", "attn_k", "attn_v")
ATTENTION_BIASES = (*QKV, "attn_output")
MLP_BIASES = ("ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True)
class LayerSizes:
    """What layers differ in: features of a head, key/value heads, and features inside the MLP, of each layer."""

    head_dims: list[int]
    kv_heads: list[int]
    widths: list[int]


@dataclass(frozen=True)
class Special:
    """What an architecture has that no other one has.

    Attributes:
        sizes: of layers: from the metadata and how many there are.
        absent: the parts that every layer may lack: likewise, and from the tensors by name.
        more: further tensors by name, with their shapes: from metadata, sizes, how many layers there are, and tensors.
        located: the canonical tensors that a tensor holds, each as the part of it that it is, from its name, itself and
            the configuration; None: as of other architectures.
    """

    sizes: Callable[[Keys, int], LayerSizes]
    absent: Callable[[Keys, int, Mapping[str, GGUFTensor]], list[frozenset[str]]]
    more: Callable[[Keys, Dimensions, int, Mapping[str, GGUFTensor]], dict[str, tuple[int, ...]]]
    located: Callable[[str, GGUFTensor, Mapping[str, Any]], list[Piece] | None]


@dataclass(frozen=True)
class Architecture:
    """What differs between the GGUF architectures kbit reads.

    Attributes:
        name: `general.architecture`, also the prefix of its metadata keys.
        model_type: Hugging Face model type.
        hf_class: Hugging Face class name for `architectures`.
        interleaved: whether Q and K rows are stored for interleaved RoPE.
        biases: layer parts that always have a bias (None: the file decides, all or none of each group).
        bias_groups: these groups.
        norms: the norms of a layer, by part, as canonical names.
        qk_norm: norms of queries and keys: of each head, of all together, or none.
        qk_names: their canonical names.
        fused: parts that hold several, in the order of their rows.
        partial: only some features of a head may rotate.
        scaled: RoPE may have factors for short and for long texts (ROPE_FACTORS).
        yarn_log_multiplier: YaRN's mscale is in the file.
        keys: metadata keys beyond the common ones.
        constants: entries of the configuration that no metadata key gives.
        numbers: metadata keys whose numbers are entries of the configuration under another name.
        experts: how its experts are called; None: it has none.
        delta: how its delta nets are stored; None: it has none. What attends between them is gated then.
        qk_optional: there may be no norms of queries and keys.
        sinks: attention has sinks.
        latent: keys and values are made of a latent vector (`kbit.checkpoint.gguf.latent`).
        halves: of these, pairs that turn are half of what turns apart.
        sigmoid: what takes its place where experts are scored by sigmoids: model type, class, and experts.
        layer: where layers are, canonically, before their number.
        outside, linears: canonical names of tensors outside of layers, and of a layer's matrices by part.
        encoder: its tokens see the whole text (`kbit.checkpoint.gguf.encoders`); its norms have biases.
        configure: what else belongs into the configuration.
        epsilon: metadata key of the norms' epsilon, and its entry of the configuration.
        norm_bias: norms have biases.
        own_head: llama.cpp reads no file of it without a head.
        positions: how a token's place is known: by what turns, a table (in `outside`), or slopes of scores.
        layout: the values of tensor_data_layout that it has.
        variant: what it is by the tensors that there are, of one whose files are of several kinds.
        special: what it has that no other architecture has; None: nothing.
        beside: tensors that are no part of the model.
    """

    name: str
    model_type: str
    hf_class: str
    interleaved: bool = False
    biases: tuple[str, ...] | None = ()
    bias_groups: tuple[tuple[str, ...], ...] = (ATTENTION_BIASES, MLP_BIASES)
    norms: Mapping[str, str] = field(default_factory=lambda: PRE_NORMS)
    qk_norm: Literal["head", "whole"] | None = None
    qk_names: tuple[str, str] = ("self_attn.q_norm", "self_attn.k_norm")
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    partial: bool = False
    scaled: bool = False
    yarn_log_multiplier: bool = False
    keys: frozenset[str] = frozenset()
    constants: Mapping[str, Any] = field(default_factory=dict)
    numbers: Mapping[str, str] = field(default_factory=dict)
    experts: ExpertTensors | None = None
    delta: DeltaTensors | None = None
    qk_optional: bool = False
    sinks: bool = False
    latent: bool = False
    halves: bool = False
    sigmoid: tuple[str, str, ExpertTensors] | None = None
    configure: Callable[[Keys, dict[str, Any]], None] | None = None
    epsilon: tuple[str, str] = RMS_EPSILON
    norm_bias: bool = False
    own_head: bool = False
    positions: Literal["turned", "table", "slopes"] = "turned"
    layout: str | None = "Meta AI original pth"
    variant: Callable[[GGUFHeader, Architecture], Architecture] | None = None
    special: Special | None = None
    beside: tuple[str, ...] = ()
    layer: str = "model.layers"
    outside: Mapping[str, str] = field(default_factory=lambda: _GLOBAL)
    linears: Mapping[str, str] = field(default_factory=lambda: _LINEARS)
    encoder: bool = False

    def modules(self) -> dict[str, str]:
        """Canonical names within a layer, by part; fused parts are not among them."""
        found = {**self.linears, **self.norms}
        if self.qk_norm is not None:
            found |= {"attn_q_norm": self.qk_names[0], "attn_k_norm": self.qk_names[1]}
        return found


def with_fused(arch: Architecture, tensors: Mapping[str, object]) -> Architecture:
    """An architecture as a file has it in which queries, keys and values are in one tensor (`--fuse-qkv` of llama.cpp's
    converter, and older files), where the others have three."""
    plain = arch.special is None and not arch.latent and arch.delta is None and not arch.encoder
    if not plain or "attn_qkv" in arch.fused or "blk.0.attn_qkv.weight" not in tensors:
        return arch
    return replace(arch, fused={**arch.fused, "attn_qkv": QKV})


def canonical_names(arch: Architecture, gguf_name: str) -> list[str]:
    """The canonical tensors that a GGUF tensor holds, in the order of its rows; none where its name means nothing."""
    if gguf_name in arch.outside:
        return [arch.outside[gguf_name]]
    match = _BLOCK.fullmatch(gguf_name)
    if match is None:
        return []
    layer, part, kind = match.groups()
    if arch.sinks and part == "attn_sinks":
        return [f"model.layers.{layer}.self_attn.sinks"]
    modules = arch.modules()
    parts = arch.fused.get(part, (part,))
    no_bias = kind == "bias" and not (arch.encoder or arch.norm_bias)
    if any(each not in modules or (no_bias and each.endswith("_norm")) for each in parts):
        return []
    return [f"{arch.layer}.{layer}.{modules[each]}.{kind}" for each in parts]


def part_of(gguf_name: str) -> str:
    """The part of a layer that a tensor is of ("attn_q"), or its name without its ending."""
    return gguf_name.split(".")[-2]


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

    def expected(self, arch: Architecture, layer: int, biases: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
        """Every tensor of one layer by GGUF name, with its shape (outermost dimension first)."""
        kinds = ("weight", "bias") if arch.norm_bias else ("weight",)
        shapes: dict[str, tuple[int, ...]] = {
            f"blk.{layer}.{part}.{kind}": (self.hidden,) for part in arch.norms for kind in kinds
        }
        if arch.qk_norm is not None:
            for part, heads in (("attn_q_norm", self.heads), ("attn_k_norm", self.kv_heads)):
                width = self.head_dim * (heads if arch.qk_norm == "whole" else 1)
                shapes[f"blk.{layer}.{part}.weight"] = (width,)
        if arch.sinks:
            shapes[f"blk.{layer}.attn_sinks.weight"] = (self.heads,)
        linears = {part: shape for part, shape in self.layer_shapes().items() if part in arch.linears}
        for whole, parts in arch.fused.items():
            rows, columns = sum(linears[part][0] for part in parts), linears[parts[0]][1]
            for part in parts:
                del linears[part]
            linears[whole] = (rows, columns)
        for part, shape in linears.items():
            shapes[f"blk.{layer}.{part}.weight"] = shape
            if arch.fused.get(part, (part,))[0] in biases:
                shapes[f"blk.{layer}.{part}.bias"] = shape[:1]
        return shapes

    def expected_global(self, arch: Architecture, tied: bool, context: int) -> dict[str, tuple[int, ...]]:
        """The tensors outside the layers by GGUF name, with their shapes.

        Args:
            arch: the model's.
            tied: there is no head.
            context: rows of a table of positions.
        """
        matrices = {"token_embd.weight": self.vocab, "output.weight": self.vocab, "position_embd.weight": context}
        shapes: dict[str, tuple[int, ...]] = {}
        for name in arch.outside:
            if name in matrices:
                shapes[name] = (matrices[name], self.hidden)
            else:
                shapes[name] = (self.vocab if name == "output.bias" else self.hidden,)
        if tied:
            shapes.pop("output.weight")
        return shapes
