"""Layers of one model that differ in heads, width, or whose keys they attend to: read from a configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kbit.host.errors import UnsupportedError
from kbit.models.config_values import ConfigValues, shown

# Limits that no real model comes near.
_MAX_WIDTH = 1 << 24


@dataclass(frozen=True)
class LayerShape:
    """The shape of a layer.

    Attributes:
        kv_heads: H_kv.
        head_dim: D.
        width: features inside its MLP.
        source: the layer whose keys and values it attends to: its own index, or that of an earlier one; then it has
            none of its own.
        keys_as_values: what its keys are before their norm are its values, too.
    """

    kv_heads: int
    head_dim: int
    width: int
    source: int
    keys_as_values: bool = False


@dataclass(frozen=True)
class ShapeRules:
    """The keys by which a family's configuration tells of layers that differ: those without a window from the others,
    and the last ones from those before.

    Attributes:
        full_head_dim, full_kv_heads: D and H_kv of layers without a window (H_kv only with `keys_as_values`).
        by_layer: an object that says both of layers by index, in place of these two.
        keys_as_values: whether layers without a window have no linear for values.
        shared: how many of the last layers attend to the keys of earlier ones: the last before them of their kind.
        twice_as_wide: whether the MLPs of these are.
    """

    full_head_dim: str = "global_head_dim"
    full_kv_heads: str = "num_global_key_value_heads"
    by_layer: str = "per_layer_config"
    keys_as_values: str = "attention_k_eq_v"
    shared: str = "num_kv_shared_layers"
    twice_as_wide: str = "use_double_wide_mlp"


def layer_shapes(
    rules: ShapeRules,
    values: ConfigValues,
    windows: Sequence[int | None],
    heads: int,
    usual: LayerShape,
) -> tuple[LayerShape, ...]:
    """The shape of every layer.

    Args:
        rules: the family's.
        values: the configuration.
        windows: of every layer, or None.
        heads: H, of all layers.
        usual: kv_heads, head_dim and width of a layer with a window.

    Raises:
        UnsupportedError: what layers differ in is something else.
        CheckpointError: a senseless value.
    """
    layers, full = len(windows), [window is None for window in windows]
    alike = values.boolean(rules.keys_as_values)
    full_dim = values.optional_integer(rules.full_head_dim, 2, _MAX_WIDTH) or usual.head_dim
    full_kv = values.optional_integer(rules.full_kv_heads, 1, heads)
    differ = _by_layer(rules, values, layers)
    shared = values.integer(rules.shared, 0, layers - 1)
    wide = values.boolean(rules.twice_as_wide)
    first = layers - shared
    found: list[LayerShape] = []
    for layer in range(layers):
        kv, dim = usual.kv_heads, usual.head_dim
        if differ is not None:
            kv, dim = differ.get(layer, {}).get("num_key_value_heads", kv), differ.get(layer, {}).get("head_dim", dim)
        elif full[layer]:
            kv, dim = full_kv if alike and full_kv else kv, full_dim
        if heads % kv:
            raise values.error(rules.full_kv_heads, f"a divisor of num_attention_heads ({heads})")
        if layer < first:
            found.append(LayerShape(kv, dim, usual.width, layer, alike and full[layer]))
            continue
        sources = [at for at in range(first) if full[at] == full[layer]]
        if not sources:
            raise values.error(rules.shared, f"less, as no layer before has the keys of layer {layer}")
        of = found[sources[-1]]
        if (of.kv_heads, of.head_dim) != (kv, dim):
            raise UnsupportedError(
                f"{values.where}: layer {layer} attends to the keys of layer {of.source}, which has other heads"
            )
        found.append(LayerShape(kv, dim, usual.width * (2 if wide else 1), of.source))
    for kind in (True, False):
        if len({shape.head_dim for shape, of in zip(found, full, strict=True) if of is kind}) > 1:
            raise UnsupportedError(
                f"{values.where}: layers {'without' if kind else 'with'} a window have different head_dim; kbit runs "
                "one for each kind"
            )
    return tuple(found)


def _by_layer(rules: ShapeRules, values: ConfigValues, layers: int) -> dict[int, dict[str, int]] | None:
    """What the configuration says of single layers, by index; None where it has no such object."""
    given = values.raw(rules.by_layer)
    if given is None:
        return None
    wanted = f"an object of objects, by the numbers of layers, 0 to {layers - 1}"
    if not isinstance(given, Mapping):
        raise values.error(rules.by_layer, wanted)
    found: dict[int, dict[str, int]] = {}
    for key, overrides in given.items():
        if not (isinstance(key, str) and key.isdecimal() and int(key) < layers and isinstance(overrides, Mapping)):
            raise values.error(rules.by_layer, wanted)
        inside = ConfigValues(overrides, {}, values.where, f"{rules.by_layer}.{key}.")
        for name in overrides:
            if name not in ("head_dim", "num_key_value_heads"):
                raise UnsupportedError(
                    f"{values.where}: {rules.by_layer}.{key}.{shown(name)} is not supported; layers may differ in "
                    "head_dim and num_key_value_heads"
                )
        found[int(key)] = {name: inside.integer(name, 1, _MAX_WIDTH) for name in overrides}
    return found
