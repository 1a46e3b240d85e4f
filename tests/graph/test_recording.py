"""Definitions become programs: what is fused, where values live, what is refused, and that nothing changes by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from decoder_cases import DictSource, tame_tensors, tiny_config
from recorded_cases import (
    BODIES,
    VOCABULARY,
    WIDTH,
    Body,
    Made,
    Parts,
    adapted,
    adapted_stream,
    adapted_twice,
    by_runs,
    capped,
    gated,
    kept_products,
    last_norm,
    late_norm,
    own_residual,
    parallel,
    plain,
    post_norm,
    randn,
    read_later,
    shared_norm,
    squared,
    summed,
    swapped,
    turned,
)

from kbit.backends.cpu.backend import NativeBackend
from kbit.backends.cpu.lowering import place
from kbit.backends.reference.backend import ReferenceBackend
from kbit.graph.batch import Batch
from kbit.graph.fuse import fuse
from kbit.graph.operations import (
    Add,
    Project,
    Symbol,
    reads,
    writes,
)
from kbit.graph.ops import Attention, Ops
from kbit.graph.recording import Recorder
from kbit.graph.states import Recurrence, ShortConvolution
from kbit.models.decoder import DecoderDefinition
from kbit.models.load import load_decoder

pytestmark = pytest.mark.usefixtures("one_thread")


# float32 sums of at most 40 terms in another order, four products deep; see test_decoder_parity.py.
RELATIVE = 1e-5


def recorded(body: Body) -> tuple[list[Any], Symbol]:
    recorder = Recorder(Symbol(1))
    parts = Parts()
    result = body(parts, recorder, recorder.embed(parts.embedding, recorder.input))
    return recorder.operations, result


def kinds(operations: Sequence[object]) -> list[str]:
    """Operations in short, with what was fused into them."""
    found = []
    for operation in operations:
        name = type(operation).__name__.lower()
        if isinstance(operation, Project):
            name = "+".join(
                ["norm"] * (operation.norm is not None)
                + [f"project{len(operation.weights)}"]
                + [operation.activation or ""] * (operation.activation is not None)
                + ["parts"] * operation.parts
                + ["residual"] * (operation.residual is not None)
            )
        found.append(name)
    return found


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (gated, ["norm+project2+silu", "project1+residual"]),
        (swapped, ["norm+project2", "activate", "project1+residual"]),
        (plain, ["project1+gelu", "project1"]),
        (shared_norm, ["norm", "project1", "project1", "activate", "project1+residual"]),
        (parallel, ["norm+project1", "norm+project1", "project1+residual", "project1+residual"]),
        (late_norm, ["norm", "project1", "project1+residual", "project1", "project1+residual"]),
        (own_residual, ["norm", "project1+residual"]),
        (kept_products, ["project2", "activate", "project1", "project1+residual"]),
        (last_norm, ["project1", "norm"]),
        (squared, ["project1", "activate", "project1"]),
        (read_later, ["norm+project1", "add", "project1+residual"]),
        (post_norm, ["norm+project1+gelu", "project1+parts", "norm", "add"]),
        (summed, ["project1+silu", "project1+parts+residual"]),
        (by_runs, ["norm", "project1", "project1", "scale", "add"]),
        (capped, ["project1", "scale", "softcap", "add"]),
        (turned, ["project1", "rotate", "rotate", "rotate", "add"]),
        (adapted, ["norm", "project2", "adapt", "activate", "project1+parts+residual", "adapt"]),
        (adapted_stream, ["project1", "adapt", "project1+residual", "adapt"]),
        (adapted_twice, ["project1", "project1", "adapt", "add", "project1+residual"]),
    ],
)
def test_what_is_fused(body: Body, expected: list[str]) -> None:
    assert kinds(fuse(*recorded(body))) == ["embed", *expected]


@pytest.mark.parametrize("body", BODIES)
def test_fusing_and_placing_change_nothing(body: Body) -> None:
    """Made-up models through the native program and through plain calls."""
    ids = [3, 49, 0, 3, 17]
    reference, native = ReferenceBackend(), NativeBackend(2, compute="fp32", kv="fp32")
    expected = reference.bind(Made(reference, body))  # type: ignore[arg-type]
    found = native.bind(Made(native, body))  # type: ignore[arg-type]
    for _ in range(2):  # a second pass finds buffers as the first has left them
        caches = reference.new_cache(1, 2, 1, 4, 5), native.new_cache(1, 2, 1, 4, 5)
        for cache in caches:
            cache.reserve([3, 2])
        batch = Batch.of([ids[:3], ids[3:]], [0, 0], "all")
        if "adapted" in body.__name__:  # type: ignore[attr-defined]
            batch = replace(batch, adapters=np.array([1, 0]))
        wanted, hidden = expected.hidden(batch, caches[0]), torch.as_tensor(found.hidden(batch, caches[1]))
        assert float((hidden - wanted).abs().max() / wanted.abs().max()) <= RELATIVE
        logits = torch.as_tensor(found.logits(hidden))
        assert float((logits - expected.logits(hidden)).abs().max() / logits.abs().max()) <= RELATIVE
        ids = ids[::-1]


@pytest.mark.parametrize("body", BODIES)
def test_no_value_is_overwritten_before_its_last_use(body: Body) -> None:
    operations, result = recorded(body)
    operations = fuse(operations, result)
    buffers = place(operations, result).buffers
    holds: dict[int, Symbol] = {}
    for operation in operations:
        for symbol in reads(operation):
            assert holds[buffers[symbol]] is symbol
        for out in writes(operation):
            assert out.width == next(s.width for s, b in buffers.items() if b == buffers[out])
            holds[buffers[out]] = out
    assert holds[buffers[result]] is result


class TestDecoders:
    def test_a_layer_is_five_operations_and_six_buffers(self) -> None:
        config = tiny_config("llama")
        definition = load_decoder(DictSource(config, tame_tensors(config)), ReferenceBackend())._runner._definition
        recorder = Recorder(Symbol(1))
        result = definition.body(recorder, recorder.input)
        operations = fuse(recorder.operations, result)
        layer = ["norm+project3", "attend", "project1+parts+residual"]
        layer += ["norm+project2+silu", "project1+parts+residual"]
        assert kinds(operations) == ["embed", *(3 * layer)]
        # The residual stream, q, k, v, what attention saw, and the MLP's inside: layers share them.
        assert sorted(place(operations, result).widths) == [16, 16, 48, 48, 48, 77]

    def test_the_definition_is_called_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        called: list[str] = []
        for name in ("body", "head"):
            original = getattr(DecoderDefinition, name)

            def counting(self: Any, *arguments: Any, name: str = name, original: Any = original) -> Any:
                called.append(name)
                return original(self, *arguments)

            monkeypatch.setattr(DecoderDefinition, name, counting)
        config = tiny_config("llama")
        decoder = load_decoder(DictSource(config, tame_tensors(config)), NativeBackend(1))
        assert called == ["body", "head"]
        cache = decoder.new_cache(2, 9)
        for width in (3, 1, 5):
            decoder.forward(torch.ones(2, width, dtype=torch.int64), cache)
        decoder.logits(decoder.hidden_states(torch.ones(1, 2, dtype=torch.int64), decoder.new_cache(1, 2)))
        assert called == ["body", "head"]


class TestRefusals:
    def test_a_residual_that_is_read_again(self) -> None:
        """What is fused never does; whoever fuses otherwise is told."""

        def twice(w: Parts, ops: Ops[Any], x: Any) -> Any:
            y = ops.add(x, ops.linear(w.square, ops.norm(x, w.scale, 1e-5)))
            return ops.add(x, ops.linear(w.square, y))

        def itself(w: Parts, ops: Ops[Any], x: Any) -> Any:
            return ops.add(x, ops.linear(w.square, x))

        for body, left in ((twice, ["norm+project1", "add", "project1+residual"]), (itself, ["project1", "add"])):
            operations, result = recorded(body)
            fused = fuse(operations, result)
            assert kinds(fused) == ["embed", *left]
            place(fused, result)
            product = next(op for op in operations if isinstance(op, Project))
            total = next(op for op in operations if isinstance(op, Add))
            wrong = replace(product, outs=(total.out,), residual=total.x)
            broken = [wrong if op is product else op for op in operations if op is not total]
            with pytest.raises(ValueError, match="a residual is read again"):
                place(broken, result)

    def test_widths_that_do_not_fit(self) -> None:
        w, recorder = Parts(), Recorder(Symbol(1))
        x = recorder.embed(w.embedding, recorder.input)
        for call, message in (
            (lambda: recorder.linear(w.back, x), "the input of a linear has 24 features where 40 are needed"),
            (lambda: recorder.linear(w.first, x, w.scale), "a bias has 24 features where 40"),
            (lambda: recorder.add(x, recorder.linear(w.first, x)), "a residual has 24 features where 40"),
            (lambda: recorder.norm(x, w.bias, 1e-5), "the weight of a norm has 40 features, no divisor of 24"),
            (lambda: recorder.activate(x, recorder.linear(w.first, x), "silu"), "multiplies has 40 features where 24"),
            (lambda: recorder.activate(x, None, "swish"), "'swish' is not one of silu"),
            (lambda: recorder.rotate(x, 10, (0, 2)), "heads of 10 features do not fit 24"),
            (lambda: recorder.rotate(x, 8, (0, 5)), "or the angles"),
            (lambda: recorder.fit_heads(x, 5, 4), "5 heads of 4 features cannot be made of 24"),
            (lambda: recorder.fit_heads(x, 6, 4, Symbol(5)), "or what they share"),
            (lambda: recorder.multiply(x, Symbol(25)), "a factor of every feature has 25 features where 24 are needed"),
            (lambda: recorder.embed(w.embedding, x), "token ids of the pass and nothing else"),
        ):
            with pytest.raises(ValueError, match=message):
                call()

    @pytest.mark.parametrize(
        "head",
        [
            lambda w, ops, x: ops.activate(ops.logits(w.embedding, x), None, "silu"),
            lambda w, ops, x: ops.logits(w.embedding, ops.linear(w.square, x)),
            lambda w, ops, x: ops.norm(x, w.scale, 1e-5),
            lambda w, ops, x: ops.scale(ops.soft_cap(ops.logits(w.embedding, x), 3.0), 2.0),
        ],
    )
    def test_heads_that_a_program_cannot_have(self, head: Body) -> None:
        backend = NativeBackend(1)
        made = Made(backend, gated)
        made.head = lambda ops, hidden: head(made.parts, ops, hidden)  # type: ignore[method-assign]
        with pytest.raises(ValueError, match="a head is a norm, or none, and one product"):
            backend.bind(made)  # type: ignore[arg-type]

    def test_a_head_without_a_norm(self) -> None:
        backend = NativeBackend(1, compute="fp32")
        made = Made(backend, gated)
        made.head = lambda ops, hidden: ops.logits(made.parts.embedding, hidden)  # type: ignore[method-assign]
        hidden = randn(4, WIDTH, seed=9)
        expected = hidden @ randn(VOCABULARY, WIDTH, seed=0).T
        found = torch.as_tensor(backend.bind(made).logits(hidden))  # type: ignore[arg-type]
        assert float((found - expected).abs().max()) <= RELATIVE

    def test_weights_of_another_backend(self) -> None:
        reference, native = ReferenceBackend(), NativeBackend(1)
        with pytest.raises(TypeError, match="prepared by another backend"):
            native.bind(Made(reference, gated))  # type: ignore[arg-type]

    def test_attention_to_the_keys_of_an_earlier_layer(self) -> None:
        """They must have been written, with the same heads; and columns and factors must be there."""
        w, recorder = Parts(), Recorder(Symbol(1))
        x, keys = recorder.embed(w.embedding, recorder.input), Symbol(8)
        own = Attention(1, x.width // 8, 1, 8, 1.0, None)
        with pytest.raises(ValueError, match="no earlier attention writes the keys of layer 1"):
            recorder.self_attention(x, None, None, own)
        recorder.self_attention(x, keys, keys, own)
        with pytest.raises(ValueError, match="the head of a layer that is attended to has 8 features where 4"):
            recorder.self_attention(x, None, None, replace(own, heads=x.width // 4, head_dim=4))
        with pytest.raises(ValueError, match="keys and values of its own, or neither"):
            recorder.self_attention(x, keys, None, own)
        recorder.self_attention(x, None, None, replace(own, window=3))
        assert reads(recorder.operations[-1]) == (x,)
        with pytest.raises(ValueError, match="2 features from 7 on are not among 8"):
            recorder.columns(keys, 7, 2)
        with pytest.raises(ValueError, match="a factor that is a parameter has"):
            recorder.scale(x, w.scale)

    def test_what_recurrent_and_cross_layers_are_given(self) -> None:
        w, recorder = Parts(), Recorder(Symbol(1))
        x = recorder.embed(w.embedding, recorder.input)
        cross = Attention(0, 2, 1, 8, 1.0, None, "cross", "encoder", "none")
        narrow, gate, wide, rates = Symbol(8), Symbol(2), Symbol(16), torch.zeros(2)
        with pytest.raises(ValueError, match="'self' where 'encoder'"):
            recorder.store_keys(narrow, narrow, replace(cross, mask="causal", source="self"))
        with pytest.raises(ValueError, match="'encoder' where 'self'"):
            recorder.self_attention(x, narrow, narrow, cross)
        with pytest.raises(ValueError, match="keys and values has"):
            recorder.store_keys(x, narrow, cross)
        with pytest.raises(ValueError, match="queries has"):
            recorder.cross_attention(narrow, cross)
        with pytest.raises(ValueError, match="a gate has 8 features where 2 are needed"):
            recorder.recur(wide, narrow, gate, rates, Recurrence(0, 1, 2, 4, 4))
        with pytest.raises(ValueError, match="queries, keys and values has 8 features where 16 are needed"):
            recorder.recur(narrow, gate, gate, rates, Recurrence(0, 1, 2, 4, 4))
        with pytest.raises(ValueError, match="the rates of a recurrence has 3 features where 2 are needed"):
            recorder.recur(wide, gate, gate, torch.zeros(3), Recurrence(0, 1, 2, 4, 4))
        with pytest.raises(ValueError, match="2 heads of keys are not shared alike by 3 heads of values"):
            Recurrence(0, 2, 3, 4, 4)
        with pytest.raises(ValueError, match="a gate of every feature has 2 features where 8 are needed"):
            recorder.sigmoid_gate(narrow, gate)
        with pytest.raises(ValueError, match="the weight of a convolution has"):
            recorder.short_convolution(narrow, w.scale, ShortConvolution(0, 4, 8))
        before = len(recorder.operations)
        recorder.store_keys(narrow, narrow, cross)
        out = recorder.recur(wide, gate, gate, rates, Recurrence(0, 1, 2, 4, 4))
        stored, recurred = recorder.operations[before:]
        assert (reads(stored), writes(stored)) == ((narrow, narrow), ())
        assert (reads(recurred), writes(recurred)) == ((wide, gate, gate), (out,))
