"""Published tensors read as canonical ones: the same numbers, in other places, a few rows at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from decoder_cases import DictSource
from safetensors.torch import load_file, save_file

from kbit.backends.cpu.backend import NativeBackend
from kbit.backends.reference.backend import ReferenceBackend
from kbit.checkpoint import resolve
from kbit.formats.quant_format import QuantFormat
from kbit.formats.stored import DenseMatrix
from kbit.host.errors import CheckpointError, UnsupportedError
from kbit.models.canonical import MARK, CanonicalSource, canonical
from kbit.models.families import spec_from_config
from kbit.models.load import load_decoder
from kbit.models.opening import open_model
from kbit.quantizers.convert import convert
from kbit.quantizers.plan import make_plan

Published = Callable[[str], Path]
LAYER = "model.layers.1."


def copied(folder: Path, to: Path, **config: object) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder that may be changed, and its tensors."""
    shutil.copytree(folder, to)
    found = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**found, **config}))
    return to, load_file(to / "model.safetensors")


def test_fused_rows(published: Published) -> None:
    """Each part is its rows of what was stored, whatever rows are asked for."""
    folder = published("phi3")
    stored = load_file(folder / "model.safetensors")
    with open_model(str(folder)) as source:
        assert source.tensors.keys() == spec_from_config(source.config).expected_tensors().keys()
        for parts, whole in (
            (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.qkv_proj"),
            (("mlp.gate_proj", "mlp.up_proj"), "mlp.gate_up_proj"),
        ):
            names = [f"{LAYER}{part}.weight" for part in parts]
            expected = stored[f"{LAYER}{whole}.weight"]
            assert torch.equal(torch.cat([source.read(name) for name in names]), expected)
            assert sum(source.tensors[name].nbytes for name in names) == expected.nbytes
        assert torch.equal(source.read_rows(names[1], 3, 7), expected[83:87])


def test_interleaved_rows(published: Published) -> None:
    """A head of 16 of which 8 features turn: even ones, odd ones, the rest; the biases alike, values not at all."""
    folder = published("glm4")
    stored = load_file(folder / "model.safetensors")
    order = [0, 2, 4, 6, 1, 3, 5, 7, *range(8, 16)]
    with open_model(str(folder)) as source:
        for slot in ("q", "k"):
            for end in ("weight", "bias"):
                name = f"{LAYER}self_attn.{slot}_proj.{end}"
                rows = torch.tensor([16 * head + i for head in range(len(stored[name]) // 16) for i in order])
                assert torch.equal(source.read(name), stored[name][rows])
                for start, stop in ((0, 1), (5, 6), (7, 23), (15, 17), (16, 32)):
                    assert torch.equal(source.read_rows(name, start, stop), stored[name][rows][start:stop])
        values = f"{LAYER}self_attn.v_proj.weight"
        assert torch.equal(source.read(values), stored[values])


def test_keys_that_nothing_reads_are_left_out(published: Published, tmp_path: Path) -> None:
    """Layers that attend to another one's keys may be published with some of their own, and with nothing else."""
    folder, tensors = copied(published("gemma4-e"), tmp_path / "model")
    tensors |= {
        f"model.layers.4.self_attn.{name}.weight": torch.full(shape, 9.0)
        for name, shape in (("k_proj", (32, 48)), ("v_proj", (32, 48)), ("k_norm", (16,)))
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ids = torch.arange(1, 30)[None]
    logits = []
    for model in (folder, published("gemma4-e")):
        with open_model(str(model)) as source:
            decoder = load_decoder(source, ReferenceBackend())
            logits.append(decoder.forward(ids, decoder.new_cache(1, 29)))
    assert torch.equal(*logits)
    tensors["model.layers.1.self_attn.k_bias"] = torch.ones(3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with (
        open_model(str(folder)) as source,
        pytest.raises(CheckpointError, match=r"k_bias\) is not part of a gemma4_text"),
    ):
        load_decoder(source, ReferenceBackend())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_norms_count_from_one_and_matrices_keep_their_type(
    tmp_path: Path, published: Published, dtype: torch.dtype
) -> None:
    folder, tensors = copied(published("gemma3"), tmp_path / "model")
    halves = {name: values.to(dtype) for name, values in tensors.items()}
    save_file(halves, folder / "model.safetensors")
    with open_model(str(folder)) as source:
        assert isinstance(source, CanonicalSource)
        for name, info in source.tensors.items():
            if "norm" in name:
                assert (info.stored_as, info.nbytes) == ("F32", 4 * info.numel)
                assert torch.equal(source.read(name), 1.0 + halves[name].float())
            else:
                assert info.stored_as == {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
                assert torch.equal(source.read(name), halves[name].float())
    folder, tensors = copied(published("glm4"), tmp_path / "glm")
    save_file({name: values.to(dtype) for name, values in tensors.items()}, folder / "model.safetensors")
    with open_model(str(folder)) as source:
        assert isinstance(source, CanonicalSource)
        found = source.read_stored(f"{LAYER}self_attn.q_proj.weight")
        assert isinstance(found, DenseMatrix)
        assert found.kind == {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
        assert torch.equal(
            torch.from_numpy(found.values).view(dtype).float(), source.read(f"{LAYER}self_attn.q_proj.weight")
        )


@pytest.mark.parametrize("name", ["gemma2", "phi3", "glm4", "ernie4_5"])
def test_what_is_converted_is_not_converted_again(tmp_path: Path, published: Published, name: str) -> None:
    """A folder that kbit wrote holds canonical tensors, says so, and means the same on both backends."""
    with open_model(str(published(name))) as source:
        plan = make_plan(source, QuantFormat.parse("int8-b16"))
        convert(source, plan, tmp_path / "out")
        expected = load_decoder(source, ReferenceBackend())
    assert json.loads((tmp_path / "out" / "config.json").read_text())[MARK] is True
    ids = torch.arange(1, 30)[None]
    wanted = expected.forward(ids, expected.new_cache(1, 29))
    with open_model(str(tmp_path / "out")) as result:
        assert not isinstance(result, CanonicalSource)
        for backend in (ReferenceBackend(), NativeBackend(2, compute="fp32", kv="fp32")):
            model = load_decoder(result, backend)
            found = model.forward(ids, model.new_cache(1, 29))
            # Rounded to 8 bits each weight is off by at most 1/254 of its block's largest, three layers deep.
            assert float((found - wanted).norm() / wanted.norm()) < 0.05


def test_families_that_publish_canonical_tensors_are_left_alone(published: Published) -> None:
    with open_model(str(published("qwen3"))) as source:
        assert not isinstance(source, CanonicalSource)
        assert MARK not in source.config


def test_a_checkpoint_that_was_not_opened_so_is_refused(published: Published) -> None:
    """Its norms would be taken for others, silently."""
    with (
        resolve.open_model(str(published("gemma"))) as source,
        pytest.raises(CheckpointError, match="kbit_canonical_tensors is not set"),
    ):
        load_decoder(source, ReferenceBackend())
    with resolve.open_model(str(published("phi3"))) as source:
        tensors = {name: source.read(name) for name in source.tensors}
        with pytest.raises(UnsupportedError, match="a phi3 model is read from files"):
            canonical(DictSource(source.config, tensors))


def test_what_is_missing_or_does_not_fit_is_named(tmp_path: Path, published: Published) -> None:
    folder, tensors = copied(published("phi3"), tmp_path / "short")
    whole = f"{LAYER}self_attn.qkv_proj.weight"
    save_file({**tensors, whole: tensors[whole][:-1].contiguous()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{whole} has shape \(79, 48\), but config.json asks for \(80, 48\)"):
        open_model(str(folder))
    folder, tensors = copied(published("phi3"), tmp_path / "missing")
    save_file({name: x for name, x in tensors.items() if name != whole}, folder / "model.safetensors")
    with open_model(str(folder)) as source, pytest.raises(CheckpointError, match=r"3 tensors \(.*q_proj.* are missing"):
        load_decoder(source, ReferenceBackend())
    folder, tensors = copied(published("phi3"), tmp_path / "surplus")
    save_file({**tensors, f"{LAYER}mlp.gate_up_proj.bias": torch.zeros(160)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="gate_up_proj.bias has shape"):
        open_model(str(folder))


def test_a_configuration_that_is_no_model_is_left_to_who_reads_it(tmp_path: Path, published: Published) -> None:
    folder, _ = copied(published("gemma2"), tmp_path / "model", head_dim="wide")
    with open_model(str(folder)) as source, pytest.raises(CheckpointError, match="head_dim is 'wide'"):
        spec_from_config(source.config)
