"""Conversion plans: which tensor becomes what, how large the result will be, and what is refused before anything is read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import toy_family
from decoder_cases import CASES, DictSource, tame_tensors, tiny_config
from safetensors.torch import load_file, save_file

from kbit.checkpoint.readers.hf_folder import HFFolder
from kbit.checkpoint.resolve import open_model
from kbit.checkpoint.source import TensorInfo
from kbit.checkpoint.writer import CheckpointWriter, partial_folder
from kbit.formats.quant_format import QuantFormat
from kbit.host.errors import KbitError, UnsupportedError, UsageError
from kbit.models.families import FAMILIES, spec_from_config
from kbit.models.params import parameters
from kbit.quantizers.convert import convert
from kbit.quantizers.plan import Plan, check_disk, make_plan
from kbit.quantizers.roles import role_by_name, roles_of

NF4 = QuantFormat.parse("nf4-b64")
EMBEDDING = "model.embed_tokens.weight"


def plan_of(folder: Path, format: str = "nf4-b64", **options: Any) -> Plan:
    with open_model(str(folder)) as source:
        return make_plan(source, QuantFormat.parse(format), **options)


def labels(plan: Plan) -> dict[str, str]:
    return {tensor.source.name: tensor.label for tensor in plan.tensors}


# --- what becomes of each tensor -------------------------------------------------------------------------------------


def test_linears_are_quantized_and_the_rest_is_kept(tiny_model: Path) -> None:
    plan = plan_of(tiny_model, "int3-b32")
    for tensor in plan.tensors:
        if "proj" in tensor.source.name:
            assert (tensor.role, tensor.label) == ("linear", "int3-b32")
        else:
            assert (tensor.role, tensor.label) == (("embedding" if "embed" in tensor.source.name else "other"), "f16")


def test_roles_by_name() -> None:
    def role(name: str, *shape: int) -> str:
        return role_by_name(TensorInfo(name, shape, "F16", 0, Path()))

    assert role("model.embed_tokens.weight", 10, 4) == "embedding"
    assert role("lm_head.weight", 10, 4) == "head"
    assert role("model.layers.0.self_attn.q_proj.weight", 4, 4) == "linear"
    assert role("model.layers.0.self_attn.q_proj.bias", 4) == "other"
    assert role("model.layers.0.input_layernorm.weight", 4) == "other"


def _like_llama(case: str) -> bool:
    """Whether a case's family names its tensors as Llama does, and has no embedding of positions beside."""
    names = FAMILIES[tiny_config(case)["model_type"]].names
    return names.head == "lm_head" and "embed_tokens" in names.embedding and names.positions is None


LIKE_LLAMA = [name for name in CASES if _like_llama(name)]


@pytest.mark.parametrize("name", LIKE_LLAMA)
def test_declared_roles_are_what_the_names_of_present_families_say(name: str) -> None:
    """But for routers of experts, which are matrices by their names, and stay as they are where they are declared; and
    for tables beside the embedding, which are others by their names."""
    config = tiny_config(name)
    declared = parameters(spec_from_config(config))
    others = {p.name: "table" if p.role == "table" else "other" for p in declared if p.role in ("router", "table")}
    source = DictSource(config, {**tame_tensors(config), "lm_head.weight": torch.zeros(131, 48)})
    expected = {name: role_by_name(info) for name, info in source.tensors.items()}
    assert roles_of(source) == {**expected, **others}
    assert {"embedding", "head", "linear", "other"} == set(expected.values())
    # Of an unknown architecture, too.
    assert roles_of(DictSource({"model_type": "gpt-7"}, source.data)) == expected


def test_roles_are_declared_where_names_say_nothing() -> None:
    config = toy_family.toy_config()
    toy_family.install()
    try:
        tensors = {**tame_tensors(config), "head.weight": torch.zeros(131, 48), "extra.weight": torch.zeros(2, 2)}
        roles = roles_of(DictSource(config, {**tensors, "blocks.1.q.weight": torch.zeros(4)}))
    finally:
        del FAMILIES["toy"]
    assert roles.pop("words.weight") == "embedding"
    assert roles.pop("head.weight") == "head"
    assert roles.pop("extra.weight") == "linear"  # nobody declares it
    assert roles.pop("blocks.1.q.weight") == "other"  # no matrix
    for name, role in roles.items():
        matrix = name.endswith(".weight") and "norm" not in name
        assert role == ("linear" if matrix else "other"), name


def test_embedding_bits_quantize_embedding_and_head_with_the_same_blocks_and_scales(
    tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    path = write_model(tmp_path / "m", tie_word_embeddings=False)
    found = labels(plan_of(path, "float4e3m0-b32-dq", embedding_bits=8))
    assert found[EMBEDDING] == found["lm_head.weight"] == "int8-b32-dq"
    assert found["model.layers.0.mlp.up_proj.weight"] == "float4e3m0-b32-dq"
    assert labels(plan_of(path, "float4-b32", embedding_bits=4))[EMBEDDING] == "float4e2m1-b32"
    for keep in (None, 16):
        found = labels(plan_of(path, "nf4-b64", embedding_bits=keep))
        assert found[EMBEDDING] == found["lm_head.weight"] == "f16"


def test_a_tied_head_is_planned_once(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    path = write_model(tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors[EMBEDDING].clone()}, path / "model.safetensors")
    found = labels(plan_of(path, embedding_bits=8))
    assert EMBEDDING in found
    assert "lm_head.weight" not in found


def test_overrides_come_last_and_the_last_match_wins(tiny_model: Path) -> None:
    found = labels(
        plan_of(
            tiny_model,
            overrides=[
                ("*proj.weight", "int8-b32"),
                ("*.down_proj.weight", "keep"),
                ("model.layers.1.*.down_proj.weight", "nf2-row"),
                (EMBEDDING, "int8-b64-asym"),
            ],
        )
    )
    assert found["model.layers.0.mlp.up_proj.weight"] == "int8-b32"
    assert found["model.layers.0.mlp.down_proj.weight"] == "f16"
    assert found["model.layers.1.mlp.down_proj.weight"] == "nf2-row"
    assert found[EMBEDDING] == "int8-b64-asym"
    assert found["model.norm.weight"] == "f16"


def test_patterns_match_whole_names_and_are_shell_style(tiny_model: Path) -> None:
    found = labels(plan_of(tiny_model, overrides=[("model.layers.[1-9].*q_proj.weight", "int8-b64")]))
    assert found["model.layers.0.self_attn.q_proj.weight"] == "nf4-b64"
    assert found["model.layers.1.self_attn.q_proj.weight"] == "int8-b64"
    with pytest.raises(UsageError, match="matches no tensor"):
        plan_of(tiny_model, overrides=[("q_proj", "int8-b64")])  # no part of a name
    with pytest.raises(UsageError, match="matches no tensor"):
        plan_of(tiny_model, overrides=[("*Q_PROJ.weight", "int8-b64")])  # case counts


@pytest.mark.parametrize(
    ("stored", "kept"),
    [
        (torch.float64, "F32"),
        (torch.float32, "F32"),
        (torch.float16, "F16"),
        (torch.bfloat16, "BF16"),
        (torch.float8_e4m3fn, "BF16"),
        (torch.float8_e5m2, "BF16"),
    ],
    ids=str,
)
def test_kept_tensors_keep_their_precision(
    tmp_path: Path, write_model: Callable[..., Path], stored: torch.dtype, kept: str
) -> None:
    plan = plan_of(write_model(tmp_path / "m", dtype=stored))
    assert {tensor.keep_as for tensor in plan.tensors if tensor.format is None} == {kept}


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overrides": [("*nothing*", "int8-b64")]}, r"'\*nothing\*' matches no tensor; kbit info"),
        ({"overrides": [("", "int8-b64")]}, "pattern is empty; write PATTERN=FORMAT"),
        ({"overrides": [("*", "int9-b64")]}, "9 bits"),
        ({"overrides": [("*", "int4-b63")]}, "block size 63"),
        ({"overrides": [("*", "")]}, "is not a format"),
        ({"overrides": [("*norm.weight", "int8-b64")]}, r"norm.weight has shape \(32,\): only matrices"),
        ({"overrides": [("*proj.weight", "keep")]}, "nothing to quantize: every one of the"),
        ({"embedding_bits": 1}, "1 bits: kbit formats have 2 to 8"),
        ({"embedding_bits": 9}, "9 bits"),
        ({"embedding_bits": 0}, "0 bits"),
        ({"embedding_bits": -4}, "-4 bits"),
    ],
)
def test_impossible_plans(tiny_model: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_of(tiny_model, **options)


def test_quantizing_twice_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    with open_model(str(tiny_model)) as source:
        convert(source, make_plan(source, NF4), tmp_path / "out")
    with pytest.raises(UsageError, match="already quantized by kbit; start from the model it was made of"):
        plan_of(tmp_path / "out")


def test_integer_tensors_are_refused_before_any_work(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    path = write_model(tmp_path / "m", shards=2)
    save_file({"model.counts": torch.arange(4)}, path / "extra.safetensors")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.counts"] = "extra.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedError, match=r"extra\.safetensors: model\.counts is I64"):
        plan_of(path)


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["nf4-b64", "int3-b16-asym-dq", "quantile5-b32", "lloyd2-row-fp32", "int7-b4096"])
def test_sizes_are_exact(tmp_path: Path, tiny_model: Path, format: str) -> None:
    """Planned bytes equal the data sections of the files, and the folder says the same when read back."""
    with open_model(str(tiny_model)) as source:
        plan = make_plan(source, QuantFormat.parse(format), embedding_bits=6, shard_bytes=6000)
        result = convert(source, plan, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    data = sum(file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little") for file in files)
    assert data == plan.bytes_after
    assert result.nbytes == sum(file.stat().st_size for file in files)
    with open_model(str(tmp_path / "out")) as quantized:
        assert {n: (i.nbytes, i.stored_as.lower()) for n, i in quantized.tensors.items()} == {
            tensor.source.name: (tensor.nbytes, tensor.label) for tensor in plan.tensors
        }
        assert sum(info.nbytes for info in quantized.tensors.values()) == plan.bytes_after
    with open_model(str(tiny_model)) as source:
        assert plan.bytes_before == sum(info.nbytes for info in source.tensors.values())


def test_bits_per_weight_count_everything(tiny_model: Path) -> None:
    plan = plan_of(tiny_model, "nf4-b16")  # rows of 32 and 80: no part blocks
    assert plan.bits_per_weight("linear") == 4 + 16 / 16
    assert plan.bits_per_weight("embedding") == plan.bits_per_weight("other") == 16
    assert plan.bits_per_weight("head") is None
    numel = sum(tensor.source.numel for tensor in plan.tensors)
    assert plan.bits_per_weight() == 8 * plan.bytes_after / numel


def test_shards_are_as_large_as_asked_for(tmp_path: Path, tiny_model: Path) -> None:
    with open_model(str(tiny_model)) as source:
        plan = make_plan(source, NF4, shard_bytes=5000)
        with CheckpointWriter(tmp_path / "o", [t.stored() for t in plan.tensors], "id", shard_bytes=5000) as writer:
            total = writer.nbytes
        convert(source, plan, tmp_path / "out")
    largest = max(tensor.nbytes for tensor in plan.tensors)
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")}
    assert sum(sizes.values()) == total
    assert largest > 5000  # a single tensor may exceed the limit; nothing else may
    for name, size in sizes.items():
        header = int.from_bytes((tmp_path / "out" / name).read_bytes()[:8], "little")
        assert size - 8 - header <= max(5000, largest)
    numbers = [f"model-{index:05d}-of-{len(sizes):05d}.safetensors" for index in range(1, len(sizes) + 1)]
    assert sorted(sizes) == numbers


def test_the_plan_id_covers_what_determines_the_output(
    tmp_path: Path, tiny_model: Path, write_model: Callable[..., Path]
) -> None:
    other = write_model(tmp_path / "other", seed=1)
    plans = {
        "default": plan_of(tiny_model),
        "format": plan_of(tiny_model, "nf3-b64"),
        "scale": plan_of(tiny_model, "nf4-b64-bf16"),
        "embedding": plan_of(tiny_model, embedding_bits=8),
        "shards": plan_of(tiny_model, shard_bytes=10_000),
        "override": plan_of(tiny_model, overrides=[("*0.mlp.up_proj.weight", "keep")]),
        "source": plan_of(other),
        # The same tensors in the same formats, but config.json names another default.
        "default format": plan_of(tiny_model, "int4-b64", overrides=[("*proj.weight", "nf4-b64")]),
    }
    assert len({plan.plan_id for plan in plans.values()}) == len(plans)
    assert plan_of(tiny_model).plan_id == plans["default"].plan_id


# --- cost ------------------------------------------------------------------------------------------------------------


def test_planning_imports_no_torch(tmp_path: Path, tiny_model: Path) -> None:
    code = """
import sys
from kbit.checkpoint.resolve import open_model
from kbit.formats.quant_format import QuantFormat
from kbit.quantizers.plan import check_disk, make_plan
from pathlib import Path
with open_model(sys.argv[1]) as source:
    plan = make_plan(source, QuantFormat.parse("lloyd3-b64"), embedding_bits=8, overrides=[("*down_proj*", "int8-row")])
    check_disk(plan, Path(sys.argv[2]))
    print(plan.bytes_after, plan.peak_memory, plan.plan_id)
print("torch" in sys.modules, "numpy" in sys.modules)
"""
    arguments = [sys.executable, "-c", code, str(tiny_model), str(tmp_path / "out")]
    result = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=300)
    assert result.stdout.splitlines()[-1] == "False False"


def test_planning_a_large_model_reads_no_data(tmp_path: Path) -> None:
    """40 GB that are not there: sparse files, planned in a moment and in no memory to speak of."""
    header, position = {}, 0
    for layer in range(10):
        header[f"model.layers.{layer}.mlp.up_proj.weight"] = {
            "dtype": "BF16",
            "shape": [1 << 16, 1 << 15],
            "data_offsets": [position, position := position + (1 << 32)],
        }
    text = json.dumps(header).encode()
    folder = tmp_path / "big"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    try:
        with (folder / "model.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + position)
    except OSError as error:
        pytest.skip(f"the file system takes no sparse file of 40 GB: {error}")
    with HFFolder(folder) as source:
        plan = make_plan(source, NF4)
    assert plan.bytes_before == 10 << 32
    assert plan.bits_per_weight() == 4.25
    # One result at a time is in memory, whatever the model's size.
    assert plan.peak_memory < 600_000_000 + plan.tensors[0].nbytes


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_check_disk(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(tiny_model)
    asked: list[Path] = []

    def free(amount: int) -> None:
        def usage(path: os.PathLike[str]) -> Usage:
            asked.append(Path(path))
            return Usage(amount, 0, amount)

        monkeypatch.setattr(shutil, "disk_usage", usage)

    needed = plan.bytes_after + 16_000_000
    out = tmp_path / "not" / "yet" / "there"
    free(needed)
    assert check_disk(plan, out) == needed
    assert asked == [tmp_path]  # the nearest folder that exists
    free(needed - 1)
    with pytest.raises(KbitError, match=r"there: needs 0\.02 GB, but only .* are free; make room or choose another"):
        check_disk(plan, out)
    partial = partial_folder(out)  # what an interrupted run has written counts
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"x" * 10_000)
    free(needed - 10_000)
    assert check_disk(plan, out) == needed


def test_kept_tensors_in_another_type(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    path = write_model(tmp_path / "m", tie_word_embeddings=False)
    overrides = [("*norm*", "f32"), ("lm_head.weight", "bf16"), ("*", "keep"), ("*.up_proj.weight", "nf4-b64")]
    found = labels(plan_of(path, "nf4-b64", overrides=overrides[:2]))
    assert found["lm_head.weight"] == "bf16"
    assert {label for name, label in found.items() if "norm" in name} == {"f32"}
    found = labels(plan_of(path, "nf4-b64", overrides=overrides))  # the last match wins
    assert found["lm_head.weight"] == "f16"
    assert found["model.layers.0.mlp.up_proj.weight"] == "nf4-b64"
