"""What bits cost an encoder with a head: how often it says what it said in fp32, and how far its probabilities move.

    python tools/head_accuracy.py rxn/ --texts tools/reactions.txt --bits 8,4,3,2

Of a model of masked words every third token of every text is masked in turn, and its prediction compared; of a
classifier of texts each text, of one of words each token. Texts are the lines of a file. Of every width the linear
layers are rounded to nearest into a temporary folder. The divergence is the mean over predictions, in nats, from fp32.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kbit.backends.select import select_backend
from kbit.engine.encoder import Encoder, TokenizedText
from kbit.engine.loader import open_prepared
from kbit.engine.pooling import pool
from kbit.formats.quant_format import QuantFormat
from kbit.models.opening import open_model
from kbit.quantizers.convert import convert
from kbit.quantizers.methods import get_method
from kbit.quantizers.plan import make_plan
from kbit.text.encoding import TextEncoder

MASK_EVERY = 3

Numbers = NDArray[np.float64]


def predictions(folder: str, texts: Sequence[str], args: argparse.Namespace) -> tuple[int, Numbers]:
    """Stored bytes, and the logits (P, L) of every prediction."""
    backend = select_backend("cpu", threads=args.threads, compute=args.compute, kv_bits=32)
    with open_prepared(folder, backend) as source:
        nbytes = sum(info.nbytes for info in source.tensors.values())
        reader = TextEncoder(source)
        encoder = Encoder(source, backend)
    task = encoder.spec.task
    kind = None if task is None else task.kind
    read = [reader.encode(text) for text in texts]
    if kind == "mask":
        mask = reader.tokenizer.token_id(reader.tokenizer.special_tokens["mask_token"])
        places = [(text.ids, at) for text in read for at in range(1, len(text.ids) - 1, MASK_EVERY)]
        masked = [TokenizedText([*ids[:at], mask, *ids[at + 1 :]]) for ids, at in places]
        states = encoder.hidden(masked)
        found = encoder.logits(np.stack([state[at] for state, (_, at) in zip(states, places, strict=True)]))
    elif task is not None and kind in ("sequence", "tokens"):
        states = encoder.hidden([TokenizedText(text.ids, text.types) for text in read])
        if kind == "sequence":
            states = [pool(state, (task.pooling,))[None] for state in states]
        found = np.concatenate([encoder.head.scores(state) for state in states])
    else:
        raise SystemExit(f"{folder}: no head that predicts words or labels")
    return nbytes, found.astype(np.float64)


def log_softmax(x: Numbers) -> Numbers:
    shifted = x - x.max(axis=-1, keepdims=True)
    values: Numbers = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return values


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--bits", default="8,4,3,2", help="widths, or formats such as nf4-b64")
    parser.add_argument("--compute", default=None)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args(given)
    texts = [line for line in args.texts.read_text(encoding="utf-8").splitlines() if line.strip()]
    nbytes, exact = predictions(args.model, texts, args)
    print(f"{len(exact)} predictions\n\n| weights | stored | same first choice | divergence |\n|--|--|--|--|")
    print(f"| fp32 | {nbytes / 1e6:.1f} MB | 100.0 % | 0 |")
    for bits in args.bits.split(","):
        format = QuantFormat.parse(bits if not bits.isdigit() else f"{'int' if bits == '8' else 'nf'}{bits}-b64")
        with tempfile.TemporaryDirectory() as folder:
            with open_model(args.model) as source:
                convert(source, make_plan(source, format, method=get_method("rtn")), Path(folder) / "out")
            nbytes, found = predictions(f"{folder}/out", texts, args)
        same = 100 * float((found.argmax(-1) == exact.argmax(-1)).mean())
        p, q = log_softmax(exact), log_softmax(found)
        divergence = float((np.exp(p) * (p - q)).sum(-1).mean())
        print(f"| {format} | {nbytes / 1e6:.1f} MB | {same:.1f} % | {divergence:.4f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
