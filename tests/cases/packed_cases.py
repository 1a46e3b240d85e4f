"""Folders as other quantizers write them: every linear layer of a tiny model, packed bit by bit.

Codes, zeros and scales are drawn and packed as the layouts are documented; what they stand for is computed
from them in torch, as the libraries do. Nothing that makes them uses what is tested.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kbit.checkpoint.resolve import open_model
from kbit.checkpoint.source import StoredSource
from kbit.formats.stored import StoredMatrix, widened
from kbit.host.errors import CheckpointError, KbitError


class Packed(NamedTuple):
    """One layer: its tensors by the end of their names, and the weight (N, K) that the library makes of them."""

    tensors: dict[str, torch.Tensor]
    weight: torch.Tensor


def write_packed(
    model: Path,
    out: Path,
    section: dict[str, Any],
    pack: Callable[[torch.Size, torch.Generator], Packed],
    *,
    key: str = "quantization_config",
    only: str = "_proj",
) -> dict[str, torch.Tensor]:
    """A copy of a model whose linear layers are packed.

    Args:
        model: a Hugging Face folder.
        out: the folder to write.
        section: what config.json says of the quantizer.
        pack: shape (N, K) and a generator -> the layer.
        key: of the section.
        only: what the name of a packed layer holds.

    Returns:
        The weights, by name, as the library dequantizes them.
    """
    shutil.copytree(model, out)
    generator = torch.Generator().manual_seed(3)
    weights, tensors = {}, {}
    for name, tensor in load_file(model / "model.safetensors").items():
        if only not in name or tensor.ndim != 2:
            tensors[name] = tensor
            continue
        packed = pack(tensor.shape, generator)
        weights[name] = packed.weight
        for end, part in packed.tensors.items():
            tensors[name.removesuffix("weight") + end] = part.contiguous()
    save_file(tensors, out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, key: section}))
    return weights


def write_layer(
    out: Path,
    section: dict[str, Any],
    pack: Callable[[torch.Size, torch.Generator], Packed],
    shape: tuple[int, int] = (96, 128),
    *,
    key: str = "quantization_config",
) -> dict[str, torch.Tensor]:
    """A folder of one packed layer, "a": see write_packed."""
    packed = pack(torch.Size(shape), torch.Generator().manual_seed(5))
    out.mkdir()
    save_file({f"a.{end}": part.contiguous() for end, part in packed.tensors.items()}, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps({key: section}))
    return {"a.weight": packed.weight}


def edit_section(folder: Path, **changes: Any) -> None:
    """Change entries of what config.json says of the quantizer."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def assert_weights(folder: Path, weights: dict[str, torch.Tensor], held: str, packed_as: str) -> None:
    """A folder's weights are the library's, bit for bit once rounded to the library's type, however they are read.

    Args:
        folder: the packed model.
        weights: as the library dequantizes them.
        held: how kbit holds them; the beginning of that, where it depends on the shape.
        packed_as: the label.
    """
    with open_model(str(folder)) as source:
        assert isinstance(source, StoredSource)
        assert weights.keys() <= source.tensors.keys()
        assert "quantization_config" not in source.config
        for name, expected in weights.items():
            info = source.tensors[name]
            assert (info.shape, info.packed_as) == (tuple(expected.shape), packed_as)
            assert info.stored_as.startswith(held)
            values = source.read_array(name)
            assert torch.equal(torch.from_numpy(values).to(expected.dtype), expected)
            stored = source.read_stored(name)
            if isinstance(stored, StoredMatrix):
                assert np.array_equal(stored.tensor().dequantize().numpy(), values)
            else:
                assert np.array_equal(widened(stored.values, stored.kind), values)
            for start, stop in ((0, 1), (3, 14), (expected.shape[0] - 5, expected.shape[0]), (7, 7)):
                assert np.array_equal(source.read_array_rows(name, start, stop), values[start:stop])


def read_all(folder: Path) -> None:
    with open_model(str(folder)) as source:
        for name in source.tensors:
            source.read(name)


def refused(folder: Path, message: str, kind: type[KbitError] = CheckpointError) -> None:
    """Opening the folder or reading its weights is refused in one line that names it."""
    with pytest.raises(kind, match=message) as caught:
        read_all(folder)
    assert type(caught.value) is kind
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def draw(shape: tuple[int, ...], below: int, generator: torch.Generator) -> torch.Tensor:
    """Whole numbers, int64."""
    return torch.randint(0, below, shape, generator=generator)


def draw_scales(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Scales of very different sizes, such that a tiny model's values stay finite."""
    return (0.02 * torch.exp(0.5 * torch.randn(shape, generator=generator))).to(dtype)


def stream_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of codes as rows of int32 words: one code after another, from the lowest bit on."""
    one_by_one = (codes.numpy()[..., None] >> np.arange(bits) & 1).astype(np.uint8).reshape(len(codes), -1)
    spare = -one_by_one.shape[1] % 32
    data = np.packbits(np.pad(one_by_one, ((0, 0), (0, spare))), axis=1, bitorder="little")
    return torch.from_numpy(np.ascontiguousarray(data).view("<i4"))


def planar_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of codes as rows of int32 words: of every 32 codes the low four bits, then two, then one, as there are."""
    planes = {5: ((4, 0), (1, 4)), 6: ((4, 0), (2, 4)), 7: ((4, 0), (2, 4), (1, 6))}[bits]
    runs = codes.reshape(codes.shape[0], -1, 32)
    parts = [
        stream_words((runs[:, run] >> place) & (2**width - 1), width)
        for run in range(runs.shape[1])
        for width, place in planes
    ]
    return torch.cat(parts, dim=1)


def gptq(
    bits: int, group: int, *, symmetric: bool, layout: int, ordered: bool = False, dtype: torch.dtype = torch.float16
) -> Callable[[torch.Size, torch.Generator], Packed]:
    """A layer as AutoGPTQ (layout 1) and GPTQModel (1, 2) write it."""
    words = planar_words if bits in (5, 6, 7) else stream_words

    def pack(shape: torch.Size, generator: torch.Generator) -> Packed:
        outputs, inputs = shape
        groups = 1 if group == -1 else inputs // group
        codes = draw((inputs, outputs), 2**bits, generator)
        scales = draw_scales((groups, outputs), dtype, generator)
        # From 1 on: a zero of 0 is 2^bits - 1 in the first layout, and its carry an accident.
        zeros = 1 + draw((groups, outputs), 2**bits - 1, generator)
        if symmetric:
            zeros = torch.full_like(zeros, 2 ** (bits - 1))
        order = torch.arange(inputs) // (inputs // groups)
        if ordered:
            order = order[torch.randperm(inputs, generator=generator)]
        weight = scales[order] * (codes - zeros[order]).to(torch.int16)  # GPTQModel's expression
        tensors = {
            "qweight": words(codes.T, bits).T,
            "qzeros": words(zeros - (1 if layout == 1 else 0), bits),
            "scales": scales,
            "g_idx": order.to(torch.int32),
        }
        return Packed(tensors, weight.T)

    return pack


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def awq(group: int, dtype: torch.dtype = torch.float16) -> Callable[[torch.Size, torch.Generator], Packed]:
    """A layer as AutoAWQ's gemm layout has it."""

    def words(codes: torch.Tensor) -> torch.Tensor:
        rows, outputs = codes.shape
        return stream_words(codes.reshape(rows, outputs // 8, 8)[..., AWQ_ORDER].reshape(rows, outputs), 4)

    def pack(shape: torch.Size, generator: torch.Generator) -> Packed:
        outputs, inputs = shape
        groups = 1 if group == -1 else inputs // group
        codes = draw((inputs, outputs), 16, generator)
        zeros = draw((groups, outputs), 16, generator)
        scales = draw_scales((groups, outputs), dtype, generator)
        repeat = inputs // groups
        weight = (codes - zeros.repeat_interleave(repeat, 0)).to(torch.int8) * scales.repeat_interleave(repeat, 0)
        return Packed({"qweight": words(codes), "qzeros": words(zeros), "scales": scales}, weight.T)

    return pack
