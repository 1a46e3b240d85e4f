"""Latent attention in GGUF files (`deepseek2`, `minicpm3`): sizes, tensors, and which canonical tensors these hold.

Keys are stored for the compressed cache of llama.cpp, transposed head by head (`attn_k_b`); of `minicpm3`, and in files
of `deepseek2` of before April 2025, with values in one tensor as it is published (`attn_kv_b`). Queries, and the keys
that all heads share, are as they are published: what turns comes last in a head, pairs side by side but of `minicpm3`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kbit.checkpoint.gguf.keys import Keys
from kbit.checkpoint.gguf.metadata import GGUFTensor
from kbit.checkpoint.gguf.orders import LastFirst, Order, Runs

# What says that keys and values have tensors of their own; no entry of the configuration.
KEYS_APART = "keys_apart"

_PART = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.(attn_[a-z_]+)\.weight")
_PLAIN = {
    "attn_q_a": "q_a_proj",
    "attn_q_a_norm": "q_a_layernorm",
    "attn_kv_a_norm": "kv_a_layernorm",
}


@dataclass(frozen=True)
class LatentRows:
    """A canonical tensor in one of a file.

    Attributes:
        name: canonical.
        tensor: the rows that hold it.
        head, turned: rows of a head whose last ones turn, pairs side by side, and how many do; 0: in canonical order.
        transposed: of heads each, the first axis, its columns are rows.
        rows: where its rows are, counted from the tensor's first; None: as above.
    """

    name: str
    tensor: GGUFTensor
    head: int = 0
    turned: int = 0
    transposed: bool = False
    rows: Order | None = None


def latent_config(keys: Keys) -> dict[str, Any]:
    """Entries of the configuration that say what latent attention is like.

    Raises:
        CheckpointError: a missing or senseless value.
    """
    apart = f"{keys.arch}.attention.key_length_mla" in keys.header
    suffix = "_mla" if apart else ""
    # (MiniCPM3's converter leaves it out, as llama.cpp has what heads share of the width then.)
    shared = keys.size("embedding_length") // keys.size("attention.head_count")
    turned, key = keys.size("rope.dimension_count"), keys.size(f"attention.key_length{suffix}")
    if turned >= key or turned % 2:
        keys.header.fail(f"{keys.arch}.rope.dimension_count is {turned}, expected an even number below {key}")
    return {
        "q_lora_rank": keys.count("attention.q_lora_rank") or None,
        "kv_lora_rank": keys.size("attention.kv_lora_rank"),
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": key - turned,
        "v_head_dim": keys.size(f"attention.value_length{suffix}", None if apart else max(1, shared)),
        KEYS_APART: apart,
    }


def latent_shapes(config: Mapping[str, Any], hidden: int, heads: int, layer: int) -> dict[str, tuple[int, ...]]:
    """The tensors that a layer has in place of queries', keys' and values' matrices, by GGUF name, with their shapes.

    Args:
        config: of `latent_config`.
        hidden: the model's.
        heads: likewise.
        layer: its index.
    """
    rank, query_rank = config["kv_lora_rank"], config["q_lora_rank"]
    turned, own, values = config["qk_rope_head_dim"], config["qk_nope_head_dim"], config["v_head_dim"]
    queries = heads * (turned + own)
    shapes: dict[str, tuple[int, ...]] = {
        "attn_kv_a_mqa": (rank + turned, hidden),
        "attn_kv_a_norm": (rank,),
        "attn_output": (hidden, heads * values),
    }
    if config[KEYS_APART]:
        shapes |= {"attn_k_b": (heads, rank, own), "attn_v_b": (heads, values, rank)}
    else:
        shapes["attn_kv_b"] = (heads * (own + values), rank)
    if query_rank is None:
        shapes["attn_q"] = (queries, hidden)
    else:
        shapes |= {"attn_q_a": (query_rank, hidden), "attn_q_a_norm": (query_rank,), "attn_q_b": (queries, query_rank)}
    return {f"blk.{layer}.{part}.weight": shape for part, shape in shapes.items()}


def latent_rows(config: Mapping[str, Any], name: str, tensor: GGUFTensor, *, halves: bool) -> list[LatentRows]:
    """The canonical tensors that a tensor holds; none where it is not of latent attention.

    Args:
        config: the model's.
        name: in the file.
        tensor: of that name.
        halves: pairs that turn are half of what turns apart.
    """
    match = _PART.fullmatch(name)
    if match is None:
        return []
    place, part = f"model.layers.{match[1]}.self_attn.", match[2]
    turned, head = config["qk_rope_head_dim"], config["qk_rope_head_dim"] + config["qk_nope_head_dim"]
    if part in _PLAIN:
        return [LatentRows(f"{place}{_PLAIN[part]}.weight", tensor)]
    if part in ("attn_q", "attn_q_b"):
        queries = f"{place}{part.removeprefix('attn_')}_proj.weight"
        if halves:
            return [LatentRows(queries, tensor, rows=LastFirst(head, turned))]
        return [LatentRows(queries, tensor, head, turned)]
    if part == "attn_kv_a_mqa":
        rank, columns = config["kv_lora_rank"], tensor.shape[1]
        row_bytes = tensor.nbytes // tensor.shape[0]
        latent = replace(tensor, shape=(rank, columns), nbytes=rank * row_bytes)
        shared = replace(
            tensor, shape=(turned, columns), offset=tensor.offset + rank * row_bytes, nbytes=turned * row_bytes
        )
        return [
            LatentRows(f"{place}kv_a_proj.weight", latent),
            LatentRows(f"{place}k_shared_proj.weight", shared, *((0, 0) if halves else (turned, turned))),
        ]
    if part == "attn_kv_b":
        own, values = head - turned, config["v_head_dim"]
        count, bytes_of = tensor.shape[0] // (own + values), tensor.nbytes // tensor.shape[0]
        return [
            LatentRows(
                f"{place}{which}_b_proj.weight",
                replace(tensor, shape=(count * each, tensor.shape[1]), nbytes=count * each * bytes_of),
                rows=Runs(first, each, own + values),
            )
            for which, first, each in (("k", 0, own), ("v", own, values))
        ]
    heads = tensor.shape[0]
    if part == "attn_k_b":
        return [LatentRows(f"{place}k_b_proj.weight", tensor, transposed=True)]
    if part == "attn_v_b":
        flat = replace(tensor, shape=(heads * tensor.shape[1], tensor.shape[2]))
        return [LatentRows(f"{place}v_b_proj.weight", flat)]
    return []
