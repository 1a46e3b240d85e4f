"""GGUF files of T5, FLAN-T5, mT5 and UMT5, encoder and decoder, as llama.cpp's converter writes them.

Not in a file, only in llama.cpp's code: the activation (GELU where there is a gate, else a relu), and the distance from
which on all are alike, 128. It does not scale logits where the head is the embedding; here they are, as T5's are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kbit.checkpoint.gguf.keys import Keys
from kbit.checkpoint.gguf.metadata import GGUFHeader, GGUFTensor
from kbit.checkpoint.gguf.names import Architecture
from kbit.checkpoint.gguf.orders import Piece
from kbit.checkpoint.gguf.tensor_table import check_tensors
from kbit.host.errors import UnsupportedError

_OUTSIDE = {
    "token_embd.weight": "shared.weight",
    "output.weight": "lm_head.weight",
    "enc.output_norm.weight": "encoder.final_layer_norm.weight",
    "dec.output_norm.weight": "decoder.final_layer_norm.weight",
}
_KEYS = frozenset(
    {
        "attention.layer_norm_epsilon",
        "attention.relative_buckets_count",
        "decoder_block_count",
        "decoder_start_token_id",
    }
)
_ATTENTION = {"q": "q", "k": "k", "v": "v", "o": "o", "rel_b": "relative_attention_bias"}
_MOST_DISTANCE = 128
# Of texts: distances set no limit (`kbit.models.families.t5`), and context_length is that of training.
CONTEXT = 16384
_LAYER = re.compile(r"(enc|dec)\.blk\.(0|[1-9][0-9]{0,5})\.([a-z_]+)\.weight")


def _parts(decoder: bool, gated: bool) -> dict[str, str]:
    """Canonical names within a layer, by part."""
    up = {"ffn_gate": "wi_0", "ffn_up": "wi_1"} if gated else {"ffn_up": "wi"}
    mlp = 2 if decoder else 1
    found = {f"attn_{part}": f"0.SelfAttention.{name}" for part, name in _ATTENTION.items()}
    found |= {part: f"{mlp}.DenseReluDense.{name}" for part, name in {**up, "ffn_down": "wo"}.items()}
    found |= {"attn_norm": "0.layer_norm", "ffn_norm": f"{mlp}.layer_norm"}
    if decoder:
        found |= {f"cross_attn_{part}": f"1.EncDecAttention.{name}" for part, name in _ATTENTION.items()}
        found["cross_attn_norm"] = "1.layer_norm"
    return found


def t5_pieces(config: Mapping[str, Any], name: str, tensor: GGUFTensor) -> list[Piece]:
    """The canonical tensor that a tensor is; none where its name means nothing.

    Args:
        config: of `t5_config`.
        name: in the file.
        tensor: of that name.
    """
    if name in _OUTSIDE:
        return [Piece(_OUTSIDE[name], tensor)]
    match = _LAYER.fullmatch(name)
    if match is None:
        return []
    decoder, gated = match[1] == "dec", str(config["feed_forward_proj"]).startswith("gated")
    part = _parts(decoder, gated).get(match[3])
    place = f"{'decoder' if decoder else 'encoder'}.block.{match[2]}.layer"
    return [] if part is None else [Piece(f"{place}.{part}.weight", tensor)]


def t5_config(header: GGUFHeader, arch: Architecture, tensors: Mapping[str, GGUFTensor]) -> dict[str, Any]:
    """The Hugging Face config of a T5.

    Args:
        header: the metadata.
        arch: T5's.
        tensors: tensor tables of all parts, by GGUF name.

    Raises:
        CheckpointError: a mandatory key or tensor is missing, or a value or shape makes no sense.
        UnsupportedError: the file needs something that kbit does not do.
    """
    keys = Keys(header, arch)
    keys.refuse_unknown()
    hidden, mlp, heads = (
        keys.size(name) for name in ("embedding_length", "feed_forward_length", "attention.head_count")
    )
    layers = keys.size("block_count")
    decoder_layers = keys.size("decoder_block_count", layers)
    if layers + decoder_layers > len(tensors):
        header.fail(f"the metadata claims {layers + decoder_layers} layers, but there are {len(tensors)} tensors")
    head_dim = keys.size("attention.key_length")
    buckets = keys.size("attention.relative_buckets_count")
    for name, wanted in (("attention.value_length", head_dim), ("attention.head_count_kv", heads)):
        if keys.size(name, wanted) != wanted:
            raise UnsupportedError(f"{header.path}: '{arch.name}.{name}' is not {wanted}, as kbit has T5")
    eps = keys.real("attention.layer_norm_rms_epsilon")
    if not 0 < eps < 1:
        header.fail(f"metadata key '{arch.name}.attention.layer_norm_rms_epsilon' is {eps}, expected 0 to 1")
    if "token_embd.weight" not in tensors:
        header.fail("tensor 'token_embd.weight' is missing", "give a file with weights")
    vocab = tensors["token_embd.weight"].shape[0]
    start = header.token_id(f"{arch.name}.decoder_start_token_id", vocab)
    config: dict[str, Any] = {
        "architectures": [arch.hf_class],
        "model_type": arch.model_type,
        "is_encoder_decoder": True,
        "d_model": hidden,
        "d_ff": mlp,
        "d_kv": head_dim,
        "num_heads": heads,
        "num_layers": layers,
        "num_decoder_layers": decoder_layers,
        "n_positions": keys.size("context_length"),
        "layer_norm_epsilon": eps,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": _MOST_DISTANCE,
        "feed_forward_proj": "gated-gelu" if "dec.blk.0.ffn_gate.weight" in tensors else "relu",
        "vocab_size": vocab,
        "tie_word_embeddings": "output.weight" not in tensors,
        "decoder_start_token_id": 0 if start is None else start,
    }
    if "dec.blk.1.attn_rel_b.weight" in tensors:  # every block has its own
        config["model_type"], config["architectures"] = "umt5", ["UMT5ForConditionalGeneration"]
    for name, key in (("eos_token_id", "eos"), ("pad_token_id", "padding")):
        token = header.token_id(f"tokenizer.ggml.{key}_token_id", vocab)
        if token is not None:
            config[name] = token
    check_tensors(header, "T5", tensors, t5_shapes(config, tensors))
    return config


def t5_shapes(config: Mapping[str, Any], tensors: Mapping[str, GGUFTensor]) -> dict[str, tuple[int, ...]]:
    """The tensors of a T5 by name, with their shapes.

    Args:
        config: of `t5_config`.
        tensors: those of a file, of which some that are of no use may be there.
    """
    hidden, mlp, vocab = config["d_model"], config["d_ff"], config["vocab_size"]
    inner, buckets = config["num_heads"] * config["d_kv"], config["relative_attention_num_buckets"]
    shapes: dict[str, tuple[int, ...]] = {
        name: (vocab, hidden) if name in ("token_embd.weight", "output.weight") else (hidden,) for name in _OUTSIDE
    }
    if config["tie_word_embeddings"]:
        shapes.pop("output.weight")
    gated, every = config["feed_forward_proj"] != "relu", config["model_type"] == "umt5"
    sizes = {"q": (inner, hidden), "k": (inner, hidden), "v": (inner, hidden), "o": (hidden, inner)}
    for side, count in (("enc", config["num_layers"]), ("dec", config["num_decoder_layers"])):
        for layer in range(count):
            for part in _parts(side == "dec", gated):
                name, kind = f"{side}.blk.{layer}.{part}.weight", part.rpartition("attn_")[2]
                if kind == "rel_b":
                    # (Of attention to the encoder's text it is in some files, and used by none.)
                    if (layer == 0 or every) and not part.startswith("cross"):
                        shapes[name] = (buckets, config["num_heads"])
                    elif part.startswith("cross") and name in tensors:
                        shapes[name] = tensors[name].shape
                elif part.endswith("norm"):
                    shapes[name] = (hidden,)
                elif part.startswith("ffn"):
                    shapes[name] = (hidden, mlp) if part == "ffn_down" else (mlp, hidden)
                else:
                    shapes[name] = sizes[kind]
    return shapes


T5 = Architecture("t5", "t5", "T5ForConditionalGeneration", keys=_KEYS, outside={}, linears={}, norms={})
