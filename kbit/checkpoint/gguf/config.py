"""A Hugging Face config dictionary from GGUF metadata, with every number checked before anything uses it.

Keys that change what the model computes and that this module does not know are refused: ignoring one would run a
different model without saying so.
"""

from __future__ import annotations

import math
import struct
from typing import Any

from kbit.checkpoint.gguf.metadata import GGUFHeader, GGUFTensor, quoted
from kbit.checkpoint.gguf.names import (
    ARCHITECTURES,
    ATTENTION_BIASES,
    MLP_BIASES,
    ROPE_FREQS,
    Architecture,
    Dimensions,
    hf_name,
    layer_of,
)
from kbit.checkpoint.gguf.rope import rope_scaling
from kbit.host.errors import CheckpointError, UnsupportedError

_MAX_SIZE = 1 << 31  # of any dimension or count: far above every real model, small enough for safe products

# Metadata keys (after the architecture prefix) that config_from_header reads or that describe without computing.
_KNOWN_KEYS = frozenset(
    {
        "vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length",
        "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
        "attention.layer_norm_rms_epsilon", "attention.sliding_window",
        "rope.freq_base", "rope.dimension_count", "rope.scale_linear",
        "rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor",
        "rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scaling.yarn_log_multiplier",
        "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
        "tensor_data_layout", "expert_count", "expert_used_count",
    }
)  # fmt: skip


def architecture_of(header: GGUFHeader) -> Architecture:
    """The file's architecture.

    Raises:
        CheckpointError: the file names none.
        UnsupportedError: kbit does not read it, or the file holds an adapter or a projector instead of a model.
    """
    kind = header.string("general.type")
    if kind not in (None, "model"):
        raise UnsupportedError(f"{header.path}: holds {quoted(kind)}, not a model; give the GGUF file of the model")
    name = header.string("general.architecture")
    if name is None:
        header.fail("metadata key 'general.architecture' is missing")
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            f"{header.path}: architecture {quoted(name)} is not supported in GGUF files; supported are "
            f"{', '.join(ARCHITECTURES)} (llama covers Llama, Mistral and SmolLM)"
        )
    return ARCHITECTURES[name]


def short_float(value: float) -> float:
    """The shortest decimal that rounds to the same float32, so that 9.99999975e-06 becomes the config's 1e-05."""
    try:
        packed = struct.pack("<f", value)
    except OverflowError:
        return value
    if struct.unpack("<f", packed)[0] != value:
        return value  # stored as float64: leave it alone
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        try:
            if struct.pack("<f", short) == packed:
                return short
        except OverflowError:
            continue
    return value


def config_from_header(
    header: GGUFHeader, tensors: dict[str, GGUFTensor], rope_divisors: list[float] | None
) -> dict[str, Any]:
    """The Hugging Face config of a GGUF model.

    Args:
        header: header of the file (of the first part, for a split file): the metadata.
        tensors: tensor tables of all parts, by GGUF name.
        rope_divisors: the values of rope_freqs.weight, where that tensor exists.

    Returns:
        What Hugging Face calls config.json, with `rope_theta` and `rope_scaling` as separate keys.

    Raises:
        CheckpointError: a mandatory key or tensor is missing, or a value or shape makes no sense.
        UnsupportedError: the file needs something kbit does not implement.
    """
    arch = architecture_of(header)
    reader = _Keys(header, arch.name)
    reader.refuse_unknown()
    if "token_embd.weight" not in tensors:
        header.fail(
            "tensor 'token_embd.weight' is missing", "give a file with weights (this one may be vocabulary only)"
        )

    layers = reader.size("block_count")
    hidden = reader.size("embedding_length")
    heads = reader.size("attention.head_count")
    kv_heads = reader.size("attention.head_count_kv", heads)
    if heads % kv_heads:
        header.fail(f"{arch.name}.attention.head_count {heads} is not a multiple of head_count_kv {kv_heads}")
    head_dim = _head_dim(reader, hidden, heads)
    context = reader.size("context_length")
    eps = reader.real("attention.layer_norm_rms_epsilon")
    if not 0 < eps < 1:
        header.fail(f"metadata key '{arch.name}.attention.layer_norm_rms_epsilon' is {eps}, expected 0 to 1")
    theta = reader.real("rope.freq_base", 10000.0)
    if not 1 < theta < 1e30:
        header.fail(f"metadata key '{arch.name}.rope.freq_base' is {theta}, expected a number above 1")

    vocab = tensors["token_embd.weight"].shape[0]
    stated = reader.size("vocab_size", vocab)
    if stated != vocab:
        header.fail(f"{arch.name}.vocab_size is {stated}, but tensor 'token_embd.weight' has {vocab} rows")
    tokens = header.count("tokenizer.ggml.tokens")
    if tokens > vocab:
        header.fail(f"the tokenizer has {tokens} tokens, but tensor 'token_embd.weight' has {vocab} rows")

    dims = Dimensions(hidden, reader.size("feed_forward_length"), heads, kv_heads, head_dim, vocab)
    tied = "output.weight" not in tensors
    biases = _biases(header, arch, tensors)
    _check_tensors(header, tensors, dims, layers, biases, tied)

    config: dict[str, Any] = {
        "architectures": [arch.hf_class],
        "model_type": arch.model_type,
        "hidden_size": hidden,
        "intermediate_size": dims.mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": eps,
        "rope_theta": theta,
        "rope_scaling": rope_scaling(header, arch.name, head_dim, theta, context, rope_divisors),
        "max_position_embeddings": context,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "attention_bias": "attn_q" in biases,
    }
    if arch.model_type == "llama":
        config["mlp_bias"] = "ffn_gate" in biases
        window = reader.count("attention.sliding_window")
        if window:
            # Hugging Face's Llama class has no window; Mistral is the same model with one.
            if biases:
                raise UnsupportedError(f"{header.path}: a sliding window together with biases is not supported")
            config["architectures"], config["model_type"] = ["MistralForCausalLM"], "mistral"
            config["sliding_window"] = window
    elif reader.count("attention.sliding_window"):
        raise UnsupportedError(f"{header.path}: metadata key '{arch.name}.attention.sliding_window' is not supported")
    for name, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        token = header.integer(f"tokenizer.ggml.{key}_token_id")
        if token is not None:
            if not 0 <= token < vocab:
                header.fail(f"metadata key 'tokenizer.ggml.{key}_token_id' is {token}, outside 0 to {vocab - 1}")
            config[name] = token
    return config


class _Keys:
    """Checked access to the keys of one architecture."""

    def __init__(self, header: GGUFHeader, arch: str) -> None:
        self.header = header
        self.arch = arch

    def size(self, name: str, default: int | None = None) -> int:
        """A positive integer; a per-layer array counts if all its values are equal."""
        key = f"{self.arch}.{name}"
        if key not in self.header:
            if default is None:
                self.header.fail(f"metadata key '{key}' is missing", "convert the model again")
            return default
        if self.header.count(key):
            values = set(self.header.integers(key) or [])
            if len(values) > 1:
                raise UnsupportedError(
                    f"{self.header.path}: '{key}' differs from layer to layer, which is not supported"
                )
            value: int | None = values.pop()
        else:
            value = self.header.integer(key)
        if value is None or not 1 <= value < _MAX_SIZE:
            self.header.fail(f"metadata key '{key}' is {value}, expected 1 to {_MAX_SIZE - 1}")
        return value

    def count(self, name: str) -> int:
        """A non-negative integer, 0 when absent."""
        key = f"{self.arch}.{name}"
        value = self.header.integer(key) or 0
        if not 0 <= value < _MAX_SIZE:
            self.header.fail(f"metadata key '{key}' is {value}, expected 0 to {_MAX_SIZE - 1}")
        return value

    def real(self, name: str, default: float | None = None) -> float:
        key = f"{self.arch}.{name}"
        value = self.header.number(key)
        if value is None:
            if default is None:
                self.header.fail(f"metadata key '{key}' is missing", "convert the model again")
            return default
        if not math.isfinite(value):
            self.header.fail(f"metadata key '{key}' is {value}, expected a finite number")
        return short_float(value)

    def refuse_unknown(self) -> None:
        prefix = self.arch + "."
        for key in self.header.keys():  # noqa: SIM118 (a GGUFHeader is not a mapping)
            name = key.removeprefix(prefix)
            if name != key and name not in _KNOWN_KEYS:
                raise UnsupportedError(
                    f"{self.header.path}: metadata key {quoted(key)} is unknown to kbit and may change the model; "
                    "use a plain Llama, Mistral, SmolLM or Qwen2 file, or the original safetensors folder"
                )
        for name in ("expert_count", "expert_used_count"):
            if self.count(name):
                raise UnsupportedError(f"{self.header.path}: mixture-of-experts models are not supported in GGUF files")
        layout = self.header.string(prefix + "tensor_data_layout")
        if layout not in (None, "Meta AI original pth"):
            raise UnsupportedError(f"{self.header.path}: tensor_data_layout {quoted(layout)} is not supported")


def _head_dim(reader: _Keys, hidden: int, heads: int) -> int:
    header, arch = reader.header, reader.arch
    if f"{arch}.attention.key_length" not in header and hidden % heads:
        header.fail(f"{arch}.embedding_length {hidden} is not a multiple of attention.head_count {heads}")
    head_dim = reader.size("attention.key_length", hidden // heads if hidden >= heads else 1)
    if head_dim % 2:
        header.fail(f"the head size {head_dim} is odd, RoPE needs pairs")
    for name in ("attention.value_length", "rope.dimension_count"):
        value = reader.size(name, head_dim)
        if value != head_dim:
            raise UnsupportedError(
                f"{header.path}: '{arch}.{name}' is {value} while heads have {head_dim} values; kbit needs them equal"
            )
    return head_dim


def _biases(header: GGUFHeader, arch: Architecture, tensors: dict[str, GGUFTensor]) -> tuple[str, ...]:
    """Which layer parts have a bias, judged by layer 0; all other layers must then agree."""
    if arch.biases is not None:
        return arch.biases
    found: tuple[str, ...] = ()
    for group in (ATTENTION_BIASES, MLP_BIASES):
        present = tuple(part for part in group if f"blk.0.{part}.bias" in tensors)
        if present and present != group:
            raise UnsupportedError(
                f"{header.path}: layer 0 has biases for {', '.join(present)} only; a Llama model has them for all of "
                f"{', '.join(group)} or for none"
            )
        found += present
    return found


def _check_tensors(
    header: GGUFHeader,
    tensors: dict[str, GGUFTensor],
    dims: Dimensions,
    layers: int,
    biases: tuple[str, ...],
    tied: bool,
) -> None:
    """Every expected tensor is there with its shape, and nothing else is."""
    if layers > len(tensors):
        header.fail(f"the metadata claims {layers} layers, but the file has only {len(tensors)} tensors")
    known = {ROPE_FREQS}
    for shapes in [dims.expected_global(tied), *(dims.expected(layer, biases) for layer in range(layers))]:
        for name, shape in shapes.items():
            tensor = tensors.get(name)
            if tensor is None:
                raise CheckpointError(
                    f"{header.path}: tensor '{name}' is missing; the file is incomplete, download or convert it again"
                )
            if tensor.shape != shape:
                header.fail(f"tensor '{name}' has the shape {tensor.shape}, the metadata says {shape}")
            known.add(name)
    for name in tensors:
        if name in known:
            continue
        layer = layer_of(name)
        if hf_name(name) is not None and layer is not None and layer >= layers:
            header.fail(f"tensor '{name}' belongs to layer {layer}, but the metadata says {layers} layers")
        raise UnsupportedError(
            f"{header.path}: tensor {quoted(name)} has no place in a {header.string('general.architecture')} model "
            "that kbit knows; leaving it out would change the model"
        )
