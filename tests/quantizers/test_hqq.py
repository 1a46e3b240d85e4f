"""Half-quadratic quantization against rounding to nearest, and against its definition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conversion_cases import files_of, quantize

import kbit.quantizers.hqq as hqq
from kbit.backends.select import select_backend
from kbit.checkpoint.resolve import open_model
from kbit.evaluate.compare import compare
from kbit.evaluate.logits import ModelLogits
from kbit.formats.blockwise import quantize_blockwise
from kbit.formats.planes_codec import PlanesTensor
from kbit.formats.quant_format import QuantFormat
from kbit.host.errors import UsageError
from kbit.models.load import load_decoder
from kbit.quantizers.hqq import HalfQuadratic, quantize_half_quadratic
from kbit.quantizers.method import MethodInput
from kbit.quantizers.methods import get_method
from kbit.quantizers.plan import make_plan
from kbit.text.datasets import resolve_data
from kbit.text.tokenizer import Tokenizer
from kbit.text.windows import make_windows


def heavy_tailed(rows: int, columns: int, scale: float = 0.05) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(rows, columns, generator=generator)
    return scale * values * torch.rand(rows, columns, generator=generator).clamp(min=0.05).rsqrt()


def by_definition(block: torch.Tensor, bits: int, method: HalfQuadratic) -> torch.Tensor:
    """What one block stands for: the algorithm as published, in its own terms (s, z), without stored types."""
    top = 2**bits - 1
    s = top / (block.max() - block.min())
    z = -block.min() * s
    best = (torch.inf, block)
    for _ in range(method.iterations):
        codes = (block * s + z).round().clamp(0, top)
        found = (codes - z) / s
        error = float((block - found).abs().mean())
        if error >= best[0]:
            break
        best = (error, found)
        left = block - found
        kept = left.sign() * (left.abs() - left.abs().pow(method.norm - 1) / method.beta).clamp(min=0)
        z = (codes - (block - kept) * s).mean()
    return best[1]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("scale", [0.05, 2.0])  # with large errors shrinking leaves some
def test_it_is_the_published_algorithm(bits: int, scale: float) -> None:
    weight, method = heavy_tailed(6, 64, scale), HalfQuadratic()
    found = quantize_half_quadratic(weight, QuantFormat("int", bits, 32, asymmetric=True, scale_dtype="fp32"), method)
    blocks, ours = weight.view(-1, 32), found.dequantize().view(-1, 32)
    theirs = torch.stack([by_definition(block, bits, method) for block in blocks])
    # Where the error stands still but for rounding, one of the two may stop a step before the other: all errors are
    # equal to rounding, and nearly all blocks.
    same = torch.isclose(ours, theirs, atol=1e-5 * scale, rtol=1e-4).all(dim=1)
    assert same.sum() >= len(blocks) - 3
    errors = [(blocks - each).abs().mean(dim=1) for each in (ours, theirs)]
    assert torch.allclose(*errors, rtol=1e-3)


@pytest.mark.parametrize("columns", [64, 80, 24])  # whole blocks, a short last one, less than one
def test_no_block_has_a_larger_mean_error(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = heavy_tailed(40, columns)
    format = QuantFormat("int", 3, 32, asymmetric=True, scale_dtype="fp32")
    nearest = quantize_blockwise(weight, format)
    found = quantize_half_quadratic(weight, format, HalfQuadratic())
    assert torch.equal(PlanesTensor.of(found).scales, nearest.scales)
    mean = [
        torch.stack([part.mean(dim=1) for part in (weight - each.dequantize()).abs().split(32, dim=1)], dim=1)
        for each in (nearest, found)
    ]
    assert (mean[1] <= mean[0] * (1 + 1e-6)).all()
    assert mean[1].sum() < 0.97 * mean[0].sum()
    # However the rows are cut, the bits are the same.
    monkeypatch.setattr(hqq, "_CHUNK_WEIGHTS", 7 * columns)
    again = quantize_half_quadratic(weight, format, HalfQuadratic())
    assert all(torch.equal(again.stored[part], found.stored[part]) for part in found.stored)


def test_formats_without_offsets_are_refused(tiny_model: Path) -> None:
    with open_model(str(tiny_model)) as source, pytest.raises(UsageError, match="method hqq, format nf4-b64: .*-asym"):
        make_plan(source, QuantFormat(), method=get_method("hqq"))


def test_converting_twice_gives_the_same_bytes(tiny_model: Path, tmp_path: Path) -> None:
    for out in ("one", "two"):
        quantize(tiny_model, tmp_path / out, "int4-b32-asym", plan={"method": HalfQuadratic()})
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    # And they are what a sweep measures.
    with open_model(str(tiny_model)) as source, open_model(str(tmp_path / "one")) as written:
        format = QuantFormat("int", 4, 32, asymmetric=True)
        made = HalfQuadratic().apply(MethodInput(source, make_plan(source, format, method=HalfQuadratic())))
        name = "model.layers.0.mlp.down_proj.weight"
        assert torch.equal(made.read(name), written.read(name))


def test_a_real_model_diverges_less(novels_folder: str, data_dir: Path) -> None:
    novel = str(data_dir / "novels" / "heldout" / "Doyle_Hound_1902.txt")
    backend = select_backend("cpu", compute="fp32")
    with open_model(novels_folder) as source:
        windows = make_windows(resolve_data(novel), Tokenizer.from_source(source), "gptq", 256, 12 * 256)
        reference = ModelLogits(load_decoder(source, backend))
        kl = {}
        for name in ("rtn", "hqq"):
            plan = make_plan(source, QuantFormat("int", 2, 64, asymmetric=True), method=get_method(name))
            made = get_method(name).apply(MethodInput(source, plan))
            kl[name] = compare(load_decoder(made, backend), reference, windows).kl
    # Paired by window: the difference, and its error over the tokens.
    difference = (kl["rtn"] - kl["hqq"]).ravel()
    assert difference.mean() > 2 * difference.std() / len(difference) ** 0.5


def test_embeddings_keep_their_offsets(tiny_model: Path) -> None:
    """The default type of 6 bits has none, so HQQ takes 6 bits of its own."""
    with open_model(str(tiny_model)) as source:
        plan = make_plan(source, QuantFormat.parse("int4-b32-asym"), embedding_bits=6, method=get_method("hqq"))
    assert {str(tensor.format) for tensor in plan.tensors if tensor.role == "embedding"} == {"int6-b32-asym"}
