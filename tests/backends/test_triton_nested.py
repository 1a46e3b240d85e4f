"""A nested model on the Triton backend: every width as the reference has it, and all of them on one memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_cases import DictSource
from half_precision_cases import assert_close
from nested_cases import write_nested

from kbit.backends.reference.backend import ReferenceBackend
from kbit.engine.generate import generate
from kbit.engine.loader import LoadedModel, load_model
from kbit.engine.sampler import SamplingParams
from kbit.engine.self_speculation import SelfDrafter
from kbit.engine.speculative import Speculation
from kbit.formats.quant_tensor import QuantTensor
from kbit.host.errors import UnsupportedError
from kbit.models.decoder import Decoder
from kbit.models.load import load_decoder
from kbit.models.opening import open_model

pytest.importorskip("triton")

from kbit.backends.triton import shared
from kbit.backends.triton.backend import TritonBackend
from kbit.backends.triton.weight import triton_weight
from kbit.kernels.triton.codecs.nested_planes import pack_planes

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTHS = tuple(range(8, 1, -1))
IDS = torch.arange(1, 12)[None]


def nested_folder(write: Callable[..., Path], folder: Path, *flags: str) -> Path:
    """A model of one layer, of sizes that are no multiples of the kernels', as `kbit quantize --nested 2..8` leaves it."""
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 3, "num_key_value_heads": 1}
    model = write(folder / "model", num_hidden_layers=1, head_dim=16, **sizes)
    return write_nested(model, folder / "all", "2..8", *flags)


@pytest.fixture(scope="module")
def folder(write_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = ["--block-size", "16", "--override", "*embed_tokens*=nested2..8-b16"]
    return nested_folder(write_model, tmp_path_factory.mktemp("nested"), *flags)


def logits(decoder: Decoder, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Of a prompt, and of a token after it."""
    cache = decoder.new_cache(1, 32)
    return torch.cat(
        [torch.as_tensor(decoder.forward(part, cache)).cpu() for part in (ids[:, :-1], ids[:, -1:])], dim=1
    )


def as_reference(folder: Path, width: int) -> DictSource:
    """What is stored up to a width."""
    with open_model(str(folder), width) as source:
        return DictSource(source.config, {name: source.read_weight(name) for name in source.tensors})


def planes_of(loaded: LoadedModel) -> dict[str, list[int]]:
    """Where the planes of every nested matrix lie."""
    weights = loaded.decoder.weights
    matrices = {"embedding": weights.embedding, **weights.layers[0].matrices}
    return {slot: [plane.data_ptr() for plane in triton_weight(weight).planes] for slot, weight in matrices.items()}


def test_every_width_is_the_references(device: str, folder: Path) -> None:
    """Through one memory: what the widest has prepared serves all others, without a plane more, there and back."""
    loaded = load_model(str(folder), backend=TritonBackend(device))
    assert (loaded.bits, loaded.widths) == (8, WIDTHS)
    whole = planes_of(loaded)
    assert all(len(planes) == 7 for planes in whole.values())
    seen: dict[int, torch.Tensor] = {}
    for width in (8, 2, 7, 3, 6, 4, 5):
        narrower = loaded.at_width(width)
        assert planes_of(narrower) == {slot: planes[: width - 1] for slot, planes in whole.items()}
        source = as_reference(folder, width)
        seen[width] = logits(narrower.decoder)
        assert_close(seen[width], logits(load_decoder(source, ReferenceBackend())), source)
    for width in (3, 8):
        assert torch.equal(logits(loaded.at_width(width).decoder), seen[width])
    assert planes_of(loaded) == whole


def test_scales_of_16_bits_of_either_kind(device: str, write_model: Callable[..., Path], tmp_path: Path) -> None:
    """And one scale a row."""
    folder = nested_folder(write_model, tmp_path, "--block-size", "0", "--scale-dtype", "bf16")
    loaded = load_model(str(folder), backend=TritonBackend(device))
    for width in (5, 2):
        source = as_reference(folder, width)
        assert_close(logits(loaded.at_width(width).decoder), logits(load_decoder(source, ReferenceBackend())), source)


def test_nothing_is_packed_twice(device: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A width takes over the planes that others have, whoever loaded them, and adds those that it alone reads."""
    packed: list[int] = []

    def remember(matrix: QuantTensor, device: torch.device, known: Sequence[torch.Tensor] = ()) -> Any:
        planes = pack_planes(matrix, device, known)
        packed.append(len(planes) - len(known))
        return planes

    monkeypatch.setattr(shared, "pack_planes", remember)
    backend = TritonBackend(device)
    three = load_model(str(folder), backend=backend, bits=3)
    assert packed == [2] * 8
    narrow = planes_of(three)
    two = three.at_width(2)
    assert planes_of(two) == {slot: planes[:1] for slot, planes in narrow.items()}
    assert packed == [2] * 8
    five = load_model(str(folder), backend=backend, bits=5)
    assert packed == [2] * 16
    wide = planes_of(five)
    assert {slot: planes[:2] for slot, planes in wide.items()} == narrow
    assert three.at_width(3) is three
    assert three.decoder.weights.embedding is load_model(str(folder), backend=backend, bits=3).decoder.weights.embedding
    assert packed == [2] * 16

    # q, k and v lie one after another at every width: what multiplies them is one matrix of the same memory.
    for model in (two, three, five):
        q, k, v = (triton_weight(model.decoder.weights.layers[0].matrices[slot]).planes for slot in "qkv")
        for first, second, third in zip(q, k, v, strict=True):
            assert second.data_ptr() - first.data_ptr() == first.nbytes
            assert third.data_ptr() - second.data_ptr() == second.nbytes

    # A captured graph holds addresses: the runner names all that it reads.
    runner: Any = three.decoder._runner
    held = {plane.data_ptr() for weight in runner._body.held() for plane in weight.planes}
    assert {plane for planes in narrow.values() for plane in planes} <= held

    apart = load_model(str(folder), backend=TritonBackend(device), bits=2)
    assert not set(planes_of(apart)["up"]) & set(narrow["up"])


def test_planes_that_nobody_reads_any_more_are_freed(device: str, folder: Path) -> None:
    backend = TritonBackend(device)
    five = load_model(str(folder), backend=backend, bits=5)
    three = five.at_width(3)
    kept, freed = (
        weakref.ref(triton_weight(five.decoder.weights.layers[0].matrices["up"]).planes[at]) for at in (1, 3)
    )
    del five
    gc.collect()
    assert freed() is None
    assert kept() is not None
    assert len(planes_of(three.at_width(5))["up"]) == 4


def test_rounded_activations_are_refused(device: str, folder: Path) -> None:
    with pytest.raises(
        UnsupportedError, match=r"int8 does not run nested2..8-b16: its planes lie apart.*--compute fp16"
    ):
        load_model(str(folder), backend=TritonBackend(device, compute="int8"))


def test_low_planes_draft(device: str, folder: Path) -> None:
    """Self-speculation: the same text, of which some tokens come from another width on the same planes and cache."""
    loaded = load_model(str(folder), backend=TritonBackend(device))
    ids = loaded.tokenizer.encode("ab")
    greedy = SamplingParams(temperature=0)
    plain, sped = (
        generate(loaded.decoder, loaded.tokenizer, ids, greedy, max_tokens=4, speculation=speculation).run()
        for speculation in (None, Speculation(SelfDrafter(loaded, 7)))
    )
    assert sped.speculation is not None
    assert sped.speculation.accepted > 0
    assert sped.text == plain.text
