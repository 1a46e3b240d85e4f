"""Row scales and norms tuned against the original: what changes, repeatable, and dropped where it harms."""

from __future__ import annotations

from itertools import count
from pathlib import Path

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
from kbit.formats.quant_format import QuantFormat
from kbit.formats.quant_tensor import QuantTensor
from kbit.models.decoder import Decoder
from kbit.models.load import load_decoder
from kbit.quantizers import row_scales
from kbit.quantizers.calibrated import TwoSided
from kbit.quantizers.convert import convert
from kbit.quantizers.method import Method, MethodInput, QuantizedSource
from kbit.quantizers.plan import Plan, make_plan
from kbit.quantizers.row_scales import divergence, scale_rows
from kbit.quantizers.settings import Tuning
from kbit.quantizers.tuned import TunedTwoSided

REQUEST = CalibrationRequest(tokens=512)


class Short(TunedTwoSided):
    tuning = Tuning(steps=4, batch=2, rate=0.02)


def plan_of(source: object, method: Method, text: str = "nf3-b32") -> Plan:
    return make_plan(source, QuantFormat.parse(text), embedding_bits=6, method=method)  # type: ignore[arg-type]


def test_a_model_is_nearer_to_its_original(data_dir: Path) -> None:
    """novels-0.7m at 2 bits, on text that neither rounding nor tuning has seen."""
    model = data_dir / "models" / "novels-0.7m"
    if not model.exists():
        pytest.skip(f"{model} is not there")
    request = CalibrationRequest(tokens=2048)

    class Shorter(TunedTwoSided):
        tuning = Tuning(steps=6, batch=2, rate=4e-3)

    with open_model(str(model)) as source:
        seen = []
        for method in (TwoSided(request), Shorter(request)):
            made = method.apply(MethodInput(source, plan_of(source, method, "lloyd2-b64")))
            seen.append(divergence(source, made, held_out_tokens(source, CalibrationRequest(tokens=8192))))
    assert seen[1] < 0.97 * seen[0]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever tuning finds is taken: weights at random have nothing to gain."""
    found = count()
    monkeypatch.setattr(row_scales, "divergence", lambda *_: float(next(found)))


@pytest.mark.usefixtures("taken")
def test_scales_change_and_codes_do_not(tiny_model: Path) -> None:
    with open_model(str(tiny_model)) as source:
        plain = made_by(TwoSided(REQUEST), source)
        tuned = made_by(Short(REQUEST), source)
        linear = [p.source.name for p in plan_of(source, Short(REQUEST)).tensors if p.role == "linear"]
        changed = 0
        for name in linear:
            before, after = plain.read_quantized(name), tuned.read_quantized(name)  # type: ignore[attr-defined]
            assert torch.equal(before.codes(), after.codes())
            share = after.scales / before.scales
            assert torch.allclose(share, share.mean(dim=1, keepdim=True).expand_as(share), rtol=2e-3)  # of a row, one
            changed += int((share.mean(dim=1) - 1).abs().max() > 1e-3)
    assert changed == len(linear)


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
    """Along the gradient of all factors together, rows' and norms'."""
    with open_model(str(tiny_model)) as source, workers(1) as pool:
        made, ids = made_by(TwoSided(REQUEST), source, "lloyd2-b32"), calibrate(source, REQUEST).ids()
        assert ids is not None
        pair = row_scales._Pair(source, made, pool)
        factors = {name: torch.ones(source.tensors[name].shape[0]) for name in pair.places}
        assert pair.norms.keys() < factors.keys()
        slopes = pair.gradients(factors, ids[:1])
        length = float(torch.cat(list(slopes.values())).norm())
        assert all(float(slopes[name].norm()) > 0 for name in pair.norms)

        def at(step: float) -> float:
            moved = {pair.places[name]: 1 + step / length * slope for name, slope in slopes.items()}
            with torch.no_grad():
                return float(pair._divergence(torch.from_numpy(ids[:1]), moved))

        assert (at(0.02) - at(-0.02)) / 0.04 == pytest.approx(length, rel=0.02)


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

    def harm(source: object, quantized: object, matrices: dict[str, QuantTensor], *_: object, **__: object) -> object:
        return {name: torch.full((matrix.shape[0],), 1.3) for name, matrix in matrices.items() if "proj" in name}

    monkeypatch.setattr(row_scales, "tune_rows", harm)
    with open_model(str(tiny_model)) as source:
        plain, tuned = made_by(TwoSided(REQUEST), source), made_by(Short(REQUEST), source)
        for name, info in source.tensors.items():
            if len(info.shape) == 2:
                assert torch.equal(plain.read(name), tuned.read(name))


def test_shared_scales_are_left_alone(tiny_model: Path) -> None:
    """Those that are double-quantized belong to many rows."""
    with open_model(str(tiny_model)) as source:
        plain, tuned = (made_by(method(REQUEST), source, "nf4-b32-dq") for method in (TwoSided, Short))
        for name in source.tensors:
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
