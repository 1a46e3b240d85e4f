"""Models of newer families converted: every width and every method makes of them what it makes of a Llama."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conversion_cases import check_exact, quantize

from kbit.backends.cpu.backend import NativeBackend
from kbit.backends.reference.backend import ReferenceBackend
from kbit.calibration.request import CalibrationRequest
from kbit.checkpoint.source import CheckpointSource
from kbit.formats.quant_format import QuantFormat
from kbit.graph.backend import Backend
from kbit.graph.batch import Batch
from kbit.models.load import load_decoder
from kbit.models.opening import open_model
from kbit.quantizers.awq import ActivationAware, ScaledView
from kbit.quantizers.calibrated import CalibratedRounding
from kbit.quantizers.convert import convert
from kbit.quantizers.method import MethodInput
from kbit.quantizers.methods import METHODS
from kbit.quantizers.plan import make_plan

pytestmark = pytest.mark.usefixtures("one_thread")

# Norms stored less 1 around both blocks, two rotations; fused matrices; a rotation apart from attention; experts beside
# one for all; experts in one tensor, with biases, a clamped gate and sinks; a table of positions, matrices lying down;
# attention and MLP side by side; latent attention; layers of two shapes, with shared keys and features of their own;
# gated delta nets, queries with their gates; convolutions between gates; Mamba-2.
FAMILIES = ["gemma3", "phi3", "hunyuan", "qwen2-moe", "gpt-oss", "gpt2", "gpt_neox"]
FAMILIES += ["deepseek-v2", "gemma4-e"]
FAMILIES += ["qwen3_5", "lfm2", "granite-hybrid"]
# Norms after sums and projections of embeddings; learned factors; norms before last linears; experts of scaled input.
LATER = ["opt-350m", "apertus", "bitnet", "llama4", "phimoe"]


def logits(source: CheckpointSource, backend: Backend | None = None) -> torch.Tensor:
    decoder = load_decoder(source, backend or ReferenceBackend())
    ids = np.arange(40) % 250
    return torch.as_tensor(decoder.run(Batch.packed(ids, np.array([40]), np.array([0])), decoder.new_cache(1, 40)))


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        *(("gemma3", bits) for bits in range(2, 9)),
        ("phi3", 3),
        ("phi3", 4),
        *(("gpt-oss", bits) for bits in (2, 3, 4, 5, 6, 7, 8)),
        *(("deepseek-v2", bits) for bits in (3, 4)),
        *(("gemma4-e", bits) for bits in (2, 3, 4, 5, 6, 7, 8)),
        ("gemma4-moe", 4),
        ("gemma4-dense", 3),
        *(("qwen3-next", bits) for bits in (2, 3, 4, 5, 6, 7, 8)),
        *(("llama4", bits) for bits in (2, 3, 4, 5, 6, 7, 8)),
        *(("phimoe", bits) for bits in (2, 5)),
        ("opt-350m", 3),
        ("apertus", 4),
        ("bitnet", 2),
    ],
)
def test_every_width(tmp_path: Path, published: Callable[[str], Path], name: str, bits: int) -> None:
    """What is read back is what was rounded, and both backends make the same of it."""
    format = f"{['nf', 'int'][bits % 2]}{bits}-b16"
    quantize(published(name), tmp_path / "out", format)
    check_exact(published(name), tmp_path / "out", format)
    with open_model(str(tmp_path / "out")) as result:
        expected = logits(result)
        found = logits(result, NativeBackend(2, compute="fp32", kv="fp32"))
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("name", "method"),
    [
        (family, name)
        for name, method in METHODS.items()
        # Tuning takes seconds; those of trellises round other formats as ldlq2 does.
        for family in FAMILIES[: 1 if name == "ldlq2-tuned" or name.startswith("trellis") else None]
        if not method.measured_only
    ],
)
def test_every_method(tmp_path: Path, published: Callable[[str], Path], name: str, method: str) -> None:
    """8 bits are the model: less than three times as far off as rounding to nearest, which knows nothing of a family."""
    chosen = METHODS[method]
    if isinstance(chosen, CalibratedRounding):
        chosen = chosen.calibrated_on(CalibrationRequest(tokens=256))
    format = QuantFormat.parse("int8-b16-asym" if method == "hqq" else "int8-b16")
    with open_model(str(published(name))) as source:
        expected = logits(source)
        rounded = METHODS["rtn"].apply(MethodInput(source, make_plan(source, QuantFormat.parse("int8-b16"))))
        nearest = float((logits(rounded) - expected).norm())
        convert(source, make_plan(source, format, method=chosen), tmp_path / "out")
    with open_model(str(tmp_path / "out")) as result:
        assert float((logits(result) - expected).norm()) < 3 * nearest < 0.3 * float(expected.norm())


class Unrounded(ScaledView):
    """The scaled model itself."""

    def read_weight(self, name: str) -> torch.Tensor:
        return self.target(name)


@pytest.mark.parametrize(
    "name", [*FAMILIES, *LATER, "olmo2", "granite", "glm4", "smollm3", "glm4-moe", "cohere", "opt", "bloom"]
)
def test_scaling_features_changes_nothing(published: Callable[[str], Path], name: str) -> None:
    """AWQ's scales go through norms, values and products and out again, whatever else a block does."""
    method = ActivationAware(CalibrationRequest(tokens=256))
    with open_model(str(published(name))) as source:
        plan = make_plan(source, QuantFormat.parse("int8-b16"), method=method)
        scaled = method.apply(MethodInput(source, plan))
        assert isinstance(scaled, ScaledView)
        scaled.__class__ = Unrounded
        changed = [each for each in source.tensors if not torch.equal(scaled.read(each), source.read(each))]
        assert changed
        expected = logits(source)
        # Products of scaled numbers round as those before, to 2^-24 of sums of 80, a few in a row.
        assert float((logits(scaled) - expected).abs().max()) < 400 * 2**-24 * float(expected.abs().max())
