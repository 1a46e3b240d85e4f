"""GGUF files of encoders: BERT (MiniLM, BGE, E5, GTE), Nomic BERT and ModernBERT, as llama.cpp's converter writes them.

They hold what embeddings need: no pooler and no head, but how hidden states become a vector (`pooling_type`). Not in a
file, only in llama.cpp's code: the activation, that heads are the hidden size shared out, and that a norm follows sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kbit.checkpoint.gguf.keys import Keys
from kbit.checkpoint.gguf.metadata import GGUFHeader, GGUFTensor
from kbit.checkpoint.gguf.names import WINDOW_KEYS, Architecture
from kbit.checkpoint.gguf.tensor_table import check_tensors
from kbit.checkpoint.gguf.vectors import POOLINGS
from kbit.checkpoint.source import CANONICAL
from kbit.host.errors import CheckpointError, UnsupportedError

_EMBEDDING_NORM = "token_embd_norm"
_OUTSIDE = {
    "token_embd.weight": "embeddings.word_embeddings.weight",
    "token_types.weight": "embeddings.token_type_embeddings.weight",
}
_QKV = ("attn_q", "attn_k", "attn_v")
_RANK = 4

ENCODERS = {
    architecture.name: architecture
    for architecture in (
        Architecture(
            "bert",
            "bert",
            "BertModel",
            biases=None,
            norms={"attn_output_norm": "attention.output.LayerNorm", "layer_output_norm": "output.LayerNorm"},
            keys=frozenset({"attention.causal", "attention.layer_norm_epsilon", "pooling_type"}),
            constants={"hidden_act": "gelu"},
            layer="encoder.layer",
            outside={
                **_OUTSIDE,
                "position_embd.weight": "embeddings.position_embeddings.weight",
                f"{_EMBEDDING_NORM}.weight": "embeddings.LayerNorm.weight",
                f"{_EMBEDDING_NORM}.bias": "embeddings.LayerNorm.bias",
            },
            linears={
                "attn_q": "attention.self.query",
                "attn_k": "attention.self.key",
                "attn_v": "attention.self.value",
                "attn_output": "attention.output.dense",
                "ffn_up": "intermediate.dense",
                "ffn_down": "output.dense",
            },
            norm_bias=True,
            encoder=True,
        ),
        Architecture(
            "nomic-bert",
            "nomic_bert",
            "NomicBertModel",
            biases=(),
            norms={"attn_output_norm": "norm1", "layer_output_norm": "norm2"},
            fused={"attn_qkv": _QKV},
            keys=frozenset({"attention.causal", "attention.layer_norm_epsilon", "pooling_type"}),
            constants={"hidden_act": "silu", CANONICAL: True},
            layer="encoder.layers",
            outside={
                **_OUTSIDE,
                f"{_EMBEDDING_NORM}.weight": "emb_ln.weight",
                f"{_EMBEDDING_NORM}.bias": "emb_ln.bias",
            },
            linears={
                "attn_q": "attn.q",
                "attn_k": "attn.k",
                "attn_v": "attn.v",
                "attn_output": "attn.out_proj",
                "ffn_gate": "mlp.fc12",
                "ffn_up": "mlp.fc11",
                "ffn_down": "mlp.fc2",
            },
            norm_bias=True,
            encoder=True,
        ),
        Architecture(
            "modern-bert",
            "modernbert",
            "ModernBertModel",
            biases=(),
            norms={"attn_norm": "attn_norm", "ffn_norm": "mlp_norm"},
            fused={"attn_qkv": _QKV, "ffn_up": ("ffn_gate", "ffn_up")},
            keys=frozenset(
                {"attention.causal", "attention.layer_norm_epsilon", "pooling_type", "hidden_activation", *WINDOW_KEYS}
            ),
            constants={"norm_bias": False, "attention_bias": False, "mlp_bias": False, CANONICAL: True},
            epsilon=("attention.layer_norm_epsilon", "norm_eps"),
            layer="layers",
            outside={
                "token_embd.weight": "embeddings.tok_embeddings.weight",
                f"{_EMBEDDING_NORM}.weight": "embeddings.norm.weight",
                "output_norm.weight": "final_norm.weight",
            },
            linears={
                "attn_q": "attn.q",
                "attn_k": "attn.k",
                "attn_v": "attn.v",
                "attn_output": "attn.Wo",
                "ffn_gate": "mlp.gate",
                "ffn_up": "mlp.up",
                "ffn_down": "mlp.Wo",
            },
            encoder=True,
        ),
    )
}
# Whose first layer has no norm before attention, and some of whose layers have windows.
MODERN = ENCODERS["modern-bert"]
# Every so many layers one has no window, where a file does not say (llama.cpp).
_PERIOD = 3


def encoder_config(header: GGUFHeader, arch: Architecture, tensors: Mapping[str, GGUFTensor]) -> dict[str, Any]:
    """The Hugging Face config of an encoder.

    Args:
        header: the metadata.
        arch: one of ENCODERS.
        tensors: tensor tables of all parts, by GGUF name.

    Raises:
        CheckpointError: a mandatory key or tensor is missing, or a value or shape makes no sense.
        UnsupportedError: the file needs something that kbit does not do.
    """
    keys = Keys(header, arch)
    keys.refuse_unknown()
    causal = header.flag(f"{arch.name}.attention.causal")
    if causal is not False:
        shown = "missing" if causal is None else "true"
        raise UnsupportedError(
            f"{header.path}: '{arch.name}.attention.causal' is {shown}; kbit runs {arch.name} models whose tokens see "
            "the whole text"
        )
    if keys.count("pooling_type") not in (0, *POOLINGS):
        raise UnsupportedError(
            f"{header.path}: '{arch.name}.pooling_type' {keys.count('pooling_type')} is not supported"
            f"{' (a reranker)' if keys.count('pooling_type') == _RANK else ''}; kbit reads 0 to 3 (none, mean, cls, "
            "last)"
        )
    layers, hidden, mlp = (keys.size(name) for name in ("block_count", "embedding_length", "feed_forward_length"))
    if layers > len(tensors):
        header.fail(f"the metadata claims {layers} layers, but the file has only {len(tensors)} tensors")
    heads = keys.size("attention.head_count")
    if hidden % heads or keys.size("attention.head_count_kv", heads) != heads:
        header.fail(
            f"{arch.name}.embedding_length {hidden} is no multiple of attention.head_count {heads} of each kind"
        )
    for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        if keys.size(name, hidden // heads) != hidden // heads:
            raise UnsupportedError(f"{header.path}: '{arch.name}.{name}' is not {hidden // heads}, the size of a head")
    eps = keys.real("attention.layer_norm_epsilon")
    if not 0 < eps < 1:
        header.fail(f"metadata key '{arch.name}.attention.layer_norm_epsilon' is {eps}, expected 0 to 1")
    windowed = () if arch is MODERN else ("attention.sliding_window",)
    for name in ("rope.scaling.type", "rope.scaling.factor", "rope.scale_linear", *windowed):
        if f"{arch.name}.{name}" in header and header.value(f"{arch.name}.{name}") not in ("none", 0, 1, 1.0):
            raise UnsupportedError(f"{header.path}: '{arch.name}.{name}' is not supported for this architecture")
    context = keys.size("context_length")
    vocab = _rows(header, tensors, "token_embd.weight")
    types = _rows(header, tensors, "token_types.weight") if "token_types.weight" in arch.outside else 0
    biased = arch.biases is None and "blk.0.attn_q.bias" in tensors
    if arch.biases is None and not biased:
        raise UnsupportedError(f"{header.path}: a {arch.name} model without biases is not supported")
    rows = {"token_embd.weight": vocab, "token_types.weight": types, "position_embd.weight": context}
    check_tensors(header, arch.name, tensors, encoder_shapes(arch, rows, layers, hidden, mlp, biased))
    config: dict[str, Any] = {
        "architectures": [arch.hf_class],
        "model_type": arch.model_type,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": hidden // heads,
        "layer_norm_eps" if arch is not MODERN else arch.epsilon[1]: eps,
        "max_position_embeddings": context,
        "vocab_size": vocab,
        "type_vocab_size": types,
        "tie_word_embeddings": True,
        **arch.constants,
    }
    if arch is MODERN:
        config |= _modern(keys)
    elif "position_embd.weight" not in arch.outside:
        config["rope_theta"] = keys.real("rope.freq_base", 10000.0)
    pad = header.token_id("tokenizer.ggml.padding_token_id", vocab)
    return config if pad is None else {**config, "pad_token_id": pad}


def encoder_shapes(
    arch: Architecture, rows: Mapping[str, int], layers: int, hidden: int, mlp: int, biased: bool
) -> dict[str, tuple[int, ...]]:
    """The tensors of an encoder by name, with their shapes.

    Args:
        arch: one of ENCODERS.
        rows: of the tables, by name.
        layers, hidden, mlp: how many there are, and features outside and inside of MLPs.
        biased: whether linears have biases.
    """
    shapes: dict[str, tuple[int, ...]] = {
        name: (rows[name], hidden) if name in rows else (hidden,) for name in arch.outside
    }
    for layer in range(layers):
        shapes |= _layer(arch, layer, hidden, mlp, biased)
    return shapes


def _modern(keys: Keys) -> dict[str, Any]:
    """ModernBERT's windows and rotations."""
    theta, window = keys.real("rope.freq_base", 10000.0), keys.count("attention.sliding_window")
    activation = keys.header.string(f"{keys.arch}.hidden_activation") or "gelu"
    if activation not in ("gelu", "silu"):
        raise UnsupportedError(f"{keys.header.path}: '{keys.arch}.hidden_activation' {activation} is not supported")
    return {
        "hidden_activation": activation,
        "local_attention": window or 128,
        "global_attn_every_n_layers": keys.size("attention.sliding_window_pattern", _PERIOD) if window else 1,
        "global_rope_theta": theta,
        "local_rope_theta": keys.real("rope.freq_base_swa", theta),
    }


def _rows(header: GGUFHeader, tensors: Mapping[str, GGUFTensor], name: str) -> int:
    if name not in tensors:
        raise CheckpointError(
            f"{header.path}: tensor '{name}' is missing; the file is incomplete, download or convert it again"
        )
    return tensors[name].shape[0]


def _layer(arch: Architecture, layer: int, hidden: int, mlp: int, biased: bool) -> dict[str, tuple[int, ...]]:
    """The tensors of a layer, with their shapes."""
    prefix = f"blk.{layer}."
    shapes: dict[str, tuple[int, ...]] = {}
    for part in arch.norms:
        if arch is MODERN and (layer, part) == (0, "attn_norm"):
            continue
        kinds = ("weight", "bias") if arch.norm_bias else ("weight",)
        shapes |= {f"{prefix}{part}.{kind}": (hidden,) for kind in kinds}
    for part in arch.linears:
        rows, columns = (hidden, mlp) if part == "ffn_down" else (mlp if part.startswith("ffn") else hidden, hidden)
        whole = next((whole for whole, parts in arch.fused.items() if part in parts), part)
        rows *= len(arch.fused.get(whole, (part,)))
        shapes[f"{prefix}{whole}.weight"] = (rows, columns)
        if biased:
            shapes[f"{prefix}{whole}.bias"] = (rows,)
    return shapes
