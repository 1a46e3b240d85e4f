"""How a model is split among processes: each has some of the heads and some of the MLP's features.

    q, k, v, gate, up   rows (output features), with their biases
    o, down             columns (input features): each process's product is a part of a sum, which the model asks for
                        (`kbit.graph.ops.Ops.sum_parts`)
    all the rest        whole: embedding, head, norms (a head's queries and keys too), the biases of o and down

`kbit.models.params` declares it, tensor by tensor.

So a layer needs two sums over the processes and nothing else: attention and activation stay where their inputs are.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

from kbit.checkpoint.shard import ShardedSource, column_unit
from kbit.checkpoint.source import CheckpointSource
from kbit.formats.codec import Cut
from kbit.host.errors import UnsupportedError
from kbit.models.check import check_tensors
from kbit.models.families import FAMILIES, spec_from_config
from kbit.models.params import Parameter, parameters
from kbit.models.spec import ModelSpec


@dataclass(frozen=True)
class Share:
    """What one process has, as half-open ranges.

    Attributes:
        rank, world: its number, and how many there are.
        heads: query heads.
        features: of an MLP as wide as the configuration says.
    """

    rank: int
    world: int
    heads: tuple[int, int]
    features: tuple[int, int]

    def kv_heads(self, count: int) -> tuple[int, int]:
        """Of so many key/value heads: those that its query heads need."""
        first = self.rank * count // self.world
        return first, first + max(1, count // self.world)

    def span(self, spec: ModelSpec, parameter: Parameter) -> tuple[int, int]:
        """Its rows or columns of a parameter that is cut."""
        assert parameter.cut is not None
        assert parameter.layer is not None
        shape, unit = spec.shape(parameter.layer), parameter.cut[1]
        if unit == "features":
            return _scaled(self.features, shape.width // spec.intermediate_size)
        return _scaled(self.heads if unit == "heads" else self.kv_heads(shape.kv_heads), shape.head_dim)


def shard(source: CheckpointSource, rank: int, world: int) -> ShardedSource:
    """The part of a model that process `rank` of `world` holds, as a checkpoint of its own.

    Its configuration has the share's heads, key/value heads and MLP features. MLP features are dealt out in whole
    blocks of the down projections, as evenly as that goes; heads must divide evenly. More processes than key/value
    heads share these: each has a copy of the one its queries need.

    Args:
        source: the whole model; stays open and is read through.

    Raises:
        CheckpointError, UnsupportedError: the model cannot be run at all, or not by so many processes.
    """
    spec = spec_from_config(source.config, where=f"config of {source.path}")
    check_tensors(source, spec, read_data=False)  # of the whole, so that complaints name its shapes
    share = _share(source, spec, rank, world)
    family = FAMILIES[spec.family]
    sizes = {
        "num_attention_heads": _count(share.heads),
        "num_key_value_heads": _count(share.kv_heads(spec.kv_heads)),
        "head_dim": spec.head_dim,
        "intermediate_size": _count(share.features),
    }
    config = {**source.config, **sizes, **{family.keys.get(key, key): size for key, size in sizes.items()}}
    if family.shapes is not None:
        config[family.shapes.by_layer] = {
            str(layer): {"head_dim": shape.head_dim, "num_key_value_heads": _count(share.kv_heads(shape.kv_heads))}
            for layer, shape in enumerate(spec.shapes)
        }
    cuts = {p.name: Cut(p.cut[0], *share.span(spec, p)) for p in parameters(spec) if p.cut is not None}
    return ShardedSource(source, config, cuts, f"{rank}/{world}")


def _share(source: CheckpointSource, spec: ModelSpec, rank: int, world: int) -> Share:
    where = f"{source.path}: cannot be split among {world} processes"
    if world > 1 and spec.qk_norm == "whole" and spec.names.q_norm is not None:
        raise UnsupportedError(
            f"{where}: the norms of queries and keys of {spec.family} models are of all heads together; use one process"
        )
    if world > 1 and spec.latent is not None:
        raise UnsupportedError(
            f"{where}: the latent attention of {spec.family} models is not dealt out among processes; use one process"
        )
    if world > 1 and spec.experts is not None:
        raise UnsupportedError(
            f"{where}: the experts of {spec.family} models are not dealt out among processes; use one process"
        )
    if world > 1 and spec.recurrent:
        raise UnsupportedError(
            f"{where}: the recurrent layers of {spec.family} models are not dealt out among processes; use one process"
        )
    if world > 1 and spec.sloped:
        raise UnsupportedError(
            f"{where}: the slopes of {spec.family} models are of all heads together; use one process"
        )
    if not _heads_divide(spec, world):
        counts = [str(count) for count in range(2, spec.heads + 1) if _heads_divide(spec, count)]
        keys = " or ".join(str(count) for count in sorted({count for count, _ in spec.attention_sizes}))
        raise UnsupportedError(
            f"{where}: it has {spec.heads} attention heads and {keys} key/value heads; use "
            + (f"{' or '.join(counts)}" if counts else "one process")
        )
    heads = spec.heads // world
    unit = 1
    for parameter in parameters(spec):
        if parameter.cut is not None and parameter.cut[0] == 1:
            assert parameter.layer is not None
            info, columns = source.tensors[parameter.name], heads * spec.shape(parameter.layer).head_dim
            needed = column_unit(info)
            if parameter.cut[1] == "features":
                unit = lcm(unit, needed)
            elif columns % needed:
                raise UnsupportedError(
                    f"{where}: {info.name} has {columns} columns for each, which are no whole blocks of {needed} "
                    f"({info.stored_as}); use fewer processes, or convert the model with a smaller block size"
                )
    blocks = -(-spec.intermediate_size // unit)
    if blocks < world:
        raise UnsupportedError(
            f"{where}: the {spec.intermediate_size} columns of {spec.names.down.format(layer=0)}.weight are "
            f"{blocks} blocks of {unit}; use fewer processes, or convert the model with a smaller block size"
        )
    first, last = (min(spec.intermediate_size, unit * (blocks * part // world)) for part in (rank, rank + 1))
    return Share(rank, world, (rank * heads, (rank + 1) * heads), (first, last))


def _count(span: tuple[int, int]) -> int:
    return span[1] - span[0]


def _scaled(span: tuple[int, int], factor: int) -> tuple[int, int]:
    return span[0] * factor, span[1] * factor


def _heads_divide(spec: ModelSpec, world: int) -> bool:
    counts = [count for count, _ in spec.attention_sizes]
    return spec.heads % world == 0 and all(count % world == 0 or world % count == 0 for count in counts)
