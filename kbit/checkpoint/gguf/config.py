"""A Hugging Face config dictionary from GGUF metadata, with every number checked before anything uses it.

Keys that change what the model computes and that this module does not know are refused: ignoring one would run a
different model without saying so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kbit.checkpoint.gguf.architectures import ARCHITECTURES
from kbit.checkpoint.gguf.delta_nets import delta_config, expected_delta
from kbit.checkpoint.gguf.encoders import ENCODERS, encoder_config
from kbit.checkpoint.gguf.experts import SIGMOID, as_row, expected_experts, expert_config
from kbit.checkpoint.gguf.keys import Keys
from kbit.checkpoint.gguf.latent import KEYS_APART, latent_config, latent_shapes
from kbit.checkpoint.gguf.metadata import GGUFHeader, GGUFTensor, quoted
from kbit.checkpoint.gguf.names import (
    ATTENTION_BIASES,
    ROPE_FACTORS,
    ROPE_FREQS,
    Architecture,
    Dimensions,
    LayerSizes,
    canonical_names,
    layer_of,
    with_fused,
)
from kbit.checkpoint.gguf.rope import rope_scaling
from kbit.checkpoint.gguf.t5 import T5, t5_config
from kbit.host.errors import CheckpointError, UnsupportedError


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
    known = {**ARCHITECTURES, **ENCODERS, T5.name: T5}
    if name not in known:
        raise UnsupportedError(
            f"{header.path}: architecture {quoted(name)} is not supported in GGUF files; supported are "
            f"{', '.join(known)} (llama covers Llama, Mistral and SmolLM)"
        )
    arch = known[name]
    if arch.sigmoid is not None and header.integer(f"{name}.expert_gating_func") == SIGMOID:
        model_type, hf_class, experts = arch.sigmoid
        return replace(arch, model_type=model_type, hf_class=hf_class, experts=experts)
    if arch.variant is not None:
        arch = arch.variant(header, arch)
    return with_fused(arch, header.tensors)


def config_from_header(
    header: GGUFHeader,
    tensors: dict[str, GGUFTensor],
    rope_divisors: list[float] | None,
    rope_factors: tuple[list[float], list[float]] | None = None,
) -> dict[str, Any]:
    """The Hugging Face config of a GGUF model.

    Args:
        header: header of the file (of the first part, for a split file): the metadata.
        tensors: tensor tables of all parts, by GGUF name.
        rope_divisors: the values of rope_freqs.weight, where that tensor exists.
        rope_factors: those of rope_factors_short.weight and rope_factors_long.weight.

    Returns:
        What Hugging Face calls config.json, with `rope_theta` and `rope_scaling` as separate keys.

    Raises:
        CheckpointError: a mandatory key or tensor is missing, or a value or shape makes no sense.
        UnsupportedError: the file needs something kbit does not implement.
    """
    arch = architecture_of(header)
    if arch.encoder:
        return encoder_config(header, arch, tensors)
    if arch is T5:
        return t5_config(header, arch, tensors)
    reader = Keys(header, arch)
    reader.refuse_unknown()
    tensors = {name: tensor for name, tensor in tensors.items() if name not in arch.beside}
    if "token_embd.weight" not in tensors:
        header.fail(
            "tensor 'token_embd.weight' is missing", "give a file with weights (this one may be vocabulary only)"
        )

    layers, further = reader.size("block_count"), 0
    if layers > len(tensors):  # before anything is made for each of them
        header.fail(f"the metadata claims {layers} layers, but the file has only {len(tensors)} tensors")
    if arch.experts is not None or arch.delta is not None or "nextn_predict_layers" in arch.keys:
        # Layers that predict tokens further on come last, and are counted; they are left out.
        further = reader.count("nextn_predict_layers")
        if further >= layers:
            header.fail(f"{arch.name}.nextn_predict_layers is {further}, but there are {layers} layers in all")
        layers -= further
        beginnings = tuple(f"blk.{layers + index}." for index in range(further))
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(beginnings)}
    if arch.qk_optional and "blk.0.attn_q_norm.weight" not in tensors:
        arch = replace(arch, qk_norm=None)
    hidden = reader.size("embedding_length")
    heads = reader.size("attention.head_count")
    # Of latent attention the file describes what llama.cpp keeps of it: one key for all heads.
    latent = latent_config(reader) if arch.latent else {}
    if arch.special is not None:
        sizes = arch.special.sizes(reader, layers)
    else:
        dim, rotated = (latent["qk_rope_head_dim"],) * 2 if arch.latent else _head_dim(reader, hidden, heads)
        kv = heads if arch.latent else reader.size("attention.head_count_kv", heads)
        # Where all layers have experts the width of an MLP may be left out.
        named = arch.delta is None or f"{arch.name}.feed_forward_length" in header
        mlp = reader.size("feed_forward_length" if named else "expert_feed_forward_length")
        sizes = LayerSizes([dim] * layers, [kv] * layers, [mlp] * layers)
    kv_heads, head_dim = sizes.kv_heads[0], sizes.head_dims[0]
    for count in sizes.kv_heads:
        if heads % count:
            header.fail(f"{arch.name}.attention.head_count {heads} is not a multiple of head_count_kv {count}")
    context = reader.size("context_length")
    epsilon, eps_entry = arch.epsilon
    eps = reader.real(epsilon)
    if not 0 < eps < 1:
        header.fail(f"metadata key '{arch.name}.{epsilon}' is {eps}, expected 0 to 1")
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

    each = [
        Dimensions(hidden, width, heads, count, dim, vocab)
        for dim, count, width in zip(sizes.head_dims, sizes.kv_heads, sizes.widths, strict=True)
    ]
    dims = each[0]
    tied = "output.weight" not in tensors
    biases = reader.biases = _biases(header, arch, tensors)
    experts = {} if arch.experts is None else expert_config(reader, arch.experts)
    delta = {} if arch.delta is None else delta_config(reader, layers)
    _check_tensors(reader, tensors, each, biases, tied, context, {**experts, **latent, **delta})
    reader.divisors, reader.tensors = rope_divisors, frozenset(tensors)
    if arch.special is not None or arch.positions != "turned":
        scaling = None
    elif rope_factors is None:
        scaling = rope_scaling(
            header, arch.name, rotated, theta, context, rope_divisors, yarn_log_multiplier=arch.yarn_log_multiplier
        )
    else:
        scaling = _longrope(reader, rope_factors, rotated)

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
        eps_entry: eps,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "max_position_embeddings": context,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "attention_bias": "attn_q" in biases,
        "mlp_bias": "ffn_up" in biases,
        **experts,
        **{key: value for key, value in latent.items() if key != KEYS_APART},
        **delta,
        **arch.constants,
    }
    if arch.qk_optional:
        config["use_qk_norm"] = arch.qk_norm is not None
    if arch.positions != "turned":
        del config["rope_theta"], config["rope_scaling"]
    if arch.partial:
        config["partial_rotary_factor"] = rotated / head_dim
    for key, entry in arch.numbers.items():
        if f"{arch.name}.{key}" in header:
            config[entry] = reader.real(key)
    if arch.configure is not None:
        arch.configure(reader, config)
    elif reader.count("attention.sliding_window"):
        raise UnsupportedError(f"{header.path}: metadata key '{arch.name}.attention.sliding_window' is not supported")
    for name, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        token = header.token_id(f"tokenizer.ggml.{key}_token_id", tokens or vocab)
        if token is not None:
            config[name] = token
    return config


def expected_of_layer(
    arch: Architecture, dims: Dimensions, layer: int, biases: tuple[str, ...], described: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Every tensor of a layer, with its shape.

    Args:
        described: what the configuration says of experts, of latent attention and of delta nets.
    """
    shapes = dims.expected(arch, layer, biases)
    if arch.latent:
        for part in ATTENTION_BIASES:
            shapes.pop(f"blk.{layer}.{part}.weight")
        shapes |= latent_shapes(described, dims.hidden, dims.heads, layer)
    if arch.delta is not None:
        shapes = expected_delta(arch.delta, described, dims.hidden, layer, shapes)
    of_experts = None
    if arch.experts is not None and arch.experts.count in described:
        of_experts = expected_experts(arch.experts, described, dims.hidden, layer)
    if of_experts is None:
        return shapes
    for part in ("ffn_gate", "ffn_up", "ffn_down"):
        shapes.pop(f"blk.{layer}.{part}.weight")
    return shapes | of_experts


def _head_dim(reader: Keys, hidden: int, heads: int) -> tuple[int, int]:
    """Features of a head, and how many of them rotate."""
    header, arch = reader.header, reader.arch
    if f"{arch}.attention.key_length" not in header and hidden % heads:
        header.fail(f"{arch}.embedding_length {hidden} is not a multiple of attention.head_count {heads}")
    head_dim = reader.size("attention.key_length", hidden // heads if hidden >= heads else 1)
    if head_dim % 2 and reader.architecture.positions == "turned":
        header.fail(f"the head size {head_dim} is odd, RoPE needs pairs")
    rotated = reader.size("rope.dimension_count", head_dim)
    equal = {"attention.value_length": reader.size("attention.value_length", head_dim)}
    if not reader.architecture.partial:
        equal["rope.dimension_count"] = rotated
    for name, value in equal.items():
        if value != head_dim:
            raise UnsupportedError(
                f"{header.path}: '{arch}.{name}' is {value} while heads have {head_dim} values; kbit needs them equal"
            )
    if rotated > head_dim or rotated % 2:
        header.fail(f"{arch}.rope.dimension_count is {rotated}, expected an even number of at most {head_dim}")
    return head_dim, rotated


def _longrope(reader: Keys, factors: tuple[list[float], list[float]], rotated: int) -> dict[str, Any]:
    """Phi-3's factors for short and for long texts as a `rope_scaling` entry."""
    for name, values in zip(ROPE_FACTORS, factors, strict=True):
        if len(values) != rotated // 2:
            reader.header.fail(f"tensor '{name}' has {len(values)} values, expected {rotated // 2}")
    original = reader.size("context_length") if reader.architecture.halves else None  # (MiniCPM3's files do not say)
    scaling: dict[str, Any] = {
        "rope_type": "longrope",
        "short_factor": factors[0],
        "long_factor": factors[1],
        "original_max_position_embeddings": reader.size("rope.scaling.original_context_length", original),
    }
    if f"{reader.arch}.rope.scaling.attn_factor" in reader.header:
        scaling["attention_factor"] = reader.real("rope.scaling.attn_factor")
    return scaling


def _biases(header: GGUFHeader, arch: Architecture, tensors: dict[str, GGUFTensor]) -> tuple[str, ...]:
    """Which layer parts have a bias, judged by layer 0; all other layers must then agree."""
    if arch.biases is not None:
        return arch.biases
    found: tuple[str, ...] = ()
    wholes = {part: whole for whole, parts in arch.fused.items() for part in parts}
    for group in arch.bias_groups:
        present = tuple(part for part in group if f"blk.0.{wholes.get(part, part)}.bias" in tensors)
        if present and present != group:
            raise UnsupportedError(
                f"{header.path}: layer 0 has biases for {', '.join(present)} only; such a model has them for all of "
                f"{', '.join(group)} or for none"
            )
        found += present
    return found


def _check_tensors(
    reader: Keys,
    tensors: dict[str, GGUFTensor],
    each: list[Dimensions],
    biases: tuple[str, ...],
    tied: bool,
    context: int,
    described: Mapping[str, Any],
) -> None:
    """Every expected tensor is there with its shape, and nothing else is.

    Args:
        each: the sizes of every layer.
        context: rows of a table of positions.
    """
    header, arch, layers, dims = reader.header, reader.architecture, len(each), each[0]
    known = {ROPE_FREQS, *(ROPE_FACTORS if arch.scaled else ())}
    of_layers = (expected_of_layer(arch, sizes, layer, biases, described) for layer, sizes in enumerate(each))
    absent: set[str] = set()
    more: dict[str, tuple[int, ...]] = {}
    if arch.special is not None:
        lacking = arch.special.absent(reader, layers, tensors)
        absent = {f"blk.{layer}.{part}.weight" for layer, parts in enumerate(lacking) for part in parts}
        more = arch.special.more(reader, dims, layers, tensors)
    for shapes in [dims.expected_global(arch, tied, context), *of_layers, more]:
        for name, shape in shapes.items():
            tensor = tensors.get(name)
            if tensor is None and name in absent:
                continue
            tensor = None if tensor is None else as_row(name, tensor)
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
        if canonical_names(arch, name) and layer is not None and layer >= layers:
            header.fail(f"tensor '{name}' belongs to layer {layer}, but the metadata says {layers} layers")
        raise UnsupportedError(
            f"{header.path}: tensor {quoted(name)} has no place in a {header.string('general.architecture')} model "
            "that kbit knows; leaving it out would change the model"
        )
