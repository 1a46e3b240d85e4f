"""Weights packed by ExLlamaV3, against a reader that takes a ring bit by bit, as the layout is described.

No file that ExLlamaV3 wrote is here: codes are random, so that every window can occur.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packed_cases import Packed, assert_weights, edit_tensors, refused, write_layer

from kbit.checkpoint.resolve import open_model
from kbit.host.errors import UnsupportedError

SECTION = {"quant_method": "exl3", "version": "0.0.30", "bits": 3.0, "head_bits": 6, "codebook": "mcg"}
MCG, MUL1 = 0xCBAC1FED, 0x83DCD12D


def half(pattern: int) -> float:
    return float(struct.unpack("<e", struct.pack("<H", pattern))[0])


def rounded(value: float) -> float:
    """To half precision."""
    return float(struct.unpack("<e", struct.pack("<e", value))[0])


def number(state: int, flag: str) -> float:
    """What 16 bits stand for."""
    if flag == "mul1":
        total = sum((state * MUL1 % 2**32).to_bytes(4, "little"))
        return rounded((1024 + total) * half(0x1EEE) + half(0xC931))
    x = (state * MCG if flag == "mcg" else state * 89226354 + 64248484) % 2**32
    x = (x & 0x8FFF8FFF) ^ 0x3B603B60
    return rounded(half(x & 0xFFFF) + half(x >> 16))


def tile(words: list[int], bits: int, flag: str) -> torch.Tensor:
    """Inputs by outputs of one ring, (16, 16)."""
    string = "".join(f"{words[i + 1]:016b}{words[i]:016b}" for i in range(0, len(words), 2))
    found = torch.zeros(16, 16, dtype=torch.float64)
    # The registers of mma.m16n8k16's operand of 16 x 8, lane after lane, twice: PTX ISA.
    t = 0
    for lane in range(32):
        for right in (0, 8):
            for row in (0, 1, 8, 9):
                end = (t + 1) * bits
                state = int("".join(string[place % len(string)] for place in range(end - 16, end)), 2)
                found[2 * (lane % 4) + row, lane // 4 + right] = number(state, flag)
                t += 1
    return found


def turned(values: torch.Tensor) -> torch.Tensor:
    """Hadamard transforms of each 128 rows, (128 n, m), by sums and differences; not normalised."""
    x = values.clone().view(-1, 128, values.shape[1])
    step = 1
    while step < 128:
        for start in range(0, 128, 2 * step):
            a, b = x[:, start : start + step].clone(), x[:, start + step : start + 2 * step].clone()
            x[:, start : start + step], x[:, start + step : start + 2 * step] = a + b, a - b
        step *= 2
    return x.view(values.shape)


def packer(bits: int, flag: str, signs: bool = False) -> Callable[[torch.Size, torch.Generator], Packed]:
    def pack(shape: torch.Size, generator: torch.Generator) -> Packed:
        outputs, inputs = shape
        words = torch.randint(-(2**15), 2**15, (inputs // 16, outputs // 16, 16 * bits), generator=generator)
        inner = torch.zeros(inputs, outputs, dtype=torch.float64)
        for i in range(inputs // 16):
            for j in range(outputs // 16):
                part = tile([int(word) & 0xFFFF for word in words[i, j]], bits, flag)
                inner[16 * i : 16 * i + 16, 16 * j : 16 * j + 16] = part
        tensors, factors = {"trellis": words.to(torch.int16)}, []
        for name, count in (("su", inputs), ("sv", outputs)):
            if signs:
                packed = torch.randint(-(2**15), 2**15, (count // 16,), generator=generator).to(torch.int16)
                tensors[name] = packed
                factors.append(torch.tensor([1.0 - 2 * (int(w) >> i & 1) for w in packed for i in range(16)]).double())
            else:
                factors.append((0.1 * torch.randn(count, generator=generator)).half().double())
                tensors[f"{name}h"] = factors[-1].half()
        if flag:
            tensors[flag] = torch.tensor({"mcg": MCG, "mul1": MUL1}[flag] - 2**32, dtype=torch.int32)
        weight = turned(turned(inner).T.contiguous()) * factors[1][:, None] * factors[0] / 128
        return Packed(tensors, weight.half())

    return pack


@pytest.mark.parametrize(
    ("bits", "flag", "shape", "signs"),
    [
        (1, "", (128, 128), False),
        (3, "mcg", (128, 256), False),
        (4, "mul1", (256, 128), True),
        (7, "", (128, 128), True),
    ],
)
def test_weights(tmp_path: Path, bits: int, flag: str, shape: tuple[int, int], signs: bool) -> None:
    weights = write_layer(tmp_path / "m", SECTION, packer(bits, flag, signs), shape)
    assert_weights(tmp_path / "m", weights, "F16", f"EXL3 {bits}-bit")


def test_a_packed_head_is_no_embedding(tmp_path: Path) -> None:
    """ExLlamaV3 packs a copy of a tied embedding and leaves the configuration as it was."""
    write_layer(tmp_path / "m", SECTION, packer(2, "mcg"), (128, 128))
    edit_tensors(tmp_path / "m", lambda t: [t.update({f"lm_head{name[1:]}": t.pop(name)}) for name in list(t)])
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with open_model(str(tmp_path / "m")) as source:
        assert list(source.tensors) == ["lm_head.weight"]
        assert source.config["tie_word_embeddings"] is False


def test_what_does_not_fit(tmp_path: Path) -> None:
    def folder(name: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        write_layer(tmp_path / name, SECTION, packer(2, "mcg"), (128, 128))
        edit_tensors(tmp_path / name, edit)
        return tmp_path / name

    other = torch.tensor(12345, dtype=torch.int32)
    refused(folder("a", lambda t: t.update({"a.mcg": other})), "a.mcg is 0x3039.*original 16-bit", UnsupportedError)
    refused(folder("b", lambda t: t.update({"a.mul1": other})), "both mcg and mul1")
    refused(folder("c", lambda t: t.update({"a.trellis": t["a.trellis"][:3].clone()})), "shape .3, 8, 32.*128")
    refused(folder("d", lambda t: t.pop("a.suh")), "a.suh is missing")
    refused(folder("e", lambda t: t.update({"a.svh": t["a.svh"][:64].clone()})), "a.svh is F16 .64,.*but should be")
    refused(folder("f", lambda t: t.update({"b.suh": t["a.suh"].clone()})), "b.suh belongs to a packed weight")
