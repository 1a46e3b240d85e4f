"""Encoders and T5 that kbit exports as GGUF, read by llama.cpp: its hidden states or logits beside transformers'.

    python tools/judges/gguf_encoders.py                       # every case of tests/cases/gguf_encoder_cases.py
    python tools/judges/gguf_encoders.py t5 bert

Tiny models of random weights, with tokenizers; llama.cpp in xllamacpp's wheel, in an environment of its own. Exits with
1 where one differs by more than rounding. (llama.cpp's GELU is a table of 16-bit numbers.)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "peers"), str(HERE.parents[1] / "tests" / "cases")]

from common import PeerError, make_venv, peers_dir  # noqa: E402
from gguf_families import XLLAMACPP  # noqa: E402

LIMIT = 5e-3  # of the largest value


def judge(case: str, folder: Path, python: Path) -> float:
    """The largest difference, relative to the largest value."""
    import gguf_encoder_cases as cases

    from kbit.models.export_gguf import export_gguf
    from kbit.models.opening import open_model

    model = cases.saved(case, folder / "m")
    with open_model(str(folder / "m")) as source:
        export_gguf(source, folder / "m.gguf")
    texts, written = cases.texts_of(case)
    command = [str(python), str(HERE / "llama_states.py"), str(folder / "m.gguf"), json.dumps(texts)]
    done = subprocess.run([*command, json.dumps(written)] if written else command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise PeerError(lines[-1] if lines else f"exit code {done.returncode}")
    found = [np.array(each) for each in json.loads(done.stdout.splitlines()[-1])]
    wanted = cases.values_of(model, texts, written)
    largest = max(float(np.abs(each).max()) for each in wanted)
    return max(float(np.abs(ours - theirs).max()) for ours, theirs in zip(found, wanted, strict=True)) / largest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*")
    arguments = parser.parse_args()
    from gguf_encoder_cases import CASES

    unknown = [case for case in arguments.cases if case not in CASES]
    if unknown:
        parser.error(f"{unknown[0]}: no such case; one of {', '.join(CASES)}")
    home, differ = peers_dir(), 0
    try:
        python = make_venv(home / "xllamacpp", [XLLAMACPP], home / "xllamacpp.log")
        for case in arguments.cases or CASES:
            with tempfile.TemporaryDirectory() as folder:
                found = judge(case, Path(folder), python)
            differ += found > LIMIT
            print(f"{case:<24}{found:>10.1e}{'  DIFFERS' if found > LIMIT else ''}", flush=True)
    except (OSError, PeerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
