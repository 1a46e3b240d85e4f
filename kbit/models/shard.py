"""How a model is split among processes: each has some of the heads and some of the MLP's features.

    q, k, v, gate, up   rows (output features), with their biases
    o, down             columns (input features): each process's product is a part of a sum, which the model asks for
                        (`kbit.graph.ops.Ops.sum_parts`)
    all the rest        whole: embedding, head, norms (a head's queries and keys too), the biases of o and down

So a layer needs two sums over the processes and nothing else: attention and activation stay where their inputs are.

    latent attention    heads, as above; what makes the latent vectors is whole
    experts             every process has some features of each, so that all take the same part in every token; the
                        biases of their down projections, which are weighed before the sum, are the first process's
    delta nets          heads of keys with those of values that read them, and their features of the convolution
    state spaces        heads of values; keys and queries are those of all heads, and whole
    convolutions        features (LFM2): rows of the three linears before, columns of the one after
    encoder-decoders    both stacks as above; what the decoder attends to of the encoder's text by heads

A norm of all heads together (OLMo 2's of queries and keys, a state space's) has its mean over all processes.

`kbit.models.params` declares it, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import lcm

from kbit.checkpoint.shard import ShardedSource, column_unit
from kbit.checkpoint.source import CheckpointSource
from kbit.formats.codec import Cut
from kbit.host.errors import UnsupportedError
from kbit.models.check import check_tensors
from kbit.models.families import FAMILIES, spec_from_config
from kbit.models.family import Family
from kbit.models.parameter import Parameter, Unit
from kbit.models.params import own_parameters
from kbit.models.scan_config import SHARES
from kbit.models.spec import ModelSpec

Span = tuple[int, int]


@dataclass(frozen=True)
class Share:
    """What one process has, as half-open ranges.

    Attributes:
        rank, world: its number, and how many there are.
        heads: query heads.
        features: by unit ("features", "expert features", "shared features"), of an MLP as wide as the configuration
            says, of an expert, and of the shared one.
    """

    rank: int
    world: int
    heads: Span
    features: Mapping[Unit, Span]

    def part(self, count: int) -> Span:
        """Of a number of things that all processes have as many of."""
        return self.rank * count // self.world, (self.rank + 1) * count // self.world

    def kv_heads(self, count: int) -> Span:
        """Of so many key/value heads: those that its query heads need."""
        first = self.rank * count // self.world
        return first, first + max(1, count // self.world)

    def spans(self, spec: ModelSpec, parameter: Parameter) -> tuple[Span, ...]:
        """Its rows or columns of a parameter that is cut, one run after another."""
        assert parameter.cut is not None
        if parameter.cut[1] == "sinks":  # one number a head
            return (self.heads,)
        assert parameter.layer is not None
        shape, unit = spec.shape(parameter.layer), parameter.cut[1]
        if unit == "features":
            return (_scaled(self.features[unit], shape.width // spec.intermediate_size),)
        if unit in self.features:
            return (self.features[unit],)
        if unit == "kv_heads":
            return (_scaled(self.kv_heads(shape.kv_heads), shape.head_dim),)
        if unit.startswith("delta"):
            return self._of_delta(spec, unit)
        if unit == "conv features":
            assert spec.conv is not None
            return (self.part(spec.conv.features),)
        if unit.startswith("scan"):
            return self._of_scan(spec, unit)
        each = shape.head_dim if unit == "heads" else 1
        if spec.latent is not None and unit == "latent keys":
            each = spec.head_dim - spec.rope.dim
        if spec.latent is not None and unit == "latent values":
            each = spec.latent.value_dim
        return (_scaled(self.heads, each),)

    def _of_delta(self, spec: ModelSpec, unit: Unit) -> tuple[Span, ...]:
        delta = spec.delta
        assert delta is not None
        heads = self.part(delta.heads)
        values = _scaled(heads, delta.value_dim)
        if unit == "delta heads":
            return (heads,)
        if unit == "delta values":
            return (values,)
        keys, all_keys = _scaled(self.part(delta.key_heads), delta.key_dim), delta.key_heads * delta.key_dim
        return keys, _moved(keys, all_keys), _moved(values, 2 * all_keys)

    def _of_scan(self, spec: ModelSpec, unit: Unit) -> tuple[Span, ...]:
        scan = spec.scan
        assert scan is not None
        heads = self.part(scan.heads)
        values, inner = _scaled(heads, scan.value_dim), scan.inner_width
        if unit != "scan inputs":
            return (heads if unit == "scan heads" else values,)
        return values, (inner, inner + 2 * scan.groups * scan.key_dim)  # one group of keys and queries is all heads'


def shard(source: CheckpointSource, rank: int, world: int) -> ShardedSource:
    """The part of a model that process `rank` of `world` holds, as a checkpoint of its own.

    Its configuration has the share's heads, key/value heads and features. Features are dealt out in whole blocks of the
    down projections, as evenly as that goes; heads must divide evenly. More processes than key/value heads share these:
    each has a copy of the one its queries need.

    Args:
        source: the whole model; stays open and is read through.

    Raises:
        CheckpointError, UnsupportedError: the model cannot be run at all, or not by so many processes.
    """
    spec = spec_from_config(source.config, where=f"config of {source.path}")
    check_tensors(source, spec, read_data=False)  # of the whole, so that complaints name its shapes
    family = FAMILIES[spec.family]
    if spec.encoder is not None and family.encoder is not None:
        stacks = [(spec.encoder, family.encoder), (spec, family)]
    else:
        stacks = [(spec, family)]
    given: dict[str, object] = {}
    cuts: dict[str, tuple[Cut, ...]] = {}
    others: set[str] = set()
    for stack, own in stacks:
        share = _share(source, stack, own, rank, world)
        sizes = _sizes(stack, own, share)
        for key, size in {**sizes, **{own.keys.get(key, key): size for key, size in sizes.items()}}.items():
            if len(stacks) > 1 and key in own.keys:
                continue  # each stack has names of its own for these
            if key in given and given[key] != size:
                raise UnsupportedError(
                    f"{source.path}: cannot be split among {world} processes: encoder and decoder have one {key}, and "
                    "blocks of other sizes; convert it with one format for both, or use one process"
                )
            given[key] = size
        for parameter in own_parameters(stack):
            if parameter.cut is not None:
                spans = share.spans(stack, parameter)
                cuts[parameter.name] = tuple(Cut(parameter.cut[0], *span) for span in spans)
            elif parameter.once and rank:
                others.add(parameter.name)
    return ShardedSource(source, {**source.config, **given}, cuts, f"{rank}/{world}", zeros=others)


def _sizes(spec: ModelSpec, family: Family, share: Share) -> dict[str, object]:
    """What a process's configuration says that the whole one's does not, by the names that kbit has for keys."""
    world = share.world
    sizes: dict[str, object] = {
        "num_attention_heads": _count(share.heads),
        "num_key_value_heads": _count(share.kv_heads(spec.kv_heads)),
        "head_dim": spec.head_dim,
        **{key: _count(share.features[units[0]]) for key, units in _widths(spec, family).items()},
    }
    if spec.latent is not None:
        sizes["v_head_dim"] = spec.latent.value_dim
        del sizes["head_dim"]  # which follows, and may stand for something else
    if spec.delta is not None:
        sizes["linear_num_key_heads"] = spec.delta.key_heads // world
        sizes["linear_num_value_heads"] = spec.delta.heads // world
    if spec.scan is not None:
        sizes |= {"mamba_n_heads": spec.scan.heads // world, "mamba_d_head": spec.scan.value_dim, SHARES: world}
    if spec.conv is not None:
        sizes[SHARES] = world
    if family.adjusted:
        sizes["block_auto_adjust_ff_dim"] = False  # which has been done
    if family.shapes is not None:
        sizes[family.shapes.by_layer] = {
            str(layer): {"head_dim": shape.head_dim, "num_key_value_heads": _count(share.kv_heads(shape.kv_heads))}
            for layer, shape in enumerate(spec.shapes)
        }
    return sizes


def _widths(spec: ModelSpec, family: Family) -> dict[str, list[Unit]]:
    """The keys of a configuration that say how wide MLPs and experts are, and what is as wide (or a multiple)."""
    widths: dict[str, list[Unit]] = {family.mlp_width: ["features"]}
    if spec.experts is not None and family.experts is not None:
        rules = family.experts
        widths.setdefault(rules.width, []).append("expert features")
        if spec.experts.shared_width:
            key = rules.width if rules.shared in (None, "n_shared_experts") else str(rules.shared)
            widths.setdefault(key, []).append("shared features")
    return widths


def _share(source: CheckpointSource, spec: ModelSpec, family: Family, rank: int, world: int) -> Share:
    where = f"{source.path}: cannot be split among {world} processes"
    if world > 1:
        for lacks, what in _undivided(spec):
            if lacks:
                raise UnsupportedError(f"{where}: {what.format(family=spec.family)}; use one process")
    if not _heads_divide(spec, world):
        counts = [str(count) for count in range(2, spec.heads + 1) if _heads_divide(spec, count)]
        keys = " or ".join(str(count) for count in sorted({count for count, _ in spec.attention_sizes}))
        more = "" if spec.delta is None else f", and delta nets of {spec.delta.key_heads} heads of keys"
        more += "" if spec.scan is None else f", and state spaces of {spec.scan.heads} heads"
        raise UnsupportedError(
            f"{where}: it has {spec.heads} attention heads and {keys} key/value heads{more}; use "
            + (f"{' or '.join(counts)}" if counts else "one process")
        )
    heads = Share(rank, world, _scaled((rank, rank + 1), spec.heads // world), {})
    whole: dict[Unit, int] = {"features": spec.intermediate_size}
    if spec.experts is not None:
        whole |= {"expert features": spec.experts.width, "shared features": spec.experts.shared_width}
    columns = [(p, p.cut[1]) for p in own_parameters(spec) if p.cut is not None and p.cut[0] == 1]
    for parameter, unit in columns:
        info, needed = source.tensors[parameter.name], column_unit(source.tensors[parameter.name])
        for start, stop in () if unit in whole else heads.spans(spec, parameter):
            if start % needed or (stop % needed and stop != parameter.shape[1]):
                raise UnsupportedError(
                    f"{where}: {info.name} has {stop - start} columns for each, which are no whole blocks of {needed} "
                    f"({info.stored_as}); use fewer processes, or convert the model with a smaller block size"
                )
    features: dict[Unit, Span] = {}
    for units in _widths(spec, family).values():
        own = [parameter for parameter, unit in columns if unit in units]
        span = _dealt(source, whole[units[0]], own, rank, world, where)
        # What is several times as wide has as many times the features.
        features |= {unit: _scaled(span, whole[unit] // max(1, whole[units[0]])) for unit in units}
    return replace(heads, features=features)


def _undivided(spec: ModelSpec) -> Iterable[tuple[bool, str]]:
    """What cannot be dealt out: whether a model has it, and what it is."""
    return (
        (
            spec.scan is not None and (spec.scan.groups > 1 or spec.scan.beside or spec.scan.norms != 1),
            "the state spaces of {family} models, with groups or beside attention, are not dealt out among processes",
        ),
        (spec.sound is not None, "{family} models, which read sound, are not dealt out among processes"),
        (spec.sloped, "the slopes of {family} models are of all heads together"),
    )


def _dealt(source: CheckpointSource, width: int, columns: list[Parameter], rank: int, world: int, where: str) -> Span:
    """A process's features of `width`, in whole blocks of the matrices that have them as columns."""
    unit = lcm(1, *(column_unit(source.tensors[parameter.name]) for parameter in columns))
    blocks = -(-width // unit)
    if blocks < world:
        raise UnsupportedError(
            f"{where}: the {width} columns of {columns[0].name} are {blocks} blocks of {unit}; use fewer processes, or "
            "convert the model with a smaller block size"
        )
    first, last = (min(width, unit * (blocks * part // world)) for part in (rank, rank + 1))
    return first, last


def _count(span: Span) -> int:
    return span[1] - span[0]


def _scaled(span: Span, factor: int) -> Span:
    return span[0] * factor, span[1] * factor


def _moved(span: Span, by: int) -> Span:
    return span[0] + by, span[1] + by


def _heads_divide(spec: ModelSpec, world: int) -> bool:
    counts = [count for count, _ in spec.attention_sizes]
    if spec.delta is not None and spec.delta.key_heads % world:
        return False
    if spec.scan is not None and spec.scan.heads % world:
        return False
    if spec.conv is not None and spec.conv.features % world:
        return False
    if spec.qk_norm == "whole" and any(count % world for count in counts):
        return False  # a norm over all heads would count twice those that several have
    return spec.heads % world == 0 and all(count % world == 0 or world % count == 0 for count in counts)
