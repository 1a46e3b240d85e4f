"""Encoders and T5 as GGUF metadata and tensors: what `kbit.checkpoint.gguf.encoders` and `t5` read, written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kbit.checkpoint.gguf.encoders import ENCODERS, MODERN, encoder_shapes
from kbit.checkpoint.gguf.metadata import GGUFTensor
from kbit.checkpoint.gguf.names import DENSE_MODULES, Architecture, canonical_names
from kbit.checkpoint.gguf.t5 import T5, t5_pieces, t5_shapes
from kbit.checkpoint.gguf.types import GGML_TYPES
from kbit.checkpoint.gguf.vectors import POOLINGS
from kbit.checkpoint.source import CheckpointSource
from kbit.host.errors import CheckpointError, UnsupportedError
from kbit.host.notes import note
from kbit.models.spec import ModelSpec
from kbit.text.backend import library_errors
from kbit.text.sentence_config import read_sentence_config

if TYPE_CHECKING:
    from kbit.checkpoint.gguf.writing import Value

_INSTEAD = "export plain floats with --to safetensors"
_T5_FAMILIES = ("t5", "mt5", "umt5")
# Families of decoders, of which llama.cpp has encoders, too (EmbeddingGemma).
_DECODERS = ("gemma3_text",)
# Lengths that T5's configurations may leave out (transformers).
_T5_POSITIONS = 512
# Names of sentence-transformers' poolings in its files, and here.
_POOLING_TYPES = {name.removesuffix("_tokens").removesuffix("_token"): number for number, name in POOLINGS.items()}


def is_encoder(spec: ModelSpec) -> bool:
    """Whether it is written by this module: an encoder-decoder, or an encoder that is no decoder without its mask."""
    return spec.encoder is not None or (spec.task is not None and spec.family not in _DECODERS)


def encoder_architecture(spec: ModelSpec, where: str) -> Architecture:
    """The architecture that an encoder or an encoder-decoder is written as.

    Raises:
        UnsupportedError: there is none, or the model has a head that these files have not.
    """
    if spec.encoder is not None:
        by_type = dict.fromkeys(_T5_FAMILIES, T5)
    else:
        by_type = {each.model_type: each for each in ENCODERS.values()}
    arch = by_type.get(spec.family)
    if arch is None:
        raise UnsupportedError(
            f"{where}: kbit writes no GGUF file of a {spec.family} model, but of {', '.join(by_type)}; {_INSTEAD}"
        )
    if spec.task is not None and spec.task.kind != "hidden":
        raise UnsupportedError(
            f"{where}: GGUF files of the {arch.name} architecture have hidden states for a result, and this model has "
            f"a head ({spec.task.kind}); {_INSTEAD}"
        )
    return arch


def encoder_metadata(spec: ModelSpec, arch: Architecture, source: CheckpointSource) -> dict[str, Value]:
    """Metadata keys of an architecture, its name before each.

    Raises:
        UnsupportedError: vectors that are made otherwise than GGUF can say.
    """
    keys = _t5_keys(spec, source.config) if arch is T5 else _encoder_keys(spec, arch, source)
    return {f"{arch.name}.{key}": value for key, value in keys.items()}


def _t5_keys(spec: ModelSpec, config: Mapping[str, Any]) -> dict[str, Value]:
    assert spec.encoder is not None
    assert spec.distances is not None
    positions, start = config.get("n_positions"), config.get("decoder_start_token_id")
    return {
        "context_length": positions if type(positions) is int and positions > 0 else _T5_POSITIONS,
        "embedding_length": spec.hidden_size,
        "feed_forward_length": spec.intermediate_size,
        "block_count": spec.encoder.layers,
        "decoder_block_count": spec.layers,
        "attention.head_count": spec.heads,
        "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim,
        "attention.layer_norm_epsilon": spec.norm_eps,
        "attention.relative_buckets_count": spec.distances[0],
        "attention.layer_norm_rms_epsilon": spec.norm_eps,
        "decoder_start_token_id": start if type(start) is int else 0,
    }


def _encoder_keys(spec: ModelSpec, arch: Architecture, source: CheckpointSource) -> dict[str, Value]:
    keys: dict[str, Value] = {
        "block_count": spec.layers,
        "context_length": spec.position_rows or spec.rope.max_positions,
        "embedding_length": spec.hidden_size,
        "feed_forward_length": spec.intermediate_size,
        "attention.head_count": spec.heads,
        "attention.layer_norm_epsilon": spec.norm_eps,
        "attention.causal": False,
    }
    if "position_embd.weight" not in arch.outside:
        keys["rope.freq_base"] = spec.rope.theta
    if arch is MODERN:
        keys |= _modern_keys(spec)
    pooling = pooling_type(source)
    return keys if pooling is None else {**keys, "pooling_type": pooling}


def _modern_keys(spec: ModelSpec) -> dict[str, Value]:
    """Of windows to both sides, and of the activation."""
    keys: dict[str, Value] = {"vocab_size": spec.vocab_size, "hidden_activation": spec.activation}
    full = [layer for layer, window in enumerate(spec.windows) if window is None]
    windows = [window for window in spec.windows if window is not None]
    if windows:
        keys["attention.sliding_window"] = 2 * (max(windows) - 1)
        keys["attention.sliding_window_pattern"] = full[1] if len(full) > 1 else spec.layers
        keys["rope.freq_base_swa"] = (spec.window_rope or spec.rope).theta
    return keys


def vector_keys(source: CheckpointSource, dense: Mapping[str, NDArray[np.float32]]) -> dict[str, Value]:
    """Of an EmbeddingGemma.

    Args:
        source: the checkpoint.
        dense: of `dense_modules`.
    """
    pooling = pooling_type(source, dense=True)
    keys: dict[str, Value] = {} if pooling is None else {"pooling_type": pooling}
    for name, values in dense.items():
        part = name.removesuffix(".weight")
        keys |= {f"{part}_feat_in": values.shape[1], f"{part}_feat_out": values.shape[0]}
    return keys


def dense_modules(source: CheckpointSource, arch: Architecture) -> dict[str, NDArray[np.float32]]:
    """The layers on vectors, by their names in a file, where the architecture has some.

    Raises:
        UnsupportedError: others than two plain linears, to another width and back.
        CheckpointError: a file is missing or damaged.
    """
    files, where = source.sidecar_files(), str(source.path)
    layers = read_sentence_config(files, where).dense if arch.beside else ()
    if not layers:
        return {}
    widths = [width for layer in layers for width in (layer.in_features, layer.out_features)]
    plain = all(layer.activation == "identity" and not layer.bias for layer in layers)
    if len(layers) != len(DENSE_MODULES) or not plain or widths[0] != widths[-1] or widths[1] != widths[2]:
        raise UnsupportedError(
            f"{where}: llama.cpp has two linear layers after pooling, without biases and activations, to another width "
            f"and back; these are {len(layers)} of widths {', '.join(map(str, widths))}; {_INSTEAD}"
        )
    from safetensors.numpy import load

    found = {}
    for name, layer in zip(DENSE_MODULES, layers, strict=True):
        file = f"{layer.folder}/model.safetensors"
        with library_errors(f"{where}/{file} is not a safetensors file"):
            found[name] = np.ascontiguousarray(load(files.get(file, b""))["linear.weight"], dtype=np.float32)
        if found[name].shape != (layer.out_features, layer.in_features):
            raise CheckpointError(f"{where}/{file}: linear.weight has the shape {found[name].shape}; download it again")
    return found


def pooling_type(source: CheckpointSource, *, dense: bool = False) -> int | None:
    """llama.cpp's number for how hidden states become a vector; None where a checkpoint does not say.

    Args:
        source: the checkpoint.
        dense: whether there may be layers after that.

    Raises:
        UnsupportedError: it has none.
    """
    where = str(source.path)
    sentences = read_sentence_config(source.sidecar_files(), where)
    if not sentences.published:
        return None
    number = _POOLING_TYPES.get(sentences.pooling[0]) if len(sentences.pooling) == 1 else None
    if number is None or (sentences.dense and not dense):
        what = "layers after pooling" if number is not None else f"pooling by {' and '.join(sentences.pooling)}"
        raise UnsupportedError(f"{where}: kbit writes no {what} as GGUF; {_INSTEAD}")
    if sentences.prompts:
        note(f"{where}: GGUF has no key for prompts: {', '.join(sentences.prompts)} left out; put them before texts")
    return number


def encoder_tensors(spec: ModelSpec, arch: Architecture) -> Iterator[tuple[str, tuple[int, ...], tuple[str, ...]]]:
    """The tensors of a file: name, shape, and the canonical tensors that it holds, in order."""
    if arch is T5:
        yield from _t5_tensors(spec)
        return
    tables = {"token_embd": spec.vocab_size, "token_types": spec.types, "position_embd": spec.position_rows}
    rows = {f"{name}.weight": count for name, count in tables.items()}
    shapes = encoder_shapes(arch, rows, spec.layers, spec.hidden_size, spec.intermediate_size, spec.qkv_bias)
    for name, shape in shapes.items():
        yield name, shape, tuple(canonical_names(arch, name))


def _t5_tensors(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...], tuple[str, ...]]]:
    assert spec.encoder is not None
    assert spec.distances is not None
    config = {
        "d_model": spec.hidden_size,
        "d_ff": spec.intermediate_size,
        "d_kv": spec.head_dim,
        "num_heads": spec.heads,
        "num_layers": spec.encoder.layers,
        "num_decoder_layers": spec.layers,
        "relative_attention_num_buckets": spec.distances[0],
        "vocab_size": spec.vocab_size,
        "tie_word_embeddings": spec.tied_embeddings,
        "feed_forward_proj": "relu" if spec.names.gate is None else "gated-gelu",
        "model_type": "umt5" if "{layer}" in str(spec.names.distances) else "t5",
    }
    for name, shape in t5_shapes(config, {}).items():
        (piece,) = t5_pieces(config, name, GGUFTensor(name, shape, GGML_TYPES[0], 0, 0))
        yield name, shape, (piece.name,)
