"""Accuracy against bits: kbit's methods and llama.cpp's types with imatrix, on the same held-out text.

    python tools/accuracy_frontier.py novels-2m novels-5m
    python tools/accuracy_frontier.py smollm2 qwen-0.5b --path qwen-0.5b=MODEL.gguf --methods rtn,ldlq2
    python tools/accuracy_frontier.py --show novels-2m      # tables and figure from the rows there are

Every point is a KL divergence from the original (mean and 99.9 %), a perplexity and an agreement of the first tokens,
with fp32 compute, so that only weights differ, against honest bits: everything stored of the linear layers; and of the
whole model with embedding and head in 16 bits, as both sides keep them here. Peers are evaluated by the same evaluator,
from their dequantized weights. bitsandbytes' nf4 is no point of its own: kbit's nf4 has its codes
(tests/formats/test_bitsandbytes_parity.py).

Models that GPTQModel, AutoRound, HQQ and torchao made come as folders (tools/peers/quantizers.py, then --folders).

Rows go to docs/accuracy_frontier.jsonl one by one; what is in it is not measured again, so that an interrupted run
goes on, and the tables and the figure can be redrawn without any peer. Peers need `python tools/peers/install.py
llama.cpp`; --no-peers leaves them out. The models and texts are those of the folder that KBIT_DATA names.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from frontier.llama_cpp import TYPES, LlamaCpp
from frontier.measure import Frontier
from frontier.show import draw, latest, tables
from frontier.subjects import subjects

from kbit.host.errors import KbitError

_DOCS = Path(__file__).resolve().parent.parent / "docs"
_METHODS = "rtn,hqq,awq,gptq,ldlq2"
_FORMATS = "lloyd2-b64,nf3-b64,lloyd3-b64,nf4-b64,lloyd4-b64,lloyd5-b64,lloyd6-b64"
# At the bits of llama.cpp's types: IQ2_S, IQ3_S, IQ4_XS, Q4_K_M, Q5_K_M, Q6_K.
_FORMATS += ",mixed2.54,mixed3.44,mixed4.25,mixed4.71,mixed5.61,mixed6.56"
_OFFSET_FORMATS = "int2-b64-asym,int3-b64-asym,int4-b64-asym,int5-b64-asym"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="novels-0.7m, novels-2m, novels-5m, smollm2, or names of --path")
    parser.add_argument("--path", action="append", default=[], metavar="NAME=MODEL", help="where a model is")
    parser.add_argument("--methods", default=_METHODS, help=f"of kbit; ldlq2:TEXT: calibrated on it [{_METHODS}]")
    parser.add_argument("--formats", default=_FORMATS, help=f"[{_FORMATS}]")
    parser.add_argument("--offset-formats", default=_OFFSET_FORMATS, help=f"of hqq and awq [{_OFFSET_FORMATS}]")
    parser.add_argument("--types", default=",".join(TYPES), help="of llama.cpp")
    parser.add_argument("--folders", type=Path, nargs="*", default=[], help="one model's, of tools/peers/quantizers.py")
    parser.add_argument("--no-peers", action="store_true", help="only kbit's methods")
    parser.add_argument("--rows", type=Path, default=_DOCS / "accuracy_frontier.jsonl")
    parser.add_argument("--figure", type=Path, default=_DOCS / "accuracy_frontier.svg")
    parser.add_argument("--show", action="store_true", help="measure nothing; of these models, or all")
    arguments = parser.parse_args()
    try:
        run(arguments)
    except KbitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(arguments: argparse.Namespace) -> None:
    """
    Raises:
        KbitError: something cannot be read, made or run.
    """
    paths = dict(item.split("=", 1) for item in arguments.path)
    frontier = Frontier(arguments.rows)
    if not arguments.show:
        pairs = [
            (method, format)
            for method in filter(None, arguments.methods.split(","))
            for format in (arguments.offset_formats if method in ("hqq", "awq") else arguments.formats).split(",")
        ]
        for subject in subjects(arguments.models, paths):
            peer = None if arguments.no_peers else LlamaCpp(*peer_folders(), subject)
            types = arguments.types.split(",")
            frontier.measure(subject, pairs, peer, types, lambda text: print(text, flush=True), arguments.folders)
    rows = [row for row in latest(frontier.rows) if not arguments.models or row["model"] in arguments.models]
    if not rows:
        raise KbitError(f"{arguments.rows} has no such rows: name a model to measure")
    print(tables(rows), end="")
    draw(rows, arguments.figure)
    print(f"\n{arguments.figure}")


def peer_folders() -> tuple[Path, Path]:
    """Folder of llama.cpp's tools, and the one for files made with them.

    Raises:
        KbitError: llama.cpp is not installed.
    """
    sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))
    from common import Record, peers_dir

    tools = Record(peers_dir()).entry("llama.cpp").get("paths", {}).get("native")
    if tools is None:
        raise KbitError("llama.cpp is not installed: python tools/peers/install.py llama.cpp, or --no-peers")
    return Path(tools), peers_dir() / "frontier"


if __name__ == "__main__":
    sys.exit(main())
