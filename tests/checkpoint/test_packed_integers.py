"""GPTQ's and AWQ's folders open with the weights that these libraries compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from packed_cases import assert_weights, awq, edit_section, edit_tensors, gptq, refused, write_layer, write_packed

from kbit.checkpoint.resolve import open_model
from kbit.host.errors import CheckpointError, UnsupportedError

GPTQ_CASES: dict[str, tuple[dict[str, Any], str]] = {
    "2 bits": ({"bits": 2, "group": 32, "symmetric": False, "layout": 1}, "int2-b32-asym-fp32"),
    "3 bits": ({"bits": 3, "group": 32, "symmetric": False, "layout": 1}, "int3-b32-asym-fp32"),
    "3 bits, second layout": ({"bits": 3, "group": -1, "symmetric": False, "layout": 2}, "int3-row-asym-fp32"),
    "4 bits": ({"bits": 4, "group": 32, "symmetric": False, "layout": 1}, "int4-b32-asym-fp32"),
    "4 bits, symmetric": ({"bits": 4, "group": 16, "symmetric": True, "layout": 1}, "int4-b16"),
    "4 bits, second layout": ({"bits": 4, "group": 32, "symmetric": True, "layout": 2}, "int4-b32"),
    "4 bits, rows": ({"bits": 4, "group": -1, "symmetric": True, "layout": 1}, "int4-row"),
    "4 bits, bf16": (
        {"bits": 4, "group": 32, "symmetric": True, "layout": 2, "dtype": torch.bfloat16},
        "int4-b32-bf16",
    ),
    "5 bits": ({"bits": 5, "group": 32, "symmetric": False, "layout": 1}, "int5-b32-asym-fp32"),
    "6 bits": ({"bits": 6, "group": 32, "symmetric": True, "layout": 2}, "int6-b32"),
    "7 bits": ({"bits": 7, "group": 32, "symmetric": False, "layout": 2}, "int7-b32-asym-fp32"),
    "8 bits": ({"bits": 8, "group": 32, "symmetric": False, "layout": 1}, "int8-b32-asym-fp32"),
    "8 bits, symmetric": ({"bits": 8, "group": -1, "symmetric": True, "layout": 1}, "int8-row"),
    "act-order": ({"bits": 4, "group": 32, "symmetric": False, "layout": 1, "ordered": True}, "F16"),
    "act-order, bf16": (
        {"bits": 8, "group": 16, "symmetric": True, "layout": 2, "ordered": True, "dtype": torch.bfloat16},
        "BF16",
    ),
    "act-order of one group": ({"bits": 4, "group": -1, "symmetric": True, "layout": 1, "ordered": True}, "int4-row"),
    "groups of 8": ({"bits": 4, "group": 8, "symmetric": True, "layout": 1}, "F16"),
}


def gptq_section(
    bits: int, group: int, symmetric: bool, layout: int, ordered: bool = False, **_: Any
) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "desc_act": ordered,
        "checkpoint_format": {1: "gptq", 2: "gptq_v2"}[layout],
    }


@pytest.mark.parametrize("case", GPTQ_CASES)
def test_gptq(tmp_path: Path, case: str) -> None:
    settings, held = GPTQ_CASES[case]
    weights = write_layer(tmp_path / "m", gptq_section(**settings), gptq(**settings))
    assert_weights(tmp_path / "m", weights, held, f"GPTQ {settings['bits']}-bit")


SIMPLE = {"bits": 4, "group": 32, "symmetric": True, "layout": 1}


@pytest.fixture
def simple(tmp_path: Path, packable_model: Path) -> Path:
    """A symmetric 4-bit folder in GPTQ's first layout."""
    write_packed(packable_model, tmp_path / "m", gptq_section(**SIMPLE), gptq(**SIMPLE))
    return tmp_path / "m"


def test_wrong_words_are_noticed_and_the_remedies_work(simple: Path) -> None:
    """The usual mistakes about zeros and order, each of which makes other libraries print nonsense."""
    with open_model(str(simple)) as source:
        before = {name: source.read(name) for name in source.tensors}
    edit_section(simple, checkpoint_format="gptq_v2")
    refused(simple, "qzeros holds other zeros than 8, though sym is true: set sym to false")
    edit_section(simple, checkpoint_format="gptq")
    edit_tensors(simple, lambda tensors: [t.add_(0x11111111) for name, t in tensors.items() if "qzeros" in name])
    refused(simple, "qzeros holds other zeros than 8, .* set checkpoint_format to gptq_v2 in quantization_config")
    edit_section(simple, checkpoint_format="gptq_v2")
    with open_model(str(simple)) as source:
        for name, values in before.items():
            assert torch.equal(source.read(name), values)
    edit_tensors(simple, lambda tensors: [t.copy_(t.flip(0)) for name, t in tensors.items() if "g_idx" in name])
    refused(simple, "g_idx is not the order of the columns, though desc_act is false: set desc_act to true")
    edit_section(simple, desc_act=True)
    with open_model(str(simple)) as source:
        assert {info.stored_as for info in source.tensors.values() if info.packed_as} == {"F16"}
        source.read("model.layers.0.mlp.up_proj.weight")


def drop(end: str) -> Any:
    return lambda tensors: tensors.pop(next(name for name in tensors if name.endswith(end)))


def halve(end: str) -> Any:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith(end))
        tensors[name] = tensors[name][:, : tensors[name].shape[1] // 2].contiguous()

    return edit


def far_group(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if name.endswith("g_idx"):
            tensor[0] = 1000


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop(".scales"), r"\.scales is missing, which belongs to a packed weight"),
        (drop(".qzeros"), r"\.qzeros is missing"),
        (drop(".qweight"), r"(g_idx|qzeros|scales) belongs to a packed weight, but its other tensors are missing"),
        (halve(".scales"), "do not fit each other"),
        (halve(".qzeros"), r"qzeros is I32 .* but should be I32"),
        (far_group, "g_idx names groups from 0 to 1000, but there are"),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.ones(2, 2)}),
            "up_proj.weight is there twice, packed .* and not",
        ),
    ],
)  # fmt: skip
def test_gptq_tensors_that_do_not_fit(simple: Path, edit: Any, message: str) -> None:
    edit_tensors(simple, edit)
    refused(simple, message)


@pytest.mark.parametrize(
    ("section", "kind", "message"),
    [
        ({"bits": 8}, CheckpointError, "does not hold .* codes of 8 bits: bits in config.json is wrong"),
        ({"bits": 9}, UnsupportedError, "bits of the quantizer is 9; kbit reads 2, 3"),
        ({"bits": "4"}, CheckpointError, "bits of the quantizer is '4', no number"),
        ({"group_size": 128}, CheckpointError, "group_size in config.json is 128"),
        ({"checkpoint_format": "marlin"}, UnsupportedError, "'marlin': of GPTQ's layouts kbit reads gptq and gptq_v2"),
        ({"is_marlin_format": True}, UnsupportedError, "rearranged for one kernel"),
        ({"dynamic": {"+:x": {"sym": False}}}, UnsupportedError, "dynamic .* more than bits and group_size"),
    ],
)
def test_gptq_sections_that_do_not_fit(simple: Path, section: dict[str, Any], kind: Any, message: str) -> None:
    edit_section(simple, **section)
    refused(simple, message, kind)


def test_gptq_of_mixed_widths(tmp_path: Path, packable_model: Path) -> None:
    """`dynamic` names other widths and groups for some modules, and modules that stay as they are."""
    plain, other = gptq(**SIMPLE), gptq(8, -1, symmetric=True, layout=1)
    calls = iter(range(10**6))
    section = {**gptq_section(**SIMPLE), "dynamic": {"+:.*down.*": {"bits": 8, "group_size": -1}, "-:.*none.*": {}}}
    weights = write_packed(
        packable_model, tmp_path / "m", section, lambda *given: (plain if next(calls) % 2 else other)(*given)
    )
    with open_model(str(tmp_path / "m")) as source:
        assert {info.packed_as for info in source.tensors.values()} == {"", "GPTQ 4-bit", "GPTQ 8-bit"}
        for name, expected in weights.items():
            assert torch.equal(source.read(name).to(torch.float16), expected)


@pytest.mark.parametrize(("group", "held"), [(32, "int4-b32-asym-fp32"), (-1, "int4-row-asym-fp32"), (8, "F16")])
def test_awq(tmp_path: Path, group: int, held: str) -> None:
    section = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    weights = write_layer(tmp_path / "m", section, awq(group))
    assert_weights(tmp_path / "m", weights, held, "AWQ 4-bit")
    edit_section(tmp_path / "m", version="gemv")
    refused(tmp_path / "m", "version .* 'gemv': of AWQ's layouts kbit reads gemm", UnsupportedError)
    edit_section(tmp_path / "m", version="GEMM", group_size=48)
    refused(tmp_path / "m", "group_size 48 does not divide")


def test_a_bias_of_zeros_is_left_out_and_others_are_not(simple: Path) -> None:
    """GPTQ's tools write a bias for every layer, which a model without them does not know."""
    from kbit.models.check import check_tensors
    from kbit.models.families import spec_from_config

    name = "model.layers.0.mlp.up_proj.bias"
    for value in (0.0, 0.5):
        edit_tensors(simple, lambda tensors, value=value: tensors.update({name: torch.full((128,), value)}))
        with open_model(str(simple)) as source:
            spec = spec_from_config(source.config, where="config")
            if value:
                with pytest.raises(CheckpointError, match="up_proj.bias. is not part of a llama model"):
                    check_tensors(source, spec)
            else:
                check_tensors(source, spec)
