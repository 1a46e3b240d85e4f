"""A nested model with mixed widths at any number of bits: natively as the reference says, from its own bytes only."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from error_cases import run_command
from native_cases import assert_close
from nested_cases import write_mixed

from kbit.backends.cpu.backend import NativeBackend
from kbit.backends.cpu.prepared import PreparedSource, find
from kbit.backends.cpu.prepared_nested import stretches_read
from kbit.backends.reference.backend import ReferenceBackend
from kbit.checkpoint.ladder import Ladder
from kbit.engine.loader import load_model
from kbit.formats.nested import NestedFormat
from kbit.models.decoder import Decoder
from kbit.models.load import load_decoder
from kbit.models.opening import open_model
from kbit.models.shard import shard

FORMAT = NestedFormat(2, 6, 16)
RUNGS = (6, 5.5, 4, 3.3, 2.7, 2)
IDS = torch.arange(1, 12)[None]


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, its embedding nested too."""
    out = tmp_path_factory.mktemp("mixed") / "folder"
    return write_mixed(tiny_model, out, FORMAT, [("*embed_tokens*", str(FORMAT))])


def logits(decoder: Decoder) -> torch.Tensor:
    return torch.as_tensor(decoder.forward(IDS, decoder.new_cache(1, 32)))


def prepared(folder: Path) -> PreparedSource:
    load_model(str(folder), backend=NativeBackend(1))
    found = find(folder, open_model)
    assert found is not None
    return found


def test_every_rung_runs_as_the_reference_says(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In memory and mapped the same bits, and of an exact backend what each matrix means at its width."""
    backend = NativeBackend(1, compute="fp32", kv="fp32")
    monkeypatch.setenv("KBIT_PREPARED", "off")
    in_memory = {}
    for bits in RUNGS:
        loaded = load_model(str(folder), backend=backend, bits=bits)
        assert (loaded.prepared, loaded.bits, loaded.widths) == (None, bits, (6, 5, 4, 3, 2))
        in_memory[bits] = logits(loaded.decoder)
        with open_model(str(folder), bits) as source:
            assert_close(in_memory[bits], logits(load_decoder(source, ReferenceBackend())))
    monkeypatch.setenv("KBIT_PREPARED", str(tmp_path))
    loaded = load_model(str(folder), backend=backend, bits=3.3)
    assert loaded.prepared is not None
    for bits in RUNGS:
        assert torch.equal(logits(loaded.at_width(bits).decoder), in_memory[bits])
    assert len({tuple(found[0, -1, :4].tolist()) for found in in_memory.values()}) == len(RUNGS)


def test_a_rung_reads_its_planes_and_its_scales_only(folder: Path) -> None:
    """Bytes outside of a rung's stretches can be anything: its logits do not change; those of wider ones do. Its planes
    lie in one stretch, and all it maps are the bytes of plain files of its widths."""
    source = prepared(folder)
    whole, index, ladder = source.prepared.read_bytes(), source._stretches, Ladder.of(source)
    backend = NativeBackend(1)
    first_scales = min(step[4] for step in index["steps"])
    for bits in RUNGS:
        narrower, stretches = source.at_width(bits), stretches_read(index, ladder.at(bits))
        assert sum(begin < first_scales for begin, _ in stretches) == 1
        names = [name for name, info in narrower.tensors.items() if len(info.shape) == 2]
        held = sum(narrower.prepared_weight(name).nbytes for name in names)
        read = sum(end - begin for begin, end in stretches)
        assert held < read < held + 64 * 2 * len(narrower.tensors) * 10
        if bits == 6:
            continue
        keep = np.zeros(len(whole), dtype=bool)
        keep[: source._common] = True
        keep[max(step[-1] for step in index["steps"]) :] = True  # the index
        for begin, end in stretches:
            keep[begin:end] = True
        damaged = np.frombuffer(whole, dtype=np.uint8).copy()
        damaged[~keep] ^= 0x5A
        copy = folder.parent / f"damaged-{bits}.kbit"
        copy.write_bytes(damaged.tobytes())
        other = PreparedSource(copy)
        expected = logits(load_decoder(narrower, backend))
        assert torch.equal(logits(load_decoder(other.at_width(bits), backend)), expected)
        assert not torch.equal(logits(load_decoder(other, backend)), logits(load_decoder(source, backend)))


def test_a_whole_number_of_bits_reads_what_one_width_does(tiny_model: Path, tmp_path: Path) -> None:
    """Within the bytes of one plane of one matrix, by which no step of the order fits any more."""
    mixed = write_mixed(tiny_model, tmp_path / "mixed", FORMAT)
    for bits in (2, 3, 4, 5, 6):
        with open_model(str(mixed)) as source:
            ladder = Ladder.of(source)
            wanted = sum(FORMAT.nbytes(*source.tensors[name].shape, bits) for name in ladder.sizes)
        with open_model(str(mixed), bits) as narrow:
            found = sum(FORMAT.nbytes(*narrow.tensors[name].shape, width) for name, width in ladder.at(bits).items())
        assert wanted - max(ladder.sizes.values()) / 8 <= found <= wanted


def test_a_share_of_a_rung(folder: Path) -> None:
    """Tensor parallel: each process has its part of every matrix at the matrix's width."""
    with open_model(str(folder), 3.3) as source:
        halves = [shard(source, rank, 2) for rank in range(2)]
        for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"):
            values = torch.cat([half.read_weight(name).dequantize() for half in halves])  # type: ignore[union-attr]
            assert torch.equal(values, source.read(name))


def test_info_says_the_mean_width(folder: Path) -> None:
    code, out, _ = run_command(["info", str(folder), "--json"])
    assert code == 0
    found = json.loads(out)
    assert found["mixed_widths"]
    with open_model(str(folder)) as source:
        ladder = Ladder.of(source)
        for row in found["widths"]:
            assert row["mean_width"] == ladder.mean(row["bits"])
            assert row["bits"] - 1 < row["mean_width"] <= row["bits"]
            with open_model(str(folder), row["bits"]) as narrow:
                assert row["bytes"] == sum(info.nbytes for info in narrow.tensors.values())
    code, out, _ = run_command(["info", str(folder)])
    assert f"4 (mean width {ladder.mean(4):.3f})" in out


def test_a_plan_offers_halves_too(folder: Path) -> None:
    from kbit.planner.memory import predict_memory
    from kbit.planner.models import find_models

    models = {model.bits: model for model in find_models([str(folder)])[0]}
    assert sorted(models) == [2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6]  # type: ignore[type-var]
    source = prepared(folder)
    for bits, model in models.items():
        assert bits is not None
        assert model.name == f"{folder} --bits {bits:g}"
        narrower = source.at_width(bits)
        matrices = [name for name, info in narrower.tensors.items() if len(info.shape) == 2]
        parts = predict_memory(model.spec, model.weights, context=16).to_dict()
        counted = sum(part for key, part in parts.items() if key in ("linear", "embedding", "head"))
        assert counted == sum(narrower.prepared_weight(name).nbytes for name in matrices)
