"""What is exported as GGUF: codes bit for bit, a file of its own kind once more; and what cannot be said refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from decoder_cases import saved_model
from gguf_export_cases import export, opened, stored
from gguf_model_cases import Model
from packed_cases import Packed, awq, draw, gptq, write_packed
from safetensors.torch import load_file, save_file

from kbit.checkpoint.gguf.header import read_header
from kbit.formats.registry import parse_format
from kbit.host.errors import KbitError, UnsupportedError, UsageError
from kbit.models.opening import open_model
from kbit.quantizers.convert import convert
from kbit.quantizers.plan import make_plan

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}


def mxfp4(shape: torch.Size, generator: torch.Generator) -> Packed:
    """A layer as compressed-tensors writes MXFP4."""
    rows, columns = shape
    codes, exponents = draw((rows, columns), 16, generator), 115 + draw((rows, columns // 32), 10, generator)
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
    return Packed({"weight_packed": packed, "weight_scale": exponents.to(torch.uint8)}, torch.zeros(shape))


MXFP4 = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}}


# Case: what others have packed, and the type that loses nothing of it.
PACKED: dict[str, tuple[dict[str, Any], Any, str]] = {
    "2 bits": ({**GPTQ, "bits": 2}, gptq(2, 32, symmetric=True, layout=1), "Q4_0"),
    "4 bits": (GPTQ, gptq(4, 32, symmetric=True, layout=1), "Q4_0"),
    "4 bits, long blocks": ({**GPTQ, "group_size": 64}, gptq(4, 64, symmetric=True, layout=1), "Q4_0"),
    "4 bits with zeros": ({**GPTQ, "sym": False}, gptq(4, 32, symmetric=False, layout=1), "Q5_0"),
    "AWQ": ({"quant_method": "awq", "bits": 4, "group_size": 32}, awq(32), "Q5_0"),
    "5 bits": ({**GPTQ, "bits": 5}, gptq(5, 32, symmetric=True, layout=1), "Q5_0"),
    "8 bits": ({**GPTQ, "bits": 8}, gptq(8, 32, symmetric=True, layout=1), "Q8_0"),
    "MXFP4": (MXFP4, mxfp4, "MXFP4"),
}


@pytest.mark.parametrize("case", PACKED)
def test_others_codes_are_the_same_numbers(tmp_path: Path, packable_model: Path, case: str) -> None:
    """As the gguf package decodes them, rows of queries and keys in its order."""
    settings, pack, type_ = PACKED[case]
    write_packed(packable_model, tmp_path / "m", settings, pack)
    done = export(tmp_path / "m", tmp_path / "m.gguf")
    assert (done.types[type_], done.rounded, done.error) == (14, 0, 0.0)
    kind = gguf.GGMLQuantizationType[type_]
    found = stored(tmp_path / "m.gguf")
    with opened(tmp_path / "m") as source, opened(tmp_path / "m.gguf") as again:
        for name in source.tensors:
            assert np.array_equal(source.read_array(name), again.read_array(name)), name
        down = source.read_array("model.layers.1.mlp.down_proj.weight")
    data = np.frombuffer(found["blk.1.ffn_down.weight"][1], dtype=np.uint8).reshape(len(down), -1)
    assert np.array_equal(gguf.quants.dequantize(data, kind), down)


def converted(model: Path, out: Path, format: str) -> Path:
    with open_model(str(model)) as source:
        convert(source, make_plan(source, parse_format(format)), out)
    return out


@pytest.mark.parametrize("format", ["nested2..8-b32", "trellis3-l10"])
def test_what_is_no_code_times_a_scale_is_refused_and_can_be_rounded(
    tmp_path: Path, packable_model: Path, format: str
) -> None:
    model = converted(packable_model, tmp_path / "q", format)
    message = r"GGUF has no type for .*, which is held as .*: round them with --requantize Q8_0"
    with pytest.raises(UnsupportedError, match=message):
        export(model, tmp_path / "m.gguf")
    done = export(model, tmp_path / "m.gguf", requantize="Q8_0")
    assert done.rounded == 14
    assert 1e-4 < done.error < 0.01


def test_what_no_type_holds_is_refused_and_can_be_rounded(tmp_path: Path, packable_model: Path) -> None:
    model = converted(packable_model, tmp_path / "q", "nf4-b32")
    message = r"GGUF has no type for model\.layers\.0\.self_attn\.q_proj\.weight, which has levels that are neither.*"
    message += r"and 1[123] more.: round them with --requantize Q8_0"
    with pytest.raises(UnsupportedError, match=message):
        export(model, tmp_path / "m.gguf")
    errors = []
    for type_ in ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"):
        done = export(model, tmp_path / f"{type_}.gguf", requantize=type_)
        assert done.rounded == done.types[type_] == 14
        errors.append(done.error)
    assert errors == sorted(errors)
    assert 1e-4 < errors[0] < 0.01 < errors[-1] < 0.2


@pytest.mark.parametrize("format", ["trellis3-l12", "nested2..4-b32"])
def test_codes_that_are_none_of_its_kind(tmp_path: Path, packable_model: Path, format: str) -> None:
    model = converted(packable_model, tmp_path / "q", format)
    with pytest.raises(UnsupportedError, match="which is held as .*, which is no code times a scale.*--requantize"):
        export(model, tmp_path / "m.gguf")
    done = export(model, tmp_path / "m.gguf", requantize="Q8_0")
    assert done.rounded == done.types["Q8_0"] == 14
    assert 1e-4 < done.error < 0.01


@pytest.mark.parametrize(("format", "type_"), [("int8-b64", "Q8_0"), ("int4-b32", "Q4_0"), ("int4-b32", "Q8_0")])
def test_kbits_own_integers_keep_their_codes(tmp_path: Path, packable_model: Path, format: str, type_: str) -> None:
    """Only their scales are rounded, to float16: half of 2^-10."""
    model = converted(packable_model, tmp_path / "q", format)
    with pytest.raises(UnsupportedError, match="has scales that float16 cannot hold, as GGUF's are"):
        export(model, tmp_path / "m.gguf")
    done = export(model, tmp_path / "m.gguf", requantize=type_)
    assert 0 < done.error < 2.0**-11


def test_rows_that_are_no_blocks(tmp_path: Path) -> None:
    """Rounding them is of no use, and not recommended."""
    saved_model("llama", tmp_path / "m")
    for options in ({}, {"requantize": "Q8_0"}):
        with pytest.raises(UnsupportedError, match="has rows of 48 weights, .* of 32.*: write plain floats with --to"):
            export(converted(tmp_path / "m", tmp_path / f"q{len(options)}", "int8-b16"), tmp_path / "m.gguf", **options)


def test_dense_models_are_rounded_to_a_type(tmp_path: Path, packable_model: Path) -> None:
    """Layers, not the embedding; and floats become what --dtype says, vectors float32."""
    done = export(packable_model, tmp_path / "m.gguf", requantize="Q8_0", dtype="bf16")
    assert (done.rounded, done.types) == (14, {"Q8_0": 14, "BF16": 1, "F32": 5})
    plain = export(packable_model, tmp_path / "plain.gguf")
    assert (plain.error, plain.types) == (0.0, {"F16": 15, "F32": 5})


def test_a_gguf_file_is_copied_bit_for_bit(tmp_path: Path) -> None:
    """Types that kbit makes none of, too; parts are joined."""
    model = Model("llama")
    rng = np.random.default_rng(0)
    for index, (name, (values, _)) in enumerate(list(model.stored.items())):
        if values.ndim == 2 and "ffn_gate" in name:
            model.stored[name] = (
                gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_1),
                gguf.GGMLQuantizationType.Q4_1,
            )
        elif values.ndim == 2 and index % 2:
            model.stored[name] = (rng.standard_normal(values.shape).astype(np.float16), None)
    model.general["general.name"] = "Müller"
    model.keys["rope.scaling.type"] = "none"
    whole = model.write(tmp_path / "whole.gguf")
    done = export(whole, tmp_path / "copy.gguf")
    assert stored(whole) == stored(tmp_path / "copy.gguf")
    assert done.nbytes == (tmp_path / "copy.gguf").stat().st_size
    before, after = read_header(whole), read_header(tmp_path / "copy.gguf")
    kept = [[(key, file.type_of(key), file.value(key)) for key in file] for file in (before, after)]
    assert kept[0] == kept[1]
    model.write(tmp_path / "part.gguf", split_max_tensors=7)
    first = next(tmp_path.glob("part-00001-of-*.gguf"))
    export(first, tmp_path / "joined.gguf")
    assert stored(tmp_path / "joined.gguf") == stored(whole)
    assert "split.count" not in read_header(tmp_path / "joined.gguf")
    with pytest.raises(UsageError, match="a GGUF file is copied as it is: leave out --dtype and --requantize"):
        export(whole, tmp_path / "other.gguf", requantize="Q8_0")


def test_what_is_in_the_way(tmp_path: Path, packable_model: Path) -> None:
    (tmp_path / "text.gguf").write_text("not a model")
    for name, message in (("m.bin", "name a file that ends in .gguf"), ("text.gguf", "exists; name another file")):
        with pytest.raises(UsageError, match=message):
            export(packable_model, tmp_path / name)
    with pytest.raises(UsageError, match=r"exists and is no GGUF file"):
        export(packable_model, tmp_path / "text.gguf", overwrite=True)
    export(packable_model, tmp_path / "m.gguf")
    export(packable_model, tmp_path / "m.gguf", overwrite=True, dtype="fp32")
    with pytest.raises(UsageError, match="--requantize Q4_K: kbit rounds to Q8_0"):
        export(packable_model, tmp_path / "n.gguf", requantize="Q4_K")


def test_a_failed_export_leaves_nothing(tmp_path: Path, write_model: Any) -> None:
    folder = write_model(tmp_path / "m", dtype=torch.float32)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 3] = 7e4
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        KbitError, match=r"down_proj\.weight holds values up to 7e\+04, which F16 cannot: use --dtype bf16"
    ):
        export(folder, tmp_path / "m.gguf", dtype="fp16")
    assert not list(tmp_path.glob("*.gguf*"))
    export(folder, tmp_path / "m.gguf", dtype="bf16")  # as the error says
