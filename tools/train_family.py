"""Train small Llama-style models of several sizes on local text: a family to measure scaling on.

    python tools/train_family.py 0.25m 0.7m 1.3m --out family --tokens 6M
    python tools/train_family.py 128x256x4 256x512x3 --corpus my_texts/ --out family --compile

Sizes are names (below) or HIDDENxINTERMEDIATExLAYERS. Each becomes a folder OUT/NAME-SIZE in Hugging Face's layout,
float16, that kbit and transformers load, with training.json and the loss of every step. Kill it when you like: the same
command goes on where the last checkpoint was, and passes over what is finished.

The text is a folder of .txt, one .txt or a tar archive; without --corpus, the novels in the folder that KBIT_DATA
names, with their tokenizer, so that a new size joins the novels-* models there. Of another corpus a byte-level BPE
tokenizer is trained and kept in OUT/tokenizer.json, where the next size finds it. Without --heldout, some documents
are held out (of a single one, its end) and never trained on.

Losses are in nats per token. The held-out one is that of the weights as stored, in the windows of
`kbit eval --convention gptq`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from train.shapes import PRESETS, Shape, parse_size

from kbit.host.errors import KbitError, UsageError

DEFAULT_CORPUS = Path("novels") / "novels.tar.xz"
DEFAULT_HELDOUT = Path("novels") / "heldout"
DEFAULT_TOKENIZER = Path("models") / "novels-2m" / "tokenizer.json"


def parse_tokens(text: str) -> int:
    """ "6M", "250k", "1.5B" or a plain number."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([kKmMbB]?)", text)
    tokens = float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[match[2].lower()] if match else 0
    if not 1 <= tokens <= 1e15:
        raise UsageError(f"--tokens {text}: give a number such as 250k, 6M or 1.5B")
    return round(tokens)


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    shapes = "\n".join(
        f"  {name:6} {shape.hidden}x{shape.intermediate}x{shape.layers}, {shape.non_embedding_parameters:,} parameters "
        "besides the embedding"
        for name, shape in PRESETS.items()
    )
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"sizes:\n{shapes}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("sizes", nargs="+", metavar="SIZE")
    add("--out", type=Path, required=True, help="folder of the family")
    add("--name", help="what the models' names begin with (default: the corpus's)")
    add("--corpus", type=Path, help="folder of .txt, a .txt or a tar archive (default: KBIT_DATA's novels)")
    add("--heldout", type=Path, action="append", default=[], help="text never to train on; may be given again")
    add("--heldout-fraction", type=float, default=0.02, help="without --heldout: how much to hold out (default 0.02)")
    add("--tokenizer", type=Path, help="a tokenizer.json to use")
    add("--vocabulary", type=int, default=2048, help="tokens of a tokenizer trained here (default 2048)")
    add("--tokens", help="tokens to train on, such as 6M (default: --tokens-per-parameter)")
    add("--tokens-per-parameter", type=float, default=20.0, help="besides the embedding (default 20)")
    add("--context", type=int, default=256, help="tokens per window (default 256)")
    add("--batch", type=int, default=16, help="windows per step (default 16)")
    add("--learning-rate", type=float, help="its peak (default: by the width)")
    add("--seed", type=int, default=0)
    add(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="auto: bf16 where the device multiplies it",
    )
    add("--compile", action="store_true", help="torch.compile: half a minute at first, then up to 1.6 times the speed")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--threads", type=int, help="of the CPU (default: torch's)")
    add("--checkpoint-seconds", type=float, default=60.0, help="time between checkpoints (default 60)")
    add("--json", action="store_true", help="one JSON object on standard output")
    return parser


def choose_texts(arguments: argparse.Namespace) -> tuple[Path, list[Path], Path | None]:
    """Corpus, held-out texts and tokenizer: what the options say, and KBIT_DATA's novels where they say nothing."""
    if arguments.corpus is not None:
        return arguments.corpus, arguments.heldout, arguments.tokenizer
    named = os.environ.get("KBIT_DATA")
    if not named:
        raise UsageError("no text to train on: give --corpus, or name a folder with novels/novels.tar.xz in KBIT_DATA")
    data = Path(named)
    return (
        data / DEFAULT_CORPUS,
        arguments.heldout or [data / DEFAULT_HELDOUT],
        arguments.tokenizer or (data / DEFAULT_TOKENIZER),
    )


def family_tokenizer(
    corpus: Any, given: Path | None, arguments: argparse.Namespace, say: Callable[[str], None]
) -> bytes:
    """The tokenizer given; else the one of OUT, which is trained if need be."""
    from train.corpus import train_tokenizer

    from kbit.host.files import write_durably

    path = given or arguments.out / "tokenizer.json"
    try:
        if given is None and not path.exists():
            say(f"training a tokenizer of {arguments.vocabulary} tokens")
            arguments.out.mkdir(parents=True, exist_ok=True)
            write_durably(path, train_tokenizer(corpus.training(), arguments.vocabulary))
        return path.read_bytes()
    except OSError as error:
        raise KbitError(f"{path}: {error.strerror or error}") from error


class Reporter:
    """Tells people on standard error how it goes: on a terminal in a line that changes, else in a line now and then."""

    EVERY_SECONDS = 30.0

    def __init__(self, name: str, steps: int, tokens_per_step: int) -> None:
        self.name, self.steps, self.tokens_per_step = name, steps, tokens_per_step
        self.live = sys.stderr.isatty()
        self.first: tuple[int, float] | None = None
        self.said, self.heldout = -math.inf, ""

    def __call__(self, step: Any) -> None:
        """Takes a train.run.Step."""
        if step.heldout is not None:
            self.heldout = f", held out {step.heldout:.3f}"
        if self.first is None:
            self.first = (step.number, step.seconds)
        last = step.number == self.steps
        if step.seconds - self.said < (0.5 if self.live else self.EVERY_SECONDS) and not last:
            return
        self.said = step.seconds
        steps, seconds = step.number - self.first[0], step.seconds - self.first[1]
        left = ""
        if steps and seconds > 0:
            rate = steps / seconds
            left = (
                f", {rate * self.tokens_per_step:,.0f} tokens/s, {(self.steps - step.number) / rate / 60:.1f} min left"
            )
        line = f"{self.name}: step {step.number} of {self.steps}, loss {step.loss:.3f}{self.heldout}{left}"
        if self.live:
            print(f"\r\x1b[K{line}", end="\n" if last else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)


def say(line: str) -> None:
    """A line for people."""
    print(line, file=sys.stderr, flush=True)


def train_family(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Train what the options ask for; returns a record of each model."""
    shapes: list[Shape] = [parse_size(size) for size in arguments.sizes]
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise UsageError(f"--threads {arguments.threads}: must be at least 1")
        os.environ.setdefault("RAYON_NUM_THREADS", str(arguments.threads))  # the tokenizer's; read when it first works
    if not arguments.checkpoint_seconds >= 0:
        raise UsageError(f"--checkpoint-seconds {arguments.checkpoint_seconds}: must not be negative")
    if arguments.tokens is None and not 0 < arguments.tokens_per_parameter < 1e6:
        raise UsageError(f"--tokens-per-parameter {arguments.tokens_per_parameter}: give a number above 0, such as 20")
    wanted = None if arguments.tokens is None else parse_tokens(arguments.tokens)
    path, heldout, tokenizer = choose_texts(arguments)

    import torch
    from train.corpus import open_corpus, tokenize
    from train.run import Job, Machine, finished, train
    from train.settings import Settings, best_precision, default_rate

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU here: use --device cpu")
    device = torch.device("cuda" if arguments.device != "cpu" and torch.cuda.is_available() else "cpu")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    corpus = open_corpus(path, heldout, arguments.heldout_fraction)
    name = arguments.name or corpus.name
    if not re.fullmatch(r"[\w.-]+", name):
        raise UsageError(f"--name {name!r}: use letters, digits, '.', '_' and '-'")
    tokens = tokenize(corpus, family_tokenizer(corpus, tokenizer, arguments, say), arguments.out, say)
    jobs = []
    for shape in shapes:
        many = wanted or round(arguments.tokens_per_parameter * shape.non_embedding_parameters)
        settings = Settings(
            shape=shape,
            corpus=tokens.digest,
            context=arguments.context,
            batch=arguments.batch,
            steps=math.ceil(many / max(1, arguments.batch * arguments.context)),
            learning_rate=default_rate(shape) if arguments.learning_rate is None else arguments.learning_rate,
            seed=arguments.seed,
            precision=best_precision(device) if arguments.precision == "auto" else arguments.precision,
        )
        jobs.append(Job(settings, tokens, corpus.name, arguments.out / f"{name}-{shape.name}"))
        finished(jobs[-1])  # refuses now rather than after hours
    stopped: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.append(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    records = []
    try:
        for job in jobs:
            settings = job.settings
            reporter = Reporter(job.folder.name, settings.steps, settings.batch * settings.context)
            machine = Machine(device, arguments.compile, arguments.checkpoint_seconds)
            record = train(job, machine, say, reporter, lambda: bool(stopped))
            say(
                f"{job.folder}: {record['non_embedding_parameters']:,} parameters, {record['training_tokens']:,} "
                f"tokens, held out {record['heldout_nll_per_token']:.4f} nats per token"
            )
            records.append({"folder": str(job.folder), **record})
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return records


def main(arguments: list[str] | None = None) -> int:
    """Run with command-line arguments; returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 stopped."""
    options = make_parser().parse_args(arguments)
    try:
        records = train_family(options)
    except KbitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # before the first step; later ones are finished first
        return 130
    if options.json:
        print(json.dumps({"models": records}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
