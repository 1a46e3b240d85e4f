"""The structure of a model, recorded from its configuration alone: what is computed from what.

The weights are shapes with names. Nothing is read and nothing computed; no torch is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from itertools import groupby
from math import prod
from typing import Literal

from kbit.graph.operations import (
    Activate,
    Adapt,
    Add,
    Attend,
    ByHeads,
    Columns,
    Convolve,
    CrossAttend,
    Embed,
    FitHeads,
    Given,
    Mix,
    Multiply,
    Norm,
    Operation,
    Project,
    Recur,
    Rotate,
    Scale,
    Scan,
    SigmoidGate,
    SoftCap,
    StoreKeys,
    SumParts,
    Symbol,
)
from kbit.graph.ops import Vector, Weight
from kbit.graph.recording import Recorder
from kbit.models.blocks import Weights
from kbit.models.decoder import DecoderDefinition, DecoderWeights
from kbit.models.parameter import Parameter
from kbit.models.params import OUTSIDE, own_parameters, weightless_norms
from kbit.models.spec import RECURRENT, ModelSpec


@dataclass(frozen=True, eq=False)
class NamedMatrix(Weight):
    """A matrix that is nothing but its declaration."""

    name: str
    size: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    @property
    def nbytes(self) -> int:
        return 0


@dataclass(frozen=True, eq=False)
class NamedVector:
    """A vector likewise: a `kbit.graph.ops.Vector`."""

    name: str
    shape: tuple[int, ...]
    nbytes: int = 0


@dataclass(frozen=True)
class Seam:
    """Features that can be scaled where they are made and where they are multiplied, and nothing changes.

    Attributes:
        consumers: the matrices that multiply them, and all that reads them.
        producer: the tensor whose values (of a norm) or rows (of a matrix) make them.
        biases: vectors that are added to what the producer makes.
        kind: what is between: nothing ("norm"), the product with an activated gate ("product"), or attention, which
            takes the features as values and may give them to several heads ("values").
    """

    consumers: tuple[str, ...]
    producer: str
    biases: tuple[str, ...]
    kind: Literal["norm", "product", "values"]


@dataclass(frozen=True, eq=False)
class Structure:
    """A recorded body.

    Attributes:
        operations: in order.
        result: the hidden states.
    """

    operations: tuple[Operation, ...]
    result: Symbol

    def producers(self) -> dict[str, str]:
        """Which matrix made the features that a matrix of the body multiplies, by name.

        Norms, sums over processes and activations keep features apart, and are looked through: a gated activation to
        what multiplies, attention to the values, the residual stream to what was added to it last, and a mixture to its
        first expert.
        """
        made: dict[Symbol, str] = {}
        values: dict[int, str] = {}  # of layers
        found: dict[str, str] = {}
        for operation in self.operations:
            if isinstance(operation, Embed):
                made[operation.out] = _name(operation.weight)
            elif isinstance(operation, Columns):
                continue  # of features of all layers, which nothing multiplies
            elif isinstance(operation, Norm | SumParts | Scale | SoftCap | Rotate | FitHeads | SigmoidGate):
                made[operation.out] = made[operation.x]
            elif isinstance(operation, ByHeads):
                made[operation.out] = _name(operation.weight)
            elif isinstance(operation, Add | Multiply):
                made[operation.out] = made[operation.y]
            elif isinstance(operation, Attend):
                if operation.v is not None:
                    values[operation.attention.layer] = made[operation.v]
                made[operation.out] = values[operation.attention.layer]
            elif isinstance(operation, Activate):
                gated = operation.up if operation.up in made else None
                made[operation.out] = made[operation.gate if gated is None else gated]
            elif isinstance(operation, Convolve | Recur | Scan):
                made[operation.out] = made[operation.x]
            elif isinstance(operation, Mix):
                experts = operation.experts
                for gate, up, down in zip(experts.gates, experts.ups, experts.downs, strict=True):
                    found[_name(gate)] = found[_name(up)] = made[operation.x]
                    found[_name(down)] = _name(up)
                made[operation.out] = _name(experts.downs[0])
            elif isinstance(operation, CrossAttend | StoreKeys | Given | Adapt):
                raise ValueError("what an encoder's values become is in another recording, and adapters in none")
            else:
                for weight, out in zip(operation.weights, operation.outs, strict=True):
                    found[_name(weight)] = made[operation.x]
                    made[out] = _name(weight)
        return found

    def seams(self) -> list[Seam]:
        """Where features can be scaled, in the order of the computation.

        What experts read, their router reads too, and stays as it is: a router is no matrix that is quantized.
        """
        readers: dict[Symbol, list[Operation]] = {}
        makers: dict[Symbol, Operation] = {}
        for operation in self.operations:
            for field in fields(operation):
                value = getattr(operation, field.name)
                outs = value if field.name == "outs" else (value,) if field.name == "out" else ()
                makers |= dict.fromkeys(outs, operation)
                if isinstance(value, Symbol) and field.name != "out":
                    readers.setdefault(value, []).append(operation)
        found: list[Seam] = []
        for operation in self.operations:
            if isinstance(operation, Mix) and operation.mixture.clamp is None:
                experts = operation.experts
                for gate, up, bias, down in zip(
                    experts.gates, experts.ups, experts.up_biases, experts.downs, strict=True
                ):
                    if gate is up:  # which is squared
                        continue
                    added = () if bias is None else (_vector(bias),)
                    found.append(Seam((_name(down),), _name(up), added, "product"))
        for symbol, operations in readers.items():
            projects = [operation for operation in operations if isinstance(operation, Project)]
            maker = makers.get(symbol)
            if symbol is self.result or maker is None or len(projects) < len(operations):
                continue
            if any(operation.x is not symbol for operation in projects):
                continue  # a residual stream
            consumers = tuple(_name(weight) for operation in projects for weight in operation.weights)
            if isinstance(maker, Norm):
                if not _vector(maker.weight):
                    continue
                biases = (maker.bias,) if maker.bias is not None else ()
                found.append(Seam(consumers, _vector(maker.weight), tuple(_vector(bias) for bias in biases), "norm"))
                continue
            made = maker.up if isinstance(maker, Activate) else maker.v if isinstance(maker, Attend) else None
            before = makers.get(made) if made is not None else None
            if made is None or not isinstance(before, Project) or readers[made] != [maker] or before.activation:
                continue
            at = before.outs.index(made)
            bias = before.biases[at]
            kind: Literal["product", "values"] = "product" if isinstance(maker, Activate) else "values"
            found.append(Seam(consumers, _name(before.weights[at]), () if bias is None else (_vector(bias),), kind))
        return found

    def sharing(self) -> list[tuple[str, ...]]:
        """The matrices that multiply the same input, by name, in the order of their products."""
        groups: dict[Symbol, tuple[str, ...]] = {}
        for operation in self.operations:
            if isinstance(operation, Project):
                names = tuple(_name(weight) for weight in operation.weights)
                groups[operation.x] = groups.get(operation.x, ()) + names
            elif isinstance(operation, Mix):
                experts = operation.experts
                pairs = zip(experts.gates, experts.ups, strict=True)
                names = tuple(dict.fromkeys(_name(weight) for pair in pairs for weight in pair))
                groups[operation.x] = groups.get(operation.x, ()) + names
                groups |= {Symbol(down.shape[1]): (_name(down),) for down in experts.downs}
        return list(groups.values())


def recorded(spec: ModelSpec, layers: int | None = None) -> Structure:
    """The body of a model.

    Args:
        spec: the model.
        layers: the first so many layers only; None: all.
    """
    if layers is not None and layers < spec.layers:
        shapes = spec.shapes[:layers]
        spec = replace(spec, layers=layers, windows=spec.windows[:layers], rotated=spec.rotated[:layers], shapes=shapes)
        nets = {name: getattr(spec, name) for name in RECURRENT}
        cut = {name: replace(net, layers=net.layers[:layers]) for name, net in nets.items() if net is not None}
        spec = replace(spec, **cut)
    recorder = Recorder(Symbol(1))
    weights = assemble(spec, _named_matrix, lambda parameter: NamedVector(parameter.name, parameter.shape))
    result = DecoderDefinition(spec, weights).body(recorder, recorder.input)
    return Structure(tuple(recorder.operations), result)


def assemble(
    spec: ModelSpec, matrix: Callable[[Parameter], Weight], vector: Callable[[Parameter], Vector]
) -> DecoderWeights:
    """A model's weights, from what makes one of its declaration.

    Args:
        spec: the model.
        matrix: makes a matrix of its declaration: a linear's, the embedding or a head.
        vector: makes a norm's weight or a bias; that of a norm without one has no name.
    """
    declared = own_parameters(spec)
    inside = groupby((p for p in declared if p.layer is not None), key=lambda parameter: parameter.layer)
    layers = []
    for index, parts in inside:
        assert index is not None
        found = _weights(parts, matrix, vector)
        ones = {
            slot: vector(Parameter("", slot, index, "norm", (width,)))
            for slot, width in weightless_norms(spec, index).items()
        }
        layers.append(replace(found, norms={**found.norms, **ones}))
    outside = [p for p in declared if p.layer is None]
    embedding = matrix(outside[0])
    head = next((matrix(p) for p in outside if p.role == "head"), embedding)
    final = _weights((p for p in outside if p.role in OUTSIDE), matrix, vector)
    if spec.sloped:
        slopes = Parameter("slopes", "distances", None, "distances", (spec.heads,))
        final = replace(final, biases={**final.biases, "distances": vector(slopes)})
    if spec.sinusoids is not None:
        table = Parameter("sinusoids", "positions", None, "rows", (spec.position_rows, spec.hidden_size))
        final = replace(final, matrices={**final.matrices, "positions": matrix(table)})
    return DecoderWeights(embedding, tuple(layers), final, head)


def _named_matrix(parameter: Parameter) -> NamedMatrix:
    rows, columns = parameter.shape
    return NamedMatrix(parameter.name, (rows, columns))


def _weights(
    declared: Iterable[Parameter], matrix: Callable[[Parameter], Weight], vector: Callable[[Parameter], Vector]
) -> Weights:
    matrices: dict[str, Weight] = {}
    norms: dict[str, Vector] = {}
    biases: dict[str, Vector] = {}
    for parameter in declared:
        if parameter.role in ("linear", "router", "rows", "table"):
            matrices[parameter.slot] = matrix(parameter)
        else:
            vectors = norms if parameter.role == "norm" else biases
            if parameter.role in ("distances", "taps") or not parameter.shape:  # as operations take them: vectors
                parameter = replace(parameter, shape=(prod(parameter.shape),))
            vectors[parameter.slot] = vector(parameter)
    return Weights(matrices, norms, biases)


def _vector(vector: Vector) -> str:
    assert isinstance(vector, NamedVector)
    return vector.name


def _name(weight: Weight) -> str:
    assert isinstance(weight, NamedMatrix)
    return weight.name
