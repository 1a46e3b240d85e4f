"""Which layers of a configuration have a sliding window, and in which queries and keys turn with their positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from kbit.host.errors import UnsupportedError
from kbit.models.config_values import ConfigValues, shown
from kbit.models.spec import MAX_CONTEXT

Windows = Literal[
    "none",
    "all",
    "switched",
    "chosen",
    "listed",
    "period",
    "period from 0",
    "period, full at the end",
    "runs",
    "chunks",
]
Rotated = Literal["all", "listed", "windowed", "slid", "typed"]
FULL, SLIDING, LINEAR, CONV = "full_attention", "sliding_attention", "linear_attention", "conv"
CHUNKED = "chunked_attention"


def windows_of(windows: Windows, period: int | str, values: ConfigValues, layers: int) -> tuple[int | None, ...]:
    """Sliding window of every layer.

    Args:
        windows: which slide: "none"; "all" (`sliding_window` unless null); "switched" (all, with `use_sliding_window`);
            "chosen" (`use_sliding_window` and then `layer_types`, or every layer from `max_window_layers` on);
            "listed" (`use_sliding_window` and then `layer_types`); "period" (`layer_types`, or all but every
            period-th); "period from 0" (likewise, but of every period the first does not); "period, full at the end"
            (as "period", but for the last layer, which never does); "runs" (`attention_types`, how often each list of
            "global" and "local" comes; or every second);
            "chunks" (`layer_types`, or those that rotate; `attention_chunk_size` long, and they do not slide).
        period: of full attention; 0 for none; or the key that says.
        values: the configuration.
        layers: how many there are.

    Raises:
        UnsupportedError: a layer type, or a pattern, that kbit does not know.
        CheckpointError: a senseless value.
    """
    if windows == "runs":
        return _by_runs(values, layers)
    if windows == "chunks":
        return _by_chunks(values, layers)
    window = None
    periodic = windows.startswith("period")
    if windows == "all" or periodic or (windows != "none" and values.boolean("use_sliding_window")):
        window = values.optional_integer("sliding_window", 1, MAX_CONTEXT)
    types = _layer_types(values, layers)
    if windows in ("chosen", "listed") or periodic:
        if types is None:
            if window is None:
                return (None,) * layers
            if windows == "listed":
                raise UnsupportedError(
                    f"{values.where}: use_sliding_window without layer_types is not supported for this model; write "
                    "every layer's type into layer_types"
                )
            offset = 0 if windows == "period from 0" else 1
            types = _by_period(period, values, layers, offset) if periodic else _from_layer(values, layers)
        if windows == "period, full at the end":
            types = [*types[:-1], FULL]
        if window is None and SLIDING in types:
            wanted = "sliding_window says" if periodic else "use_sliding_window and sliding_window say"
            raise values.error("layer_types", f"without {SLIDING}, as {wanted}")
        return tuple(window if kind == SLIDING else None for kind in types)
    fixed = FULL if window is None else SLIDING
    if types is not None and set(types) != {fixed}:
        raise UnsupportedError(f"{values.where}: layer_types other than {fixed} are not supported for this model")
    return (window,) * layers


def rotated_layers(rotated: Rotated, values: ConfigValues, windows: Sequence[int | None]) -> tuple[bool, ...]:
    """Whether every layer rotates queries and keys; empty where all do.

    Args:
        rotated: "all"; "listed" (`no_rope_layers`, where 1 means that a layer *does*, or all but every
            `no_rope_layer_interval`-th); "windowed" (those with a window, or all where none has); "slid" (those
            with a window, and no other); "typed" (all, if
            `position_embedding_type` is "rope", else none).
        values: the configuration.
        windows: of every layer.

    Raises:
        CheckpointError: a senseless value.
    """
    layers = len(windows)
    turns = (True,) * layers
    some = rotated == "windowed" and values.optional_integer("sliding_window", 1, MAX_CONTEXT) is not None
    if some or rotated == "slid":
        turns = tuple(window is not None for window in windows)
    elif rotated == "typed":
        kind = values.raw("position_embedding_type")
        if kind not in (None, "nope", "rope"):
            raise values.error("position_embedding_type", 'null, "nope" or "rope"')
        turns = (kind == "rope",) * layers
    elif rotated == "listed":
        listed = values.raw("no_rope_layers")
        if listed is None or listed == []:
            interval = values.integer("no_rope_layer_interval", 1, MAX_CONTEXT)
            turns = tuple((layer + 1) % interval != 0 for layer in range(layers))
        elif not isinstance(listed, list) or len(listed) != layers or any(flag not in (0, 1) for flag in listed):
            raise values.error("no_rope_layers", f"a list of {layers} numbers, 1 for a layer that rotates and else 0")
        else:
            turns = tuple(bool(flag) for flag in listed)
    return () if all(turns) else turns


def _by_period(period: int | str, values: ConfigValues, layers: int, offset: int) -> list[str]:
    if isinstance(period, str):
        if isinstance(values.raw(period), str):
            raise UnsupportedError(
                f"{values.where}: {period} {shown(values.raw(period))} without layer_types is not supported; write "
                "every layer's type into layer_types"
            )
        period = values.integer(period, 0, MAX_CONTEXT)
    return [SLIDING if not period or (layer + offset) % period else FULL for layer in range(layers)]


def _from_layer(values: ConfigValues, layers: int) -> list[str]:
    first = values.integer("max_window_layers", 0, MAX_CONTEXT)
    return [SLIDING if layer >= first else FULL for layer in range(layers)]


def _by_runs(values: ConfigValues, layers: int) -> tuple[int | None, ...]:
    """GPT-Neo's windows."""
    runs, window = values.raw("attention_types"), values.integer("sliding_window", 1, MAX_CONTEXT)
    kinds: list[object] = ["global" if layer % 2 == 0 else "local" for layer in range(layers)] if runs is None else []
    for run in runs if isinstance(runs, list) else ():
        if not isinstance(run, list) or len(run) != 2 or not isinstance(run[0], list) or type(run[1]) is not int:
            break
        kinds += run[0] * min(max(run[1], 0), layers + 1)
    if len(kinds) != layers or not set(map(str, kinds)) <= {"global", "local"}:
        raise values.error("attention_types", f"lists of global and local, and how often each comes, {layers} in all")
    return tuple(window if kind == "local" else None for kind in kinds)


def _by_chunks(values: ConfigValues, layers: int) -> tuple[int | None, ...]:
    """Llama 4's stretches of attention."""
    types = _layer_types(values, layers, (FULL, CHUNKED))
    turns = rotated_layers("listed", values, (None,) * layers) or (True,) * layers
    cut = turns if types is None else tuple(kind == CHUNKED for kind in types)
    chunk = values.optional_integer("attention_chunk_size", 1, MAX_CONTEXT)
    if chunk is None and any(cut):
        raise values.error("attention_chunk_size", "how long the stretches are of layers whose attention is in chunks")
    return tuple(chunk if one else None for one in cut)


def linear_layers(values: ConfigValues, layers: int) -> tuple[bool, ...]:
    """Whether every layer has linear attention: `layer_types`, or all but every `full_attention_interval`-th.

    Args:
        values: the configuration.
        layers: how many there are.

    Raises:
        UnsupportedError: a layer type that kbit does not know.
        CheckpointError: a senseless value.
    """
    types = _layer_types(values, layers, (FULL, LINEAR))
    if types is not None:
        return tuple(kind == LINEAR for kind in types)
    interval = values.integer("full_attention_interval", 1, MAX_CONTEXT)
    return tuple((layer + 1) % interval != 0 for layer in range(layers))


def conv_layers(values: ConfigValues, layers: int) -> tuple[bool, ...]:
    """Whether every layer has a convolution: `layer_types`, or all but those that `full_attn_idxs` lists (null: none).

    Args:
        values: the configuration.
        layers: how many there are.

    Raises:
        UnsupportedError: a layer type that kbit does not know.
        CheckpointError: a senseless value.
    """
    types = _layer_types(values, layers, (FULL, CONV))
    attend = values.raw("full_attn_idxs")
    if types is not None:
        return tuple(kind == CONV for kind in types)
    attend = list(range(layers)) if attend is None else attend
    if not isinstance(attend, list) or not all(type(layer) is int and 0 <= layer < layers for layer in attend):
        raise values.error("full_attn_idxs", f"a list of layers, numbers from 0 to {layers - 1}")
    return tuple(layer not in attend for layer in range(layers))


def typed_layers(values: ConfigValues, layers: int, names: Mapping[str, str]) -> list[str] | None:
    """`layer_types`, by names that stand for others; None where there is none.

    Args:
        values: the configuration.
        layers: how many there are.
        names: those that are known, and what they stand for.

    Raises:
        UnsupportedError: a layer type that is not known.
        CheckpointError: a senseless value.
    """
    types = _layer_types(values, layers, tuple(names))
    return None if types is None else [names[kind] for kind in types]


def _layer_types(values: ConfigValues, layers: int, known: tuple[str, ...] = (FULL, SLIDING)) -> list[str] | None:
    types = values.raw("layer_types")
    if types is None:
        return None
    if not isinstance(types, list) or len(types) != layers or not all(isinstance(kind, str) for kind in types):
        raise values.error("layer_types", f"a list of {layers} names, one per layer")
    unknown = set(types) - set(known)
    if unknown:
        raise UnsupportedError(
            f"{values.where}: layer_types has {shown(sorted(unknown)[0])}, which kbit does not support"
        )
    return types
