"""Trellis codes: how near they come to normal numbers, how long the search takes, and how fast they are decoded.

    python benchmarks/trellis.py error --tiles 3907           # 10^6 numbers: squared error, CPU time of the search
    python benchmarks/trellis.py speed                        # products with one token, in turns with plain formats
    python benchmarks/trellis.py models --model QWEN.gguf     # a whole model, decoding, in turns with plain formats

`speed` has the linear layers of Qwen2.5 0.5B and 1.5B in matrices of random codes that no cache holds, multiplied with
one token; weights per nanosecond of process time, the best of the rounds, on one thread. `models` rounds a model to
nearest in each format (embedding and head in 8 bits; kept in --folder), lets each write 64 tokens in turns, each in a
process of its own, and prints medians, least and most tokens per second, and the ratio to the plain format named beside
it. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from kbit import _native
from kbit.backends.cpu.weight import prepare
from kbit.formats.quant_tensor import QuantTensor
from kbit.formats.registry import parse_format
from kbit.formats.trellis import TrellisFormat
from kbit.formats.trellis_code import search, tile_levels

ERRORS = (
    *("trellis2", "trellis2-sum4", "trellis3", "trellis4", "trellis5", "trellis6"),
    *("trellis2-l12", "trellis2-sum4-l12", "trellis3-l12", "trellis4-l12"),
)
SPEEDS = (
    *("lloyd2-b64", "nf3-b64", "nf4-b64", "lloyd5-b64"),
    *("trellis2", "trellis2-sum4", "trellis3", "trellis4", "trellis5"),
)
# Of whole models, and the plain format of about as many bits that each is compared with; trellis2 with one of 3 bits.
MODELS = {"trellis2-l12": "nf3-b64", "trellis3-l12": "nf3-b64", "trellis4-l12": "nf4-b64"}
PROMPT, WRITTEN = "The history of the sea", 64
SHAPES = {"0.5B": (4864, 896), "1.5B": (8960, 1536)}
SPREAD = 64_000_000  # bytes of copies of a layer
CHUNK = 256  # tiles at a time


def errors(tiles: int, formats: list[str]) -> None:
    """Print the squared error of normal numbers by format, in shares of their own."""
    for text in formats:
        format = parse_format(text)
        assert isinstance(format, TrellisFormat)
        generator = torch.Generator().manual_seed(0)
        total = size = 0.0
        seconds = 0.0
        for start in range(0, tiles, CHUNK):
            numbers = torch.randn(min(CHUNK, tiles - start), 256, generator=generator)
            begin = time.process_time()
            strings = search(format, numbers * format.share, 1)
            seconds += time.process_time() - begin
            found = tile_levels(format, strings).flatten(1) * (format.step / format.share)
            total += float((found - numbers).square().sum(dtype=torch.float64))
            size += float(numbers.square().sum(dtype=torch.float64))
        print(f"{text:18} {total / size:.5f}  {seconds / tiles / 256 * 1e6:.2f} us a weight", flush=True)


def random_matrix(text: str, rows: int, columns: int, seed: int) -> QuantTensor:
    """A matrix of random codes."""
    generator = torch.Generator().manual_seed(seed)
    format = parse_format(text)
    stored = {}
    for name, part in format.parts(rows, columns).items():
        stored[name] = torch.randint(0, 256, part.shape, dtype=torch.uint8, generator=generator)
        if part.dtype == "F16":
            stored[name] = torch.full(part.shape, 0.01, dtype=torch.float16)
    return QuantTensor(format, (rows, columns), stored, torch.from_numpy(format.codebook(columns)))


def speeds(rounds: int, isa: str, formats: list[str]) -> None:
    """Print weights per nanosecond by format and shape."""
    context = _native.Context(isa or None, 1)
    for name, (rows, columns) in SHAPES.items():
        x = np.random.default_rng(0).standard_normal((1, columns), dtype=np.float32)
        out = np.empty((1, rows), dtype=np.float32)
        programs = {}
        for text in formats:
            copies = max(2, round(SPREAD / parse_format(text).nbytes(rows, columns)))
            made = []
            weight = random_matrix(text, rows, columns, 0)
            for _ in range(copies):
                program = _native.Program(context, "int8")
                program.finish(program.buffer(columns))
                program.head(prepare(weight, context).matrix, None, 0.0)
                program.logits(x, out)
                made.append(program)
            programs[text] = made
        best = dict.fromkeys(formats, float("inf"))
        for _ in range(rounds):
            for text, made in programs.items():
                begin = time.process_time()
                for program in made:
                    program.logits(x, out)
                best[text] = min(best[text], (time.process_time() - begin) / len(made))
        for text, seconds in best.items():
            print(f"{name} {rows} x {columns}  {text:14} {rows * columns / seconds / 1e9:6.1f} weights/ns", flush=True)


def models(path: str, folder: Path, rounds: int, threads: int, formats: list[str]) -> None:
    """Print tokens per second of a model by format, measured in turns."""
    kbit = [sys.executable, "-m", "kbit"]
    for text in formats:
        if not (folder / text).is_dir():
            words = ["quantize", path, "--method", "rtn", "--bits", "4", "--embedding-bits", "8", "--no-measure"]
            words += ["--override", f"*proj.weight={text}", "-o", str(folder / text)]
            subprocess.run([*kbit, *words], check=True, stdout=subprocess.DEVNULL)
    found: dict[str, list[float]] = {text: [] for text in formats}
    for turn in range(rounds + 1):
        for text, speeds in found.items():
            words = ["run", PROMPT, "--raw", "--model", str(folder / text), "--max-tokens", str(WRITTEN)]
            words += ["--allow-repetition", "--threads", str(threads), "--json"]
            said = subprocess.run([*kbit, *words], check=True, capture_output=True, text=True).stdout
            if turn:  # the first prepares weights
                speeds.append(json.loads(said)["decode_tokens_per_second"])
    medians = {text: statistics.median(speeds) for text, speeds in found.items()}
    for text, speeds in found.items():
        plain = MODELS.get(text, "")
        ratio = f"  {medians[text] / medians[plain]:.2f} of {plain}" if plain in medians else ""
        print(f"{text:16} {medians[text]:6.1f} tokens/s ({min(speeds):.1f} to {max(speeds):.1f}){ratio}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("error", "speed", "models"))
    parser.add_argument("--tiles", type=int, default=400, help="of 256 numbers")
    parser.add_argument("--rounds", type=int, help="30; of models 7")
    parser.add_argument("--model", help="of models: anything that kbit quantize takes")
    parser.add_argument("--folder", type=Path, help="of models: for what is made of it; a temporary one by default")
    parser.add_argument("--threads", type=int, default=2, help="of models")
    parser.add_argument("--isa", default="", help="an instruction set; the best one by default")
    parser.add_argument("--formats", help="others than the usual ones, with commas")
    arguments = parser.parse_args()
    formats = arguments.formats.split(",") if arguments.formats else None
    if arguments.what == "error":
        errors(arguments.tiles, formats or list(ERRORS))
    elif arguments.what == "speed":
        speeds(arguments.rounds or 30, arguments.isa, formats or list(SPEEDS))
    else:
        if arguments.model is None:
            parser.error("models: say which with --model")
        chosen = formats or list(dict.fromkeys([*MODELS, *MODELS.values(), "lloyd2-b64"]))
        with tempfile.TemporaryDirectory() as made:
            folder = arguments.folder or Path(made)
            models(arguments.model, folder, arguments.rounds or 7, arguments.threads, chosen)


if __name__ == "__main__":
    main()
