"""optimum-quanto's folders open with the weights that it dequantizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_cases import saved_model
from packed_cases import Packed, assert_weights, draw, draw_scales, edit_tensors, refused, write_layer
from safetensors.torch import load_file

from kbit.checkpoint.resolve import open_model
from kbit.host.errors import UnsupportedError

SECTION = {"quant_method": "quanto", "weights": "int8"}
HELD = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


def table(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (T, width) in slices upon another, the first lowest."""
    slices = 8 // bits
    parts = torch.nn.functional.pad(codes, (0, 0, 0, -len(codes) % slices)).reshape(slices, -1, codes.shape[1])
    return sum(part << (bits * place) for place, part in enumerate(parts)).to(torch.uint8)  # type: ignore[union-attr]


def low_bits(
    bits: int, width: int, dtype: torch.dtype, *, integer: bool = False, end: str = "weight"
) -> Callable[[torch.Size, torch.Generator], Packed]:
    """A layer of 2 or 4 bits; `width` columns share a scale."""

    def pack(shape: torch.Size, generator: torch.Generator) -> Packed:
        count = shape.numel() // width
        codes = draw((count, width), 2**bits, generator)
        scale = draw_scales((count, 1), dtype, generator)
        shift: torch.Tensor
        if integer:
            shift = draw((count, 1), 2**bits, generator).to(torch.uint8)
            weight = scale * (codes.to(torch.int8) - shift.to(torch.int8))
        else:
            shift = (scale * 2 ** (bits - 1) * (1 + 0.1 * torch.randn((count, 1), generator=generator))).to(dtype)
            weight = scale * codes.to(torch.uint8) - shift
        tensors = {
            f"{end}._data._data": table(codes, bits),
            f"{end}._scale": scale,
            f"{end}._shift": shift,
            end.replace("weight", "input_scale"): torch.ones((), dtype=dtype),
            end.replace("weight", "output_scale"): torch.ones((), dtype=dtype),
        }
        return Packed(tensors, weight.reshape(shape))

    return pack


def eight_bits(kind: torch.dtype, dtype: torch.dtype) -> Callable[[torch.Size, torch.Generator], Packed]:
    def pack(shape: torch.Size, generator: torch.Generator) -> Packed:
        scale = draw_scales((shape[0], 1), dtype, generator)
        values = 100 * torch.randn(shape, generator=generator)
        data = values.round().clamp(-128, 127).to(kind) if kind == torch.int8 else values.to(kind)
        weight = scale * (data if kind == torch.int8 else data.to(dtype))
        return Packed({"weight._data": data, "weight._scale": scale}, weight)

    return pack


@pytest.mark.parametrize("dtype", HELD)
@pytest.mark.parametrize("shape", [(97, 48), (19, 100)])
@pytest.mark.parametrize("bits", [2, 4])
def test_whole_rows(tmp_path: Path, bits: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Fewer than 128 columns have no groups, and numbers of rows that the slices do not share out evenly."""
    weights = write_layer(tmp_path / "m", SECTION, low_bits(bits, shape[1], dtype), shape)
    assert_weights(tmp_path / "m", weights, HELD[dtype], f"quanto qint{bits}")


def write_group(out: Path, layer: str, bits: int, shape: tuple[int, int], width: int, **options: Any) -> Any:
    """A folder of one layer of a model with 160 hidden numbers."""
    end = f"{layer}.weight"
    weights = write_layer(out, SECTION, low_bits(bits, width, end=end, **options), shape)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "hidden_size": 160}))
    return {f"a.{end}": weights["a.weight"]}


@pytest.mark.parametrize("dtype", HELD)
@pytest.mark.parametrize(
    ("layer", "shape", "width"), [("q_proj", (96, 160), 32), ("down_proj", (160, 384), 128), ("o_proj", (160, 288), 96)]
)
@pytest.mark.parametrize("bits", [2, 4])
def test_groups(tmp_path: Path, bits: int, layer: str, shape: tuple[int, int], width: int, dtype: torch.dtype) -> None:
    """The shape follows from the layer's name and the model's width."""
    weights = write_group(tmp_path / "m", layer, bits, shape, width, dtype=dtype)
    assert_weights(tmp_path / "m", weights, HELD[dtype], f"quanto qint{bits}")


@pytest.mark.parametrize("dtype", HELD)
def test_integer_shifts(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = write_group(tmp_path / "m", "q_proj", 4, (96, 160), 32, dtype=dtype, integer=True)
    held = "F32" if dtype == torch.float32 else "int4-b32-asym-fp32"
    assert_weights(tmp_path / "m", weights, held, "quanto qint4")


@pytest.mark.parametrize("dtype", HELD)
@pytest.mark.parametrize(
    ("kind", "label"),
    [
        (torch.int8, "qint8"),
        (torch.float8_e4m3fn, "qfloat8_e4m3fn"),
        (torch.float8_e5m2, "qfloat8_e5m2"),
    ],
)
def test_eight_bits(tmp_path: Path, kind: torch.dtype, label: str, dtype: torch.dtype) -> None:
    weights = write_layer(tmp_path / "m", SECTION, eight_bits(kind, dtype))
    held = {"qint8": "int8", "qfloat8_e4m3fn": "float8", "qfloat8_e5m2": HELD[dtype]}[label]
    assert_weights(tmp_path / "m", weights, held, f"quanto {label}")


def test_a_bias_says_how_many_rows_there_are(tmp_path: Path) -> None:
    weights = write_group(tmp_path / "m", "strange", 4, (96, 160), 32, dtype=torch.bfloat16)
    edit_tensors(tmp_path / "m", lambda tensors: tensors.update({"a.strange.bias": torch.ones(96)}))
    assert_weights(tmp_path / "m", weights, "BF16", "quanto qint4")


@pytest.mark.parametrize("qtype", ["qint2", "qint4", "qint8", "qfloat8_e4m3fn", "qfloat8_e5m2"])
def test_against_the_library(tmp_path: Path, qtype: str) -> None:
    """optimum-quanto quantizes a model, writes the folder, and says what its weights are."""
    quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    transformers = pytest.importorskip("transformers")
    saved_model("llama", tmp_path / "model", hidden_size=160, intermediate_size=320, num_attention_heads=5, head_dim=32)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    saved = quanto.QuantizedModelForCausalLM.quantize(model, weights=getattr(quanto, qtype), exclude="lm_head")
    expected = {
        f"{name}.weight": module.weight.dequantize().detach()
        for name, module in model.named_modules()
        if isinstance(module, quanto.QLinear)
    }
    assert len(expected) == 21
    saved.save_pretrained(tmp_path / "m")
    assert (tmp_path / "m" / "quanto_qmap.json").is_file()
    held = {"qint8": "int8", "qfloat8_e4m3fn": "float8"}.get(qtype, "BF16")
    assert_weights(tmp_path / "m", expected, held, f"quanto {qtype}")


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: value})


W = "a.q_proj.weight."


@pytest.mark.parametrize(
    ("edit", "message", "kind"),
    [
        (drop(W + "_scale"), "q_proj.weight._scale is missing", None),
        (drop(W + "_shift"), "q_proj.weight._shift is missing", None),
        (drop(W + "_data._data"), "should be packed by quanto, but none is", None),
        (put(W + "_data._data", torch.zeros(7, 32, dtype=torch.uint8)), "does not fit a.q_proj.weight._scale", None),
        (put(W + "_shift", torch.zeros(3, 1)), "_shift is F32 .3, 1., but should be", None),
        (put("a.q_proj.bias", torch.zeros(95)), "480 groups of 32 make no matrix of 161 columns", None),
    ],
)
def test_what_does_not_fit(tmp_path: Path, edit: Any, message: str, kind: Any) -> None:
    write_group(tmp_path / "m", "q_proj", 4, (96, 160), 32, dtype=torch.float16)
    edit_tensors(tmp_path / "m", edit)
    refused(tmp_path / "m", message, **({"kind": kind} if kind else {}))


def test_a_layer_of_unknown_shape(tmp_path: Path) -> None:
    write_group(tmp_path / "m", "strange", 4, (96, 160), 32, dtype=torch.float16)
    refused(tmp_path / "m", "does not say how many columns a.strange.weight has", UnsupportedError)


def test_other_floats(tmp_path: Path) -> None:
    write_layer(tmp_path / "m", SECTION, eight_bits(torch.float8_e5m2, torch.float16))
    edit_tensors(tmp_path / "m", put("a.weight._data", torch.full((96, 128), torch.inf).to(torch.float8_e5m2)))
    refused(tmp_path / "m", "a.weight._data holds values that are not finite")


def test_plain_weights_beside_a_map(tmp_path: Path) -> None:
    """A model that was quantized but not frozen is stored plain."""
    saved_model("llama", tmp_path / "m")
    (tmp_path / "m" / "quantization_map.json").write_text("{}")
    with pytest.warns(match="quanto is named as the quantizer, but the weights are plain"):
        source = open_model(str(tmp_path / "m"))
    with source:
        assert source.tensors.keys() == load_file(tmp_path / "m" / "model.safetensors").keys()
