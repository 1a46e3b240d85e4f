"""What bits cost an embedding model: Spearman's rank correlation with people's judgement of how alike two texts are.

    python tools/sts_accuracy.py all-MiniLM-L6-v2/ --bits 8,4,3,2 --method rtn,gptq

The STS benchmark's test set (1,379 pairs, scores from 0 to 5; Cer et al. 2017, arXiv:1708.00055), read from
KBIT_DATA/stsb/sts-test.csv or --data: tab separated, score and texts in columns 5 to 7. Of every width the linear
layers are quantized into a temporary folder, which the engine of `kbit embed` then runs. Errors are standard errors
over 1,000 bootstrap draws of the pairs; of a difference from fp32, over the same draws of both.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kbit.backends.select import select_backend
from kbit.calibration.request import CalibrationRequest
from kbit.engine.embed import Embedder, similarities
from kbit.formats.quant_format import QuantFormat
from kbit.models.opening import open_model
from kbit.quantizers.calibrated import CalibratedRounding
from kbit.quantizers.convert import convert
from kbit.quantizers.methods import get_method
from kbit.quantizers.plan import make_plan

DRAWS, SEED = 1000, 20261129

Numbers = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Texts two by two, and how alike they are to people: (N,) each."""

    one: Sequence[str]
    other: Sequence[str]
    scores: Numbers


@dataclass(frozen=True, eq=False)
class Result:
    """A model's vectors: cosines of the pairs (N,), stored bytes, and the mean cosine with the fp32 model's vectors."""

    label: str
    nbytes: int
    cosines: Numbers
    vectors: NDArray[np.float32]


def read_pairs(path: Path) -> Pairs:
    """The pairs of a file."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line]
    return Pairs([row[5] for row in rows], [row[6] for row in rows], np.array([float(row[4]) for row in rows]))


def ranks(values: Numbers) -> Numbers:
    """Ranks from 0, equal values sharing the mean of theirs: (N,)."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    means: Numbers = np.cumsum(counts) - (counts + 1) / 2
    return means[inverse]


def spearman(x: Numbers, y: Numbers) -> float:
    """The correlation of ranks."""
    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def draws(pairs: int) -> NDArray[np.int64]:
    """(DRAWS, N) indices of pairs, drawn with replacement."""
    return np.random.default_rng(SEED).integers(0, pairs, (DRAWS, pairs))


def measured(folder: str, label: str, pairs: Pairs, args: argparse.Namespace) -> Result:
    """What a model makes of the pairs."""
    with open_model(folder) as source:
        nbytes = sum(info.nbytes for info in source.tensors.values())
        backend = select_backend("cpu", threads=args.threads, compute=args.compute, kv_bits=32)
        model = Embedder(source, backend)
    found = model.embed([*pairs.one, *pairs.other], model.prompt(args.prompt_name))
    vectors = found.vectors
    cosines = similarities(vectors[: len(pairs.one)], vectors[len(pairs.one) :])
    return Result(label, nbytes, cosines.astype(np.float64), vectors)


def quantized(model: str, out: Path, format: QuantFormat, method: str, args: argparse.Namespace) -> None:
    """Writes a model's k-bit version."""
    found = get_method(method)
    if isinstance(found, CalibratedRounding):
        found = found.calibrated_on(CalibrationRequest.of([args.calibration], args.calibration_tokens, False))
    with open_model(model) as source:
        convert(source, make_plan(source, format, embedding_bits=args.embedding_bits, method=found), out)


def table(results: Sequence[Result], pairs: Pairs) -> str:
    """The results as Markdown, the first being what the others are compared with."""
    drawn = draws(len(pairs.scores))
    lines = [
        "| weights | stored | Spearman x 100 | less than fp32 | cosine with fp32 |",
        "|--|--|--|--|--|",
    ]
    first = results[0]
    samples = {r.label: [100 * spearman(r.cosines[d], pairs.scores[d]) for d in drawn] for r in results}
    for r in results:
        value, spread = 100 * spearman(r.cosines, pairs.scores), np.std(samples[r.label])
        less = np.array(samples[first.label]) - np.array(samples[r.label])
        lost = 100 * spearman(first.cosines, pairs.scores) - value
        alike = float(similarities(first.vectors, r.vectors).mean())
        lines.append(
            f"| {r.label} | {r.nbytes / 1e6:.1f} MB | {value:.2f} ± {spread:.2f} | {lost:.2f} ± {np.std(less):.2f} | "
            f"{alike:.4f} |"
        )
    return "\n".join(lines)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--bits", default="8,4,3,2", help="widths, or formats such as nf4-b64")
    parser.add_argument("--method", default="rtn", help="methods: rtn, hqq, search, gptq")
    parser.add_argument("--embedding-bits", type=int, default=None)
    parser.add_argument("--calibration", default="wikitext2", help="text for search and gptq")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--compute", default=None)
    parser.add_argument("--prompt-name", default=None)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--max-pairs", type=int, default=None)
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    args = arguments(given)
    path = args.data or Path(os.environ.get("KBIT_DATA", "")) / "stsb" / "sts-test.csv"
    pairs = read_pairs(path)
    if args.max_pairs is not None:
        pairs = Pairs(pairs.one[: args.max_pairs], pairs.other[: args.max_pairs], pairs.scores[: args.max_pairs])
    results = [measured(args.model, "fp32", pairs, args)]
    for bits in args.bits.split(","):
        format = QuantFormat.parse(bits if not bits.isdigit() else f"{'int' if bits == '8' else 'nf'}{bits}-b64")
        for method in args.method.split(","):
            with tempfile.TemporaryDirectory() as folder:
                quantized(args.model, Path(folder) / "out", format, method, args)
                results.append(measured(f"{folder}/out", f"{format} {method}", pairs, args))
    print(table(results, pairs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
