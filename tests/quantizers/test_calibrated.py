"""Calibrated methods on a real model: what they are for, and that a killed conversion continues to the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_cases import Stopped, files_of

from kbit.backends.reference.backend import ReferenceBackend
from kbit.calibration.request import CalibrationRequest
from kbit.checkpoint.resolve import open_model
from kbit.evaluate.compare import compare
from kbit.formats.quant_format import QuantFormat
from kbit.host.errors import UsageError
from kbit.models.load import load_decoder
from kbit.quantizers.calibrated import CalibratedRounding, Gptq, TwoSided
from kbit.quantizers.convert import convert
from kbit.quantizers.method import Method, MethodInput
from kbit.quantizers.plan import make_plan
from kbit.quantizers.rtn import RoundToNearest
from kbit.text.datasets import resolve_data
from kbit.text.tokenizer import Tokenizer
from kbit.text.windows import make_windows

REQUEST = CalibrationRequest(tokens=8192)


@pytest.mark.usefixtures("one_thread")
def test_a_real_model_is_less_than_two_thirds_as_far_off(data_dir: Path) -> None:
    """novels-0.7m at 3 bits, calibrated on 8,192 tokens of its own, on a novel that it never saw."""
    novel = data_dir / "novels" / "heldout" / "Doyle_Hound_1902.txt"
    model = data_dir / "models" / "novels-0.7m"
    if not (novel.exists() and model.exists()):
        pytest.skip(f"{novel} or {model} is not there")
    with open_model(str(model)) as source:
        windows = make_windows(resolve_data(str(novel)), Tokenizer.from_source(source), "gptq", 256, 2560)
        original = load_decoder(source, ReferenceBackend())
        found = {}
        for method in (RoundToNearest(), Gptq(REQUEST), TwoSided(REQUEST)):
            plan = make_plan(source, QuantFormat.parse("nf3-b64"), method=method)
            quantized = load_decoder(method.apply(MethodInput(source, plan)), ReferenceBackend())
            found[method.name] = compare(quantized, original, windows).kl_mean
    assert found["gptq"] < 0.75 * found["rtn"]
    assert found["ldlq2"] < 0.67 * found["rtn"]


def quantize(model: Path, out: Path, method: Method, **options: Any) -> None:
    with open_model(str(model)) as source:
        plan = make_plan(source, QuantFormat.parse("nf3-b32"), embedding_bits=6, shard_bytes=4000, method=method)
        convert(source, plan, out, **options)


@pytest.mark.parametrize("tensors", [1, 5, 13])
def test_a_killed_run_continues_to_the_same_bytes(tmp_path: Path, tiny_model: Path, tensors: int) -> None:
    method = TwoSided(CalibrationRequest(tokens=512))
    quantize(tiny_model, tmp_path / "whole", method)
    seen = 0

    def on_tensor(tensor: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == tensors:
            raise Stopped

    with pytest.raises(Stopped):
        quantize(tiny_model, tmp_path / "out", method, on_tensor=on_tensor)
    quantize(tiny_model, tmp_path / "out", method)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_the_manifest_says_what_was_used(tmp_path: Path, tiny_model: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 40, encoding="utf-8")
    method = TwoSided(CalibrationRequest.of([str(text)], 512))
    quantize(tiny_model, tmp_path / "out", method)
    with open_model(str(tiny_model)) as source:
        sampled = make_plan(source, QuantFormat.parse("nf3-b32"), method=TwoSided())
        of_text = make_plan(source, QuantFormat.parse("nf3-b32"), method=method)
    assert sampled.plan_id != of_text.plan_id
    manifest = next(path for path in (tmp_path / "out").iterdir() if b'"ldlq2"' in path.read_bytes())
    for said in (b'"name": "' + str(text).encode(), resolve_data(str(text)).sha256.encode(), b"two_sided"):
        assert said in manifest.read_bytes()


def test_texts_that_are_too_short_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A short text. " * 30, encoding="utf-8")
    with pytest.raises(UsageError, match=r"text.txt has 420 tokens, but 1,024 are wanted.* --calibration-tokens 256"):
        quantize(tiny_model, tmp_path / "out", TwoSided(CalibrationRequest.of([str(text)], 1024)))


@pytest.mark.parametrize("method", [Gptq, TwoSided])
def test_inputs_alone_serve_too(tmp_path: Path, tiny_model: Path, method: type[CalibratedRounding]) -> None:
    """Without gradients nothing is known of embedding and head, which are rounded all the same."""
    quantize(tiny_model, tmp_path / "out", method(CalibrationRequest(tokens=256, gradients=False)))
    with open_model(str(tmp_path / "out")) as quantized, open_model(str(tiny_model)) as source:
        for name, info in source.tensors.items():
            if len(info.shape) == 2:
                error = quantized.read(name) - source.read(name)
                assert float(error.norm() / source.read(name).norm()) < 0.35
                assert torch.isfinite(error).all()
