"""Gated delta nets as llama.cpp's converter (0.3.36 of llama-cpp-python) writes them into GGUF files."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

ARCHITECTURES = ("qwen3next", "qwen35", "qwen35moe")
_NAMES = {
    "in_proj_qkv.weight": "attn_qkv.weight",
    "in_proj_z.weight": "attn_gate.weight",
    "in_proj_a.weight": "ssm_alpha.weight",
    "in_proj_b.weight": "ssm_beta.weight",
    "in_proj_ba.weight": "ssm_ba.weight",
    "conv1d.weight": "ssm_conv1d.weight",
    "dt_bias": "ssm_dt.bias",
    "A_log": "ssm_a",
    "norm.weight": "ssm_norm.weight",
    "out_proj.weight": "ssm_out.weight",
}


def tiled(values: Array, config: dict[str, Any], each: int, axis: int = 0) -> Array:
    """Heads of values, `each` rows (or columns) a head, from the order of training to that of the file."""
    keys, heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    rows = np.moveaxis(values, axis, 0)
    grouped = rows.reshape(keys, heads // keys, each, *rows.shape[1:])
    return np.ascontiguousarray(np.moveaxis(grouped.swapaxes(0, 1).reshape(rows.shape), 0, axis))


def tensors(arch: str, name: str, values: Array, config: dict[str, Any]) -> dict[str, Array]:
    """The tensors that one of a delta net becomes, by GGUF name."""
    _, _, layer, _, part = name.split(".", 4)
    prefix = f"blk.{layer}."
    keys, heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    key_dim, value_dim = config["linear_key_head_dim"], config["linear_value_head_dim"]
    if part == "in_proj_qkvz.weight":
        shared = heads // keys * value_dim
        by_head = values.reshape(keys, -1, values.shape[-1])
        parts = np.split(by_head, np.cumsum([key_dim, key_dim, shared]), axis=1)
        q, k, v, z = (each.reshape(-1, values.shape[-1]) for each in parts)
        return {f"{prefix}attn_qkv.weight": np.concatenate([q, k, v]), f"{prefix}attn_gate.weight": z}
    if part == "A_log":
        values = -np.exp(values)
    if part == "conv1d.weight":
        values = values.squeeze(1)
    if arch != "qwen3next":
        if part in ("in_proj_qkv.weight", "conv1d.weight"):
            before = 2 * keys * key_dim
            values = np.concatenate([values[:before], tiled(values[before:], config, value_dim)])
        elif part == "in_proj_z.weight":
            values = tiled(values, config, value_dim)
        elif part == "out_proj.weight":
            values = tiled(values, config, value_dim, axis=1)
        elif part != "norm.weight":
            values = tiled(values, config, 1)
    return {prefix + _NAMES[part]: values}


def keys(config: dict[str, Any]) -> dict[str, Any]:
    """Metadata, without the architecture's name before each key."""
    heads = config["linear_num_value_heads"]
    return {
        "ssm.conv_kernel": config["linear_conv_kernel_dim"],
        "ssm.state_size": config["linear_key_head_dim"],
        "ssm.group_count": config["linear_num_key_heads"],
        "ssm.time_step_rank": heads,
        "ssm.inner_size": config["linear_value_head_dim"] * heads,
        "rope.dimension_count": int(config["head_dim"] * config["rope_parameters"]["partial_rotary_factor"]),
    }
