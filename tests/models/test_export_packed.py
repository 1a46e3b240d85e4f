"""What is exported for compressed-tensors: codes as they are, numbers bit for bit, and what cannot be said refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoder_cases import saved_model
from packed_cases import Packed, awq, draw, draw_scales, gptq, stream_words, write_packed
from safetensors.torch import load_file

from kbit.checkpoint.source import StoredSource
from kbit.formats.registry import parse_format
from kbit.host.errors import UnsupportedError, UsageError
from kbit.models.export_packed import ExportedPacked, export_compressed_tensors
from kbit.models.families import FAMILIES, spec_from_config
from kbit.models.family import family_of
from kbit.models.opening import open_model
from kbit.models.published import PublishedTensor, published_tensors
from kbit.quantizers.convert import convert
from kbit.quantizers.plan import make_plan

pytestmark = pytest.mark.usefixtures("one_thread")

CT = "compressed-tensors"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
Q_PROJ = "model.layers.0.self_attn.q_proj"


def opened(model: Path) -> StoredSource:
    source = open_model(str(model))
    assert isinstance(source, StoredSource)
    return source


def export(model: Path, out: Path, **options: Any) -> ExportedPacked:
    with opened(model) as source:
        return export_compressed_tensors(source, out, **options)


def converted(model: Path, out: Path, format: str) -> Path:
    with open_model(str(model)) as source:
        convert(source, make_plan(source, parse_format(format)), out)
    return out


def matrices(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    with opened(folder) as source:
        return {name: source.read_array(name) for name in source.tensors}


def assert_same(before: Path, after: Path, *, within: float = 0.0) -> None:
    """Every value is the same, or within that many units in the last place of float32 of its tensor's largest."""
    first, second = matrices(before), matrices(after)
    assert first.keys() == second.keys()
    for name, values in first.items():
        largest = float(np.abs(values).max())
        assert float(np.abs(second[name] - values).max()) <= within * 2.0**-23 * largest, name


def section(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert isinstance(found, dict)
    return found


def nvfp4(shape: torch.Size, generator: torch.Generator) -> Packed:
    """A layer as compressed-tensors writes NVFP4."""
    rows, columns = shape
    scales = (1 + 447 * torch.rand((rows, columns // 16), generator=generator)).to(torch.float8_e4m3fn)
    scales[0, 0] = 448.0
    codes = draw((rows, columns), 16, generator)
    tensors = {
        "weight_packed": (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8),
        "weight_scale": scales,
        "weight_global_scale": torch.tensor([4321.7]),
    }
    return Packed(tensors, torch.zeros(shape))


def mxfp4(shape: torch.Size, generator: torch.Generator) -> Packed:
    rows, columns = shape
    codes, exponents = draw((rows, columns), 16, generator), 115 + draw((rows, columns // 32), 10, generator)
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
    return Packed({"weight_packed": packed, "weight_scale": exponents.to(torch.uint8)}, torch.zeros(shape))


def fp8(shape: torch.Size, generator: torch.Generator) -> Packed:
    codes = (100 * torch.randn(shape, generator=generator)).clamp(-448, 448).to(torch.float8_e4m3fn)
    scales = draw_scales((shape[0], 1), torch.bfloat16, generator)
    return Packed({"weight": codes, "weight_scale": scales}, torch.zeros(shape))


def integers(bits: int, zeros: bool) -> Any:
    def pack(shape: torch.Size, generator: torch.Generator) -> Packed:
        rows, groups = shape[0], shape[1] // 32
        tensors = {
            "weight_packed": stream_words(draw(tuple(shape), 2**bits, generator), bits),
            "weight_scale": draw_scales((rows, groups), torch.float16, generator),
            "weight_shape": torch.tensor(shape),
        }
        if zeros:
            words = stream_words(draw((groups, rows), 2**bits, generator), bits)
            tensors["weight_zero_point"] = words.T.contiguous()
        return Packed(tensors, torch.zeros(shape))

    return pack


def group(bits: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": CT, "config_groups": {"group_0": {"weights": {"num_bits": bits, **more}}}}


# Case: bits, how layers are packed, and the type of scales that are to come out.
KINDS: dict[str, tuple[int, Any, str | None]] = {
    "nvfp4": (4, nvfp4, None),
    "mxfp4": (4, mxfp4, None),
    "fp8": (8, fp8, None),
    "int3": (3, integers(3, False), None),
    "int4 with zeros": (4, integers(4, True), "fp16"),
    "int7 with zeros": (7, integers(7, True), "fp16"),
}


@pytest.mark.parametrize("case", KINDS)
def test_a_folder_of_the_library_comes_back_as_it_was(tmp_path: Path, packable_model: Path, case: str) -> None:
    bits, pack, dtype = KINDS[case]
    write_packed(packable_model, tmp_path / "m", group(bits), pack)
    done = export(tmp_path / "m", tmp_path / "out", dtype=dtype)
    assert (done.packed, done.rounded, done.error) == (14, 0, 0.0)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("m", "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize(
    ("settings", "pack"),
    [
        (GPTQ, gptq(4, 32, symmetric=False, layout=1)),
        ({**GPTQ, "bits": 3, "sym": True}, gptq(3, 32, symmetric=True, layout=1)),
        ({"quant_method": "awq", "bits": 4, "group_size": 32}, awq(32)),
    ],
)
def test_others_integers_are_the_same_numbers(
    tmp_path: Path, packable_model: Path, settings: dict[str, Any], pack: Any
) -> None:
    write_packed(packable_model, tmp_path / "m", settings, pack)
    done = export(tmp_path / "m", tmp_path / "out")
    assert (done.packed, done.error) == (14, 0.0)
    assert_same(tmp_path / "m", tmp_path / "out")


@pytest.mark.parametrize("format", ["int4-b32", "int8-row", "int3-b16-dq", "int5-b64-bf16"])
def test_kbits_own_integers_keep_their_codes(tmp_path: Path, packable_model: Path, format: str) -> None:
    """Their codebook ends at 1, its numbers are rounded to float32 and so are the scales: within two units, each."""
    model = converted(packable_model, tmp_path / "q", format)
    done = export(model, tmp_path / "out")
    assert (done.packed, done.rounded) == (14, 0)
    assert done.error < 2.0**-22
    assert_same(model, tmp_path / "out", within=4)
    groups = section(tmp_path / "out")["config_groups"]
    assert [each["weights"]["num_bits"] for each in groups.values()] == [int(format[3])]
    # Two bytes a scale, and half of float16's step between numbers.
    narrow = export(model, tmp_path / "narrow", dtype="fp16")
    assert 0 < narrow.error <= 2.0**-11
    assert narrow.nbytes < done.nbytes


@pytest.mark.parametrize("family", ["phi3", "glm4", "gpt_neox", "qwen3-next", "qwen3_5"])
def test_published_layouts(tmp_path: Path, family: str) -> None:
    """Fused matrices, pairs side by side, rows by head, rows of several layers by head."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4}
    if family.startswith("qwen3"):
        sizes["linear_value_head_dim"] = 32
    if family == "qwen3-next":
        sizes |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    model = saved_model(family, tmp_path / "m", **sizes)
    quantized = converted(tmp_path / "m", tmp_path / "q", "int4-b32")
    export(quantized, tmp_path / "out")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    names = set(model.state_dict())
    modules = {name.removesuffix("_packed") for name in exported if name.endswith("weight_packed")}
    assert {name for name in modules if ".experts." not in name} <= names  # the class has its experts in one
    with open_model(str(quantized)) as source:
        from kbit.models.export import export_safetensors

        export_safetensors(source, tmp_path / "plain", "fp32")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    for name in modules:
        assert tuple(exported[f"{name}_shape"]) == plain[name].shape
        codes = unpacked(exported[f"{name}_packed"], 4, plain[name].shape[1])
        values = (codes - 8) * exported[f"{name}_scale"].repeat_interleave(32, 1)
        assert torch.allclose(values, plain[name], rtol=0, atol=2.0**-21 * float(plain[name].abs().max())), name


ORDERED = ("phi3", "glm4", "gpt_neox", "falcon", "gpt2", "qwen3-next", "qwen3_5", "lfm2", "ernie4_5")


@pytest.mark.parametrize("family", ORDERED)
def test_the_order_of_rows_is_that_of_values(tmp_path: Path, family: str) -> None:
    saved_model(family, tmp_path / "m")
    with opened(tmp_path / "m") as source:
        config = source.config
        layout, spec = family_of(FAMILIES, config, "m").layout, spec_from_config(config)
        for tensor in published_tensors(spec, layout):
            if isinstance(tensor, PublishedTensor) and not any(part.offset for part in tensor.parts):
                values = torch.cat(list(tensor.rows(source, 100)), dim=1 if tensor.transposed else 0)
                parts = np.concatenate([source.read_array(part.parameter.name) for part in tensor.parts])
                ordered = parts[tensor.order()]
                assert np.array_equal(values.T.numpy() if tensor.transposed else values.numpy(), ordered), tensor.name


def unpacked(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Codes one by one."""
    found = np.unpackbits(words.numpy().view(np.uint8), axis=1, bitorder="little")[:, : columns * bits]
    return torch.from_numpy((found.reshape(len(words), columns, bits) << np.arange(bits)).sum(axis=2))


def test_what_has_no_format_is_refused_and_can_be_rounded(tmp_path: Path, packable_model: Path) -> None:
    model = converted(packable_model, tmp_path / "q", "nf4-b32")
    message = f"compressed-tensors has no format for {Q_PROJ}.weight, which has levels that are neither.*and 11 more"
    with pytest.raises(UnsupportedError, match=message):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export(model, tmp_path / "said", requantize="int8-row")  # as the error says
    done = export(model, tmp_path / "out", requantize="int4-b128")
    assert (done.packed, done.rounded) == (14, 14)
    assert 0.01 < done.error < 0.2
    with pytest.raises(UnsupportedError, match="has rows of 64 weights, no whole number of blocks of 48.*int8-row"):
        export(model, tmp_path / "other", requantize="int4-b48")


def test_plain_models(tmp_path: Path, packable_model: Path) -> None:
    with pytest.raises(UsageError, match="no linear layer is quantized: name a format with --requantize int8-row"):
        export(packable_model, tmp_path / "out")
    done = export(packable_model, tmp_path / "out", requantize="int4-b128-asym")
    assert (done.packed, done.rounded) == (14, 14)
    assert section(tmp_path / "out")["ignore"] == ["lm_head"]


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gpt2", r"c_attn\.weight, which is published as .inputs, outputs., which .*more.: write plain floats"),
        ("gpt-oss", r"gate_up_proj, which holds all experts of a layer"),
    ],
)
def test_layers_that_it_does_not_pack(tmp_path: Path, family: str, message: str) -> None:
    saved_model(family, tmp_path / "m", **({} if family == "gpt2" else {"hidden_size": 64}))
    with pytest.raises(UnsupportedError, match=message):
        export(converted(tmp_path / "m", tmp_path / "q", "int4-b16"), tmp_path / "out")


@pytest.mark.parametrize("format", ["int4-b32", "int3-row-asym", "int8-b64-bf16", "nvfp4", "mxfp4", "fp8"])
def test_the_library_decompresses_to_the_same_numbers(tmp_path: Path, packable_model: Path, format: str) -> None:
    """To what kbit reads, bit for bit; in bfloat16 where the library decompresses to that."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    export(packable_model, tmp_path / "out", requantize=format, dtype=None if format.startswith("int8") else "fp32")
    config = QuantizationConfig(**section(tmp_path / "out"))
    (scheme,) = config.config_groups.values()
    kind = BaseCompressor.get_value_from_registry(config.format)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    with opened(tmp_path / "out") as source:
        for name in source.tensors:
            if "_proj" not in name:
                continue
            module = name.removesuffix("weight")
            state = {key.removeprefix(module): value for key, value in tensors.items() if key.startswith(module)}
            expected = kind.decompress(state, scheme)["weight"]
            found = torch.from_numpy(source.read_array(name)).to(expected.dtype)
            assert torch.equal(found, expected), name


def test_transformers_runs_it(tmp_path: Path, packable_model: Path) -> None:
    """Its logits are those of the model it was exported from."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    transformers = pytest.importorskip("transformers")
    from kbit.backends.reference.backend import ReferenceBackend
    from kbit.models.load import load_decoder

    model = converted(packable_model, tmp_path / "q", "int4-b32")
    export(model, tmp_path / "out", dtype="fp32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    ids = torch.randint(1, 200, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits
    with open_model(str(model)) as source:
        ours = load_decoder(source, ReferenceBackend())
    found = ours.forward(ids, ours.new_cache(1, 20))
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-4
