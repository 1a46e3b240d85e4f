"""Other quantizers' models, for `tools/accuracy_frontier.py --folders`: folders, each with a peer.json that names it.

    pip install gptqmodel auto-round hqq torchao            # in an environment of its own; kbit is not needed there
    python tools/peers/quantizers.py MODEL OUT --text calibration.txt --tools gptqmodel,autoround,hqq,torchao

MODEL is a folder of Hugging Face's. Every tool quantizes linear layers alone, at --bits in groups of --group, by its
own defaults otherwise; those that calibrate do so on --text. GPTQModel and AutoRound write packed folders, which kbit
reads exactly; of HQQ and torchao the values that they dequantize to are written, in float32, with the bits that they
take. What is there already is not made again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Bits of a group's scale and of its zero, as HQQ and torchao store them by default.
_SCALE, _ZERO = 16, 16


def texts(model: Path, path: Path, length: int, count: int) -> list[list[int]]:
    """Pieces of a text, as tokens."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(path.read_text(), add_special_tokens=False)["input_ids"]
    pieces = [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]
    return pieces[:: max(1, len(pieces) // count)][:count]


def gptqmodel(model: Path, out: Path, bits: int, group: int, pieces: list[list[int]]) -> dict[str, Any]:
    """GPTQ as GPTQModel does it: symmetric codes, act-order by its default."""
    from gptqmodel import GPTQModel, QuantizeConfig

    made = GPTQModel.load(str(model), QuantizeConfig(bits=bits, group_size=group, offload_to_disk=False), device="cpu")
    made.quantize([{"input_ids": piece, "attention_mask": [1] * len(piece)} for piece in pieces], batch_size=8)
    made.save(str(out))
    return {"tool": "GPTQModel", "method": "gptq"}


def autoround(model: Path, out: Path, bits: int, group: int, pieces: list[list[int]]) -> dict[str, Any]:
    """Rounding and ranges learned by signed gradients, 200 steps a layer (its default)."""
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    data = torch.utils.data.DataLoader(torch.tensor(pieces), batch_size=8)
    maker = AutoRound(
        loaded, AutoTokenizer.from_pretrained(model), bits=bits, group_size=group, sym=True, dataset=data,
        seqlen=len(pieces[0]), nsamples=len(pieces), device_map="cpu", enable_torch_compile=False, amp=False,
    )  # fmt: skip
    maker.quantize_and_save(str(out), format="auto_gptq")
    nested = next(out.rglob("config.json")).parent
    if nested != out:  # it may make a folder in the folder
        for file in nested.iterdir():
            shutil.move(str(file), out / file.name)
    return {"tool": "AutoRound", "method": "signround"}


def hqq(model: Path, out: Path, bits: int, group: int, pieces: list[list[int]]) -> dict[str, Any]:
    """Half-quadratic splitting: no data."""
    from hqq.core.quantize import Quantizer

    def rounded(weight: torch.Tensor) -> torch.Tensor:
        packed, meta = Quantizer.quantize(
            weight, nbits=bits, channel_wise=True, group_size=group, optimize=True, axis=1, device="cpu",
            compute_dtype=torch.float32,
        )  # fmt: skip
        return Quantizer.dequantize(packed, meta)

    _write_plain(model, out, rounded)
    return {"tool": "HQQ", "method": "hqq", "linear_bits": bits + (_SCALE + _ZERO) / group}


def torchao(model: Path, out: Path, bits: int, group: int, pieces: list[list[int]]) -> dict[str, Any]:
    """Symmetric integers in groups, rounded to nearest: what its weight-only configuration does on a CPU."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    def rounded(weight: torch.Tensor) -> torch.Tensor:
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = torch.nn.Parameter(weight)
        quantize_(layer, IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(group)))
        return layer.weight.dequantize().detach()

    _write_plain(model, out, rounded)
    return {"tool": "torchao", "method": "intx", "linear_bits": bits + _SCALE / group}


TOOLS = {"gptqmodel": gptqmodel, "autoround": autoround, "hqq": hqq, "torchao": torchao}


def _write_plain(model: Path, out: Path, rounded: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """The model with the matrices of its layers rounded, in float32."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for name, module in loaded.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in f".{name}":
            module.weight.data = rounded(module.weight.data.clone()).float()
    loaded.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path, help="folder of folders")
    parser.add_argument("--text", type=Path, required=True, help="to calibrate on: never what is measured on")
    parser.add_argument("--tools", default=",".join(TOOLS), help=f"[{','.join(TOOLS)}]")
    parser.add_argument("--bits", default="4,3", help="[4,3]")
    parser.add_argument("--group", type=int, default=64, help="[64]")
    parser.add_argument("--length", type=int, default=256, help="tokens of a piece [256]")
    parser.add_argument("--count", type=int, default=256, help="pieces [256]")
    arguments = parser.parse_args()
    pieces = texts(arguments.model, arguments.text, arguments.length, arguments.count)
    for name in arguments.tools.split(","):
        for bits in map(int, arguments.bits.split(",")):
            out = arguments.out / f"{name}-int{bits}-g{arguments.group}"
            if (out / "peer.json").is_file():
                continue
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            about = TOOLS[name](arguments.model, out, bits, arguments.group, pieces)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                if (arguments.model / file).is_file():
                    shutil.copyfile(arguments.model / file, out / file)
            (out / "peer.json").write_text(json.dumps({**about, "format": f"int{bits}-g{arguments.group}"}))
            print(out, flush=True)


if __name__ == "__main__":
    main()
