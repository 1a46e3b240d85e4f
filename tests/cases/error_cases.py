"""The zoo of models with something wrong, and how the tests of errors run a command and check its line."""

from __future__ import annotations

import io
import json
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from kbit.cli import main as cli

Maker = Callable[[Path], object]


UP = "model.layers.1.mlp.up_proj.weight"


def edit_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))


def edit_tensors(model: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(model / "model.safetensors")
    edit(tensors)
    save_file(tensors, model / "model.safetensors")


def edit_header(model: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = model / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def truncate(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def fill(model: Path, name: str, value: float) -> None:
    edit_tensors(model, lambda tensors: tensors[name].view(-1)[:3].fill_(value))


def overlap(header: dict[str, Any]) -> None:
    spans = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    first, second = sorted(spans, key=lambda name: int(spans[name][0]))[:2]
    begin, end = spans[second]
    header[second]["data_offsets"] = [begin - 2, end - 2]
    assert first


def gguf(content: bytes) -> Maker:
    return lambda path: path.write_bytes(content)


def gguf_of(keys: list[tuple[str, str]], tensors: int = 0) -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    body = b"".join(text(key) + struct.pack("<I", 8) + text(value) for key, value in keys)
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(keys)) + body


# Changes to a copy of the tiny model, or (for names with a dot) files.
ZOO: dict[str, Maker] = {
    "good": lambda m: None,
    "truncated": lambda m: truncate(m / "model.safetensors", 100),
    "header-cut": lambda m: (m / "model.safetensors").write_bytes((m / "model.safetensors").read_bytes()[:50]),
    "no-safetensors": lambda m: (m / "model.safetensors").write_bytes(b"<html>404 not found</html>"),
    "overlapping": lambda m: edit_header(m, overlap),
    "outside": lambda m: edit_header(m, lambda h: h[UP].update(data_offsets=[10**9, 10**9 + 5120])),
    "absurd-shape": lambda m: edit_header(m, lambda h: h[UP].update(shape=[-1, 10**30])),
    "wrong-size": lambda m: edit_header(m, lambda h: h[UP].update(shape=[80, 33])),
    "unknown-dtype": lambda m: edit_header(m, lambda h: h[UP].update(dtype="I4")),
    "hostile-name": lambda m: edit_header(m, lambda h: h.update({"\x1b[2J\nx": h.pop(UP)})),
    "missing-tensor": lambda m: edit_tensors(m, lambda t: t.pop(UP)),
    "surplus-tensor": lambda m: edit_tensors(m, lambda t: t.update({"model.extra.weight": torch.ones(2, 2)})),
    "wrong-shape": lambda m: edit_tensors(m, lambda t: t.update({UP: torch.ones(80, 31)})),
    "integers": lambda m: edit_tensors(m, lambda t: t.update({UP: torch.ones(80, 32, dtype=torch.int8)})),
    "nan-linear": lambda m: fill(m, UP, float("nan")),
    "inf-norm": lambda m: fill(m, "model.norm.weight", float("inf")),
    "missing-shard": lambda m: (m / "model-00002-of-00002.safetensors").unlink(),
    "index-outside": lambda m: (m / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {UP: "../good/model.safetensors"}})
    ),
    "index-corrupt": lambda m: (m / "model.safetensors.index.json").write_text('{"weight_map": '),
    "no-config": lambda m: (m / "config.json").unlink(),
    "config-corrupt": lambda m: (m / "config.json").write_text('{"model_type": "llama",'),
    "config-list": lambda m: (m / "config.json").write_text("[]"),
    "config-empty": lambda m: (m / "config.json").write_text("{}"),
    "other-family": lambda m: edit_config(m, model_type="mamba", architectures=["MambaForCausalLM"]),
    "hostile-family": lambda m: edit_config(m, model_type="\x1b]0;owned\x07" + "A" * 100_000),
    "no-hidden-size": lambda m: edit_config(m, hidden_size=None),
    "minus-layers": lambda m: edit_config(m, num_hidden_layers=-2),
    "odd-rope": lambda m: edit_config(m, rope_scaling={"rope_type": "spiral", "factor": 2.0}),
    "aqlm": lambda m: edit_config(m, quantization_config={"quant_method": "aqlm", "nbits_per_codebook": 16}),
    "pickled": lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"),
    "no-weights": lambda m: (m / "model.safetensors").unlink(),
    "no-tokenizer": lambda m: (m / "tokenizer.json").unlink(),
    "tokenizer-corrupt": lambda m: (m / "tokenizer.json").write_text('{"model": 3}'),
    "adapter": lambda m: (m / "config.json").rename(m / "adapter_config.json"),
    "notes.txt": lambda p: p.write_text("no model at all, however long you look at it"),
    "weights.bin": lambda p: p.write_bytes(b"\x80\x02}q\x00."),
    "empty.gguf": gguf(b""),
    "cut.gguf": gguf(gguf_of([("general.architecture", "llama")])[:-3]),
    "magic.gguf": gguf(b"GGML" + bytes(60)),
    "version.gguf": gguf(b"GGUF" + struct.pack("<IQQ", 99, 0, 0)),
    "big-endian.gguf": gguf(b"GGUF" + struct.pack(">IQQ", 3, 0, 0)),
    "counts.gguf": gguf(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60)),
    "arch.gguf": gguf(gguf_of([("general.architecture", "mamba")]) + bytes(64)),
    "empty.txt": lambda p: p.write_bytes(b""),
    "blank.txt": lambda p: p.write_text(" \n\n\t"),
    "latin1.txt": lambda p: p.write_bytes("café".encode("latin-1") * 100),
    "short.txt": lambda p: p.write_text("Three words only."),
    "text.txt": lambda p: p.write_text("It was a dark and stormy night. " * 20),
}


SHARDED = ("missing-shard", "index-outside", "index-corrupt")


def run_command(arguments: list[str], debug: bool = False) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command run in this process."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = out, err
    try:
        code = cli._run(arguments, debug)
    finally:
        sys.stdout, sys.stderr = before
    texts = []
    for stream in (out, err):
        stream.seek(0)
        texts.append(stream.read())
    return code, texts[0], texts[1]


def check_line(stdout: str, stderr: str) -> str:
    """The error's line, after checking that it is one and alone."""
    assert stdout == ""
    assert "Traceback" not in stderr
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("kbit: error: ")
    assert lines[0].isprintable()
    assert len(lines[0]) < 1100
    return lines[0]


Q = "quantize {good} -o {new} "


R = "run Hello -m {good} "


EV = "eval {good} --data {text.txt} "


def split(arguments: str, zoo: Path, new: Path) -> list[str]:
    """Words of a command line, "{name}" replaced and '...' taken as one word."""
    words = re.findall(r"'[^']*'|\S+", arguments)
    return [
        re.sub(r"\{(.+?)\}", lambda m: str(new if m[1] == "new" else zoo / m[1]), word.strip("'")) for word in words
    ]
