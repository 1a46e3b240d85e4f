"""Rounding in turn, the rest tuned against the original: what changes, repeatable, and dropped where it harms."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversion_cases import files_of
from numpy.typing import NDArray

from kbit.backends.reference.backend import ReferenceBackend
from kbit.calibration.held_out import held_out_tokens
from kbit.calibration.request import CalibrationRequest
from kbit.calibration.run import calibrate
from kbit.calibration.workers import workers
from kbit.checkpoint.resolve import open_model
from kbit.formats.planes_codec import PlanesTensor
from kbit.formats.quant_format import QuantFormat
from kbit.models.decoder import Decoder
from kbit.models.families import spec_from_config
from kbit.models.load import load_decoder
from kbit.models.params import parameters
from kbit.quantizers import distillation, in_turn
from kbit.quantizers.calibrated import TwoSided
from kbit.quantizers.convert import convert
from kbit.quantizers.distillation import Given, Pair, divergence
from kbit.quantizers.in_turn import Tuned, in_turns, scale_rows
from kbit.quantizers.method import Method, MethodInput, QuantizedSource
from kbit.quantizers.plan import Plan, make_plan
from kbit.quantizers.settings import Tuning
from kbit.quantizers.tuned import TunedTwoSided

REQUEST = CalibrationRequest(tokens=512)


class Short(TunedTwoSided):
    tuning = Tuning(turns=3, steps=2, batch=2, rate=0.02, weight_rate=0.02)


def plan_of(source: object, method: Method, text: str = "nf3-b32") -> Plan:
    return make_plan(source, QuantFormat.parse(text), embedding_bits=6, method=method)  # type: ignore[arg-type]


def test_a_model_is_nearer_to_its_original(data_dir: Path) -> None:
    """novels-0.7m at 2 bits, on text that neither rounding nor tuning has seen: nearer than rounding at once, and than
    with rows and norms alone tuned after it."""
    model = data_dir / "models" / "novels-0.7m"
    if not model.exists():
        pytest.skip(f"{model} is not there")
    request = CalibrationRequest(tokens=2048)

    class Shorter(TunedTwoSided):
        tuning = Tuning(turns=4, steps=2, batch=4)

    class AfterAll(TunedTwoSided):
        tuning = Tuning(turns=1, steps=8, batch=4)

    with open_model(str(model)) as source:
        seen = []
        for method in (TwoSided(request), AfterAll(request), Shorter(request)):
            made = method.apply(MethodInput(source, plan_of(source, method, "lloyd2-b64")))
            seen.append(divergence(source, made, held_out_tokens(source, CalibrationRequest(tokens=8192))))
    assert seen[2] < 0.98 * seen[1] < 0.98 * seen[0]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever tuning finds is taken: weights at random have nothing to gain."""
    found = count()
    monkeypatch.setattr(distillation, "divergence", lambda *_: float(next(found)))


@pytest.mark.usefixtures("taken")
def test_what_is_rounded_later_makes_good_what_was_rounded_before(tiny_model: Path) -> None:
    """Matrices of the first turn have the codes that they have at once, and other scales of rows; later ones were
    tuned before they were rounded."""
    with open_model(str(tiny_model)) as source:
        plain = made_by(TwoSided(REQUEST), source)
        tuned = made_by(Short(REQUEST), source)
        linear = [p.source for p in plan_of(source, Short(REQUEST)).tensors if p.role == "linear"]
        spec = spec_from_config(source.config)
        ordered = [p.name for p in parameters(spec) if p.role == "linear" and p.layer is not None]
        first, *later = in_turns({name: source.tensors[name].numel for name in ordered}, Short.tuning.turns)
        assert len(later) == 2
        assert {info.name for info in linear} == {*first, *later[0], *later[1]}
        for name in first:
            before, after = (PlanesTensor.of(made.read_quantized(name)) for made in (plain, tuned))  # type: ignore[attr-defined]
            assert torch.equal(before.codes(), after.codes())
            share = after.scales / before.scales
            assert torch.allclose(share, share.mean(dim=1, keepdim=True).expand_as(share), rtol=2e-3)  # of a row, one
            assert float((share.mean(dim=1) - 1).abs().max()) > 1e-3
        for name in [*later[0], *later[1]]:
            assert not torch.equal(plain.read_quantized(name).dequantize(), tuned.read_quantized(name).dequantize())  # type: ignore[attr-defined]


def test_turns() -> None:
    sizes = {"q": 10, "k": 10, "v": 10, "o": 10, "gate": 20, "up": 20, "down": 20}
    assert in_turns(sizes, 4) == [["q", "k"], ["v", "o"], ["gate", "up"], ["down"]]
    assert in_turns(sizes, 1) == [list(sizes)]
    assert in_turns(sizes, 100) == [[name] for name in sizes]


@pytest.mark.usefixtures("taken")
def test_norms_change_too_and_are_stored_as_they_were(tmp_path: Path, tiny_model: Path) -> None:
    """What is evaluated is what a folder holds: every weight of a norm in its own type, times its factor."""
    with open_model(str(tiny_model)) as source:
        plan = plan_of(source, Short(REQUEST))
        tuned = plan.method.apply(MethodInput(source, plan))
        convert(source, plan, tmp_path / "out")
        norms = [p.source for p in plan.tensors if len(p.source.shape) == 1]
        assert norms
        with open_model(str(tmp_path / "out")) as written:
            for norm in norms:
                before, after = source.read(norm.name), tuned.read(norm.name)
                assert not torch.equal(before, after)
                assert torch.allclose(before.float(), after.float(), rtol=0.2)
                assert torch.equal(after, written.read(norm.name))
                assert torch.equal(after[1:], tuned.read_rows(norm.name, 1, len(after)))
                assert written.tensors[norm.name].stored_as == norm.stored_as


def test_gradients_are_slopes_of_the_divergence(tiny_model: Path) -> None:
    """Along the gradient of all that is free together: some weights, other matrices' rows, norms."""
    with open_model(str(tiny_model)) as source, workers(1) as pool:
        made, ids = made_by(TwoSided(REQUEST), source, "lloyd2-b32"), calibrate(source, REQUEST).ids()
        assert ids is not None
        pair = Pair(source, made, pool, 1)
        assert pair.norms.keys() < pair.places.keys()
        matrices = [name for name in pair.places if name not in pair.norms]
        weights = {name: source.read(name).float() for name in matrices[::2]}
        factors = {name: torch.ones(source.tensors[name].shape[0]) for name in pair.places if name not in weights}
        fixed = Given({matrices[1]: source.read(matrices[1]).float()})
        slopes = pair.gradients(Given(weights, factors), fixed, ids[:1])
        count = len(weights)
        assert all(float(slope.norm()) > 0 for slope in slopes)

        def at(by: tuple[float, float]) -> float:
            moved = [
                value + by[i >= count] * slopes[i] for i, value in enumerate((*weights.values(), *factors.values()))
            ]
            given = Given(
                {**fixed.weights, **dict(zip(weights, moved[:count], strict=True))},
                dict(zip(factors, moved[count:], strict=True)),
            )
            return pair.divergence(ids[:1], given)

        for which, step in ((slice(0, count), 0.01), (slice(count, None), 0.02)):
            length = float(torch.cat([slope.flatten() for slope in slopes[which]]).norm())
            there = (step / length, 0.0) if which.start == 0 else (0.0, step / length)
            back = (-there[0], -there[1])
            assert (at(there) - at(back)) / (2 * step) == pytest.approx(length, rel=0.03)


def made_by(method: Method, source: object, text: str = "nf3-b32") -> QuantizedSource:
    return method.apply(MethodInput(source, plan_of(source, method, text)))  # type: ignore[arg-type]


@pytest.mark.usefixtures("taken")
def test_threads_and_a_second_run_do_not_show(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        # Calibrated anew each time, so that nothing is remembered.
        monkeypatch.setenv("KBIT_CALIBRATION", str(tmp_path / f"calibration{threads}"))
        for run in range(threads):
            with open_model(str(tiny_model)) as source:
                convert(source, plan_of(source, Short(REQUEST)), tmp_path / f"out{threads}-{run}")
            found.append(files_of(tmp_path / f"out{threads}-{run}"))
    torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def test_what_does_not_help_is_dropped(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KBIT_CALIBRATION", str(tmp_path))

    def harm(
        source: object, start: object, targets: dict[str, torch.Tensor], rounded: Any, *_: object, **__: object
    ) -> Tuned:
        return Tuned({name: rounded(name, 1.3 * target) for name, target in targets.items()}, {})

    monkeypatch.setattr(in_turn, "round_in_turn", harm)
    with open_model(str(tiny_model)) as source:
        plain = made_by(TwoSided(REQUEST), source)
        for _ in range(2):  # the second time, from what was kept
            tuned = made_by(Short(REQUEST), source)
            for name, info in source.tensors.items():
                if len(info.shape) == 2:
                    assert torch.equal(plain.read(name), tuned.read(name))


@pytest.mark.usefixtures("taken")
def test_shared_scales_have_no_factors(tiny_model: Path) -> None:
    """Those that are double-quantized belong to many rows: they stay as they are where they were rounded first."""
    with open_model(str(tiny_model)) as source:
        plain, tuned = (made_by(method(REQUEST), source, "nf4-b32-dq") for method in (TwoSided, Short))
        name = next(p.name for p in parameters(spec_from_config(source.config)) if p.role == "linear")
        assert torch.equal(plain.read(name), tuned.read(name))


def test_offsets_are_scaled_too() -> None:
    format = QuantFormat.parse("int4-b32-asym")
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)) + 1
    matrix = format.encode(lambda start, stop: weight[start:stop], (5, 64))
    factors = torch.linspace(0.5, 1.5, 5)
    scaled = scale_rows(matrix, factors).dequantize()
    assert torch.allclose(scaled, matrix.dequantize() * factors[:, None], rtol=2**-9, atol=2**-9)


def test_the_divergence_is_that_of_the_engine(tiny_model: Path) -> None:
    with open_model(str(tiny_model)) as source:
        made, ids = made_by(TwoSided(REQUEST), source), calibrate(source, REQUEST).ids()
        assert ids is not None
        original, model = (load_decoder(either, ReferenceBackend()) for either in (source, made))
        kl = []
        for row in ids:
            a, b = (torch.log_softmax(torch.from_numpy(logits_of(decoder, row)), -1) for decoder in (original, model))
            kl.append(float((a.exp() * (a - b)).sum(-1).mean()))
        assert divergence(source, made, ids) == pytest.approx(np.mean(kl), rel=1e-4)


def logits_of(decoder: Decoder, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    return decoder.extend(ids.tolist(), decoder.new_cache(1, len(ids)), last_only=False)
