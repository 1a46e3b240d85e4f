"""What bits cost an embedding model: Spearman's rank correlation with people's judgement of how alike two texts are.

    python tools/sts_accuracy.py all-MiniLM-L6-v2/ --bits 8,4,3,2 --method rtn,gptq

The pairs, their scores and the errors are those of `kbit eval --tasks stsb` (kbit.evaluate.similarity): the STS
benchmark's test set (1,379 pairs), from KBIT_DATA/stsb/sts-test.csv or --data. Of every width the linear layers are
quantized into a temporary folder, which the engine of `kbit embed` then runs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kbit.backends.select import select_backend
from kbit.calibration.request import CalibrationRequest
from kbit.evaluate.similarity import TextPairs, Vectors, alike, correlation, embedded, find_pairs
from kbit.formats.quant_format import QuantFormat
from kbit.models.opening import open_model
from kbit.quantizers.calibrated import CalibratedRounding
from kbit.quantizers.convert import convert
from kbit.quantizers.methods import get_method
from kbit.quantizers.plan import make_plan


@dataclass(frozen=True, eq=False)
class Result:
    """A model's vectors, and its stored bytes."""

    label: str
    nbytes: int
    found: Vectors


def measured(folder: str, label: str, pairs: TextPairs, args: argparse.Namespace) -> Result:
    """What a model makes of the pairs."""
    with open_model(folder) as source:
        nbytes = sum(info.nbytes for info in source.tensors.values())
    backend = select_backend("cpu", threads=args.threads, compute=args.compute, kv_bits=32)
    return Result(label, nbytes, embedded(folder, backend, pairs, args.prompt_name))


def quantized(model: str, out: Path, format: QuantFormat, method: str, args: argparse.Namespace) -> None:
    """Writes a model's k-bit version."""
    found = get_method(method)
    if isinstance(found, CalibratedRounding):
        found = found.calibrated_on(CalibrationRequest.of([args.calibration], args.calibration_tokens, False))
    with open_model(model) as source:
        convert(source, make_plan(source, format, embedding_bits=args.embedding_bits, method=found), out)


def table(results: Sequence[Result], pairs: TextPairs) -> str:
    """The results as Markdown, the first being what the others are compared with."""
    lines = [
        "| weights | stored | Spearman x 100 | less than fp32 | cosine with fp32 |",
        "|--|--|--|--|--|",
    ]
    first = results[0].found
    for r in results:
        value = correlation(r.found.cosines, pairs.scores)
        less = correlation(first.cosines, pairs.scores, r.found.cosines)
        lines.append(
            f"| {r.label} | {r.nbytes / 1e6:.1f} MB | {100 * value.value:.2f} ± {100 * value.stderr:.2f} | "
            f"{100 * less.value:.2f} ± {100 * less.stderr:.2f} | {alike(first, r.found):.4f} |"
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
    parser.add_argument("--data", default=None)
    parser.add_argument("--max-pairs", type=int, default=None)
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    args = arguments(given)
    pairs = find_pairs(args.data, args.max_pairs)
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
