"""Which canonical tensors a tensor of a GGUF file holds, and where in it they are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kbit.checkpoint.gguf.delta_nets import delta_pieces
from kbit.checkpoint.gguf.experts import expert_rows
from kbit.checkpoint.gguf.latent import latent_rows
from kbit.checkpoint.gguf.metadata import GGUFHeader, GGUFTensor
from kbit.checkpoint.gguf.names import Architecture, canonical_names, part_of
from kbit.checkpoint.gguf.orders import Piece, one_after_another
from kbit.checkpoint.gguf.reading import Located
from kbit.checkpoint.gguf.t5 import T5, t5_pieces


def located(
    arch: Architecture, config: Mapping[str, Any], name: str, tensor: GGUFTensor, header: GGUFHeader
) -> list[Located]:
    """The canonical tensors that a tensor holds; none beyond the model's layers.

    Args:
        arch: of the file.
        config: what it says of the model.
        name: in the file.
        tensor: of that name.
        header: of the part of the file that has it.
    """
    layer = re.match(r"blk\.(\d+)\.", name)
    if layer is not None and int(layer[1]) >= config["num_hidden_layers"]:
        return []
    if arch.latent and (held := latent_rows(config, name, tensor, halves=arch.halves)):
        return [
            Located(Piece(e.name, e.tensor, e.rows), header, e.head, e.turned, e.head - e.turned, e.transposed)
            for e in held
        ]
    found = []
    for piece in _pieces_of(arch, config, name, tensor):
        permuted = arch.interleaved and piece.name.split(".")[-2] in ("q_proj", "k_proj")
        head_dim = int(config["head_dim"]) if permuted else 0
        found.append(Located(piece, header, head_dim, int(head_dim * config.get("partial_rotary_factor", 1.0))))
    return found


def _pieces_of(arch: Architecture, config: Mapping[str, Any], name: str, tensor: GGUFTensor) -> list[Piece]:
    """The canonical tensors that a tensor holds, each as the part of it that it is; none beyond the model's layers."""
    if arch is T5:
        return t5_pieces(config, name, tensor)
    special = None if arch.special is None else arch.special.located(name, tensor, config)
    if special is not None:
        return special
    of_experts = [] if arch.experts is None else expert_rows(arch.experts, name, tensor)
    if of_experts:
        return [Piece(each, part) for each, part in of_experts]
    of_delta = [] if arch.delta is None else delta_pieces(arch.delta, config, name, tensor)
    if of_delta:
        return of_delta
    names = canonical_names(arch, name)
    if len(names) < 2:
        return [Piece(each, tensor) for each in names]
    keys = int(config["num_key_value_heads"]) * int(config["head_dim"])
    queries = int(config["num_attention_heads"]) * int(config["head_dim"])
    counts = {"attn_q": queries, "attn_k": keys, "attn_v": keys}
    widths = (counts.get(part, int(config["intermediate_size"])) for part in arch.fused[part_of(name)])
    return one_after_another(tensor, list(zip(names, widths, strict=True)))
