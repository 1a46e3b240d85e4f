"""A nested model at each of its widths: natively as the reference says, in memory and mapped, and from its own bytes only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_cases import shapes_of, write_adapter
from native_cases import assert_close
from nested_cases import write_nested

from kbit.backends.cpu.backend import NativeBackend
from kbit.backends.cpu.prepared import PreparedSource, find
from kbit.backends.cpu.prepared_nested import stretches_read
from kbit.backends.reference.backend import ReferenceBackend
from kbit.checkpoint.ladder import Ladder
from kbit.checkpoint.narrowed import NarrowedSource, widths_of
from kbit.checkpoint.resolve import open_model as open_published
from kbit.engine.loader import load_model
from kbit.engine.self_speculation import SelfDrafter
from kbit.formats.stored import StoredMatrix
from kbit.host.errors import UsageError
from kbit.models.adapters import add_adapters
from kbit.models.decoder import Decoder
from kbit.models.load import load_decoder
from kbit.models.opening import open_model
from kbit.models.shard import shard
from kbit.planner.models import PlanModel

WIDTHS = (6, 5, 4, 3, 2)
IDS = torch.arange(1, 12)[None]


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as `kbit quantize --nested 2..6` leaves it, its embedding nested too."""
    out = tmp_path_factory.mktemp("nested") / "folder"
    return write_nested(tiny_model, out, "2..6", "--block-size", "16", "--override", "*embed_tokens*=nested2..6-b16")


def logits(decoder: Decoder) -> torch.Tensor:
    return torch.as_tensor(decoder.forward(IDS, decoder.new_cache(1, 32)))


def expected(folder: Path, width: int | None) -> torch.Tensor:
    with open_model(str(folder), width) as source:
        return logits(load_decoder(source, ReferenceBackend()))


@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_runs_as_the_reference_says(folder: Path, width: int) -> None:
    with open_model(str(folder), width) as source:
        found = logits(load_decoder(source, NativeBackend(1, compute="fp32", kv="fp32")))
    assert_close(found, expected(folder, width))


def test_matrices_of_other_widths_are_whole_unless_bits_are_named(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """--bits 4 is 4 bits also where that is the widest which all matrices have, and the widest is still all there is."""
    uneven = ["--block-size", "16", "--override", "*down_proj*=nested2..4-b16"]
    out = write_nested(tiny_model, tmp_path / "uneven", "2..6", *uneven)
    whole, four = (expected(out, bits) for bits in (None, 4))
    assert not torch.equal(whole, four)
    for prepared in ("off", str(tmp_path / "prepared")):
        monkeypatch.setenv("KBIT_PREPARED", prepared)
        for bits, right in ((None, whole), (4, four)):
            loaded = load_model(str(out), backend=NativeBackend(1, compute="fp32", kv="fp32"), bits=bits)
            assert (loaded.bits, loaded.widths) == (bits, (4, 3, 2))
            assert_close(logits(loaded.decoder), right)
            assert_close(logits(loaded.at_width(4).decoder), four)
        assert load_model(str(out), backend=ReferenceBackend()).bits is None
    with open_model(str(out)) as source:
        ladder = Ladder.of(source)
    assert (ladder.below(None), ladder.below(4)) == ([4, 3, 2], [3, 2])
    assert SelfDrafter(load_model(str(out), backend=NativeBackend(1))).name == "self:4,3"


def test_mapped_widths_are_those_of_memory(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first run writes the file; each width maps it, and gives the bits that it gives in memory."""
    for compute in ("int8", "fp32"):
        in_memory = {}
        monkeypatch.setenv("KBIT_PREPARED", "off")
        for width in WIDTHS:
            loaded = load_model(str(folder), backend=NativeBackend(1, compute=compute), bits=width)
            assert (loaded.prepared, loaded.bits, loaded.widths) == (None, width, WIDTHS)
            in_memory[width] = logits(loaded.decoder)
        monkeypatch.setenv("KBIT_PREPARED", str(tmp_path / compute))
        loaded = load_model(str(folder), backend=NativeBackend(1, compute=compute), bits=4)
        assert loaded.prepared is not None
        assert torch.equal(logits(loaded.decoder), in_memory[4])
        for width in WIDTHS:
            other = loaded.at_width(width)
            assert other.decoder.backend is loaded.decoder.backend
            assert torch.equal(logits(other.decoder), in_memory[width])
        assert loaded.at_width(4) is loaded


def prepared(folder: Path) -> PreparedSource:
    load_model(str(folder), backend=NativeBackend(1))
    found = find(folder, open_model)
    assert found is not None
    return found


def test_a_width_reads_its_planes_and_its_scales_only(folder: Path) -> None:
    """Bytes outside of a width's stretches can be anything: its logits do not change; those of wider ones do."""
    source = prepared(folder)
    whole = source.prepared.read_bytes()
    index, ladder = source._stretches, Ladder.of(source)
    backend = NativeBackend(1)
    with_all = {width: logits(load_decoder(source.at_width(width), backend)) for width in WIDTHS}
    for width in WIDTHS[1:]:
        keep = np.zeros(len(whole), dtype=bool)
        keep[: source._common] = True
        keep[max(step[-1] for step in index["steps"]) :] = True  # the index
        for begin, end in stretches_read(index, ladder.at(width)):
            keep[begin:end] = True
        damaged = np.frombuffer(whole, dtype=np.uint8).copy()
        damaged[~keep] ^= 0x5A
        assert (~keep).sum() > 0
        copy = folder.parent / f"damaged-{width}.kbit"
        copy.write_bytes(damaged.tobytes())
        other = PreparedSource(copy)
        assert torch.equal(logits(load_decoder(other.at_width(width), backend)), with_all[width])
        assert not torch.equal(logits(load_decoder(other, backend)), with_all[6])


def test_a_width_maps_the_bytes_of_a_plain_file(folder: Path) -> None:
    source = prepared(folder)
    nbytes = {}
    for width in WIDTHS:
        narrower = source.at_width(width)
        # The embedding's and all linear matrices' bytes as kernels hold them: those of a plain format of this width.
        nbytes[width] = sum(
            narrower.prepared_weight(name).nbytes for name, info in narrower.tensors.items() if len(info.shape) == 2
        )
        read = sum(end - begin for begin, end in stretches_read(source._stretches, Ladder.of(source).at(width)))
        assert nbytes[width] < read < nbytes[width] + 64 * 2 * len(narrower.tensors) * (width + 4)
    steps = {nbytes[width] - nbytes[width - 1] for width in WIDTHS[:-1]}
    assert len(steps) == 1  # a plane each


def test_the_folder_is_read_only_as_far_as_a_width_needs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kbit.checkpoint.readers.kbit_folder import KbitFolder

    read: list[str] = []
    before = KbitFolder._read_checked

    def remember(self: KbitFolder, name: str) -> object:
        read.append(name)
        return before(self, name)

    monkeypatch.setattr(KbitFolder, "_read_checked", remember)
    with open_model(str(folder), 3) as source:
        assert isinstance(source, NarrowedSource)
        assert widths_of(source) == (3, 2)
        name = "model.layers.0.mlp.up_proj.weight"
        stored = source.read_stored(name)
        assert isinstance(stored, StoredMatrix)
        assert str(stored.format) == "nested2..3-b16" == source.tensors[name].stored_as
    suffixes = {full.removeprefix(f"{name}.") for full in read}
    assert suffixes == {"plane2", "bit3", "scales", "factor2", "factor3"}


def test_every_width_has_the_adapters(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    lora = {"a": str(write_adapter(tmp_path / "lora", tiny_model, shapes_of(tiny_model), size=0.2))}
    loaded = load_model(str(folder), backend=NativeBackend(1, compute="fp32", kv="fp32"), adapters=lora)
    for width in (6, 3):
        with open_model(str(folder), width) as source:
            wanted = add_adapters(load_decoder(source, ReferenceBackend()), source.config, lora)
        found = loaded.at_width(width).decoder
        assert_close(logits(found), expected(folder, width))
        assert_close(logits(found.with_adapter("a")), logits(wanted.with_adapter("a")))
        assert not torch.allclose(logits(found.with_adapter("a")), logits(found), rtol=0.01)


def test_a_share_of_a_narrowed_model(folder: Path) -> None:
    with open_model(str(folder), 3) as source:
        halves = [shard(source, rank, 2) for rank in range(2)]
        for name, dim in (("model.layers.0.self_attn.q_proj.weight", 0), ("model.layers.0.mlp.up_proj.weight", 0)):
            values = torch.cat([half.read_weight(name).dequantize() for half in halves], dim=dim)  # type: ignore[union-attr]
            assert torch.equal(values, source.read(name))


def test_widths_that_are_not_there_are_refused(folder: Path, tiny_model: Path) -> None:
    with pytest.raises(UsageError, match=r"--bits 7: .* serves 2 to 6 bits; choose one of these"):
        open_model(str(folder), 7)
    with pytest.raises(UsageError, match=r"--bits 3: .* has one width; drop --bits, or make .* --nested 2..8"):
        open_model(str(tiny_model), 3)
    loaded = load_model(str(folder), backend=NativeBackend(1))
    with pytest.raises(UsageError, match="serves 2 to 6 bits"):
        loaded.at_width(8)
    with open_published(str(folder)) as source:
        assert widths_of(source) == WIDTHS


def test_a_plan_offers_every_width_of_a_file(folder: Path) -> None:
    """Memory falls with the width, by what its matrices are smaller; what does not fit yet is said to be for later."""
    from kbit.planner.choose import make_recommendation
    from kbit.planner.memory import predict_memory
    from kbit.planner.models import find_models
    from kbit.planner.types import Requirements

    models, _ = find_models([str(folder)])
    by_bits = {model.bits: model for model in models}
    assert sorted(by_bits) == sorted(WIDTHS)  # type: ignore[type-var]
    source = prepared(folder)
    sizes = {}
    for width in WIDTHS:
        model = by_bits[width]
        assert (model.name, model.file, model.fixed) == (f"{folder} --bits {width}", str(folder), True)
        sizes[width] = predict_memory(model.spec, model.weights, context=16).peak
        at_width = source.at_width(width)
        matrices = [name for name, info in at_width.tensors.items() if len(info.shape) == 2]
        held = sum(at_width.prepared_weight(name).nbytes for name in matrices)
        counted = sum(part for key, part in memory_parts(model).items() if key in ("linear", "embedding", "head"))
        assert counted == held
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    found = make_recommendation(Requirements(sizes[4] + 1, 16, kv=("fp16",)), models)
    assert {candidate.model.bits for candidate in found.candidates} == {4, 3, 2}
    assert any(f"{folder}: 4 bits now; the same file at 5 bits needs" in note for note in found.notes)


def memory_parts(model: PlanModel) -> dict[str, int]:
    from kbit.planner.memory import predict_memory

    return predict_memory(model.spec, model.weights, context=16).to_dict()
