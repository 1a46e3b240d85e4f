"""Readers of the same tiny models: kbit of the folder, kbit of the GGUF file, and llama.cpp of the GGUF file and of the
one that kbit exports.

    python tools/judges/gguf_families.py                       # every case of tests/cases/decoder_cases.py: minutes
    python tools/judges/gguf_families.py qwen3 gemma3 -v       # some
    python tools/judges/gguf_families.py --no-llama            # without llama.cpp's own answer: its converter alone

A model of random weights is saved by transformers, llama.cpp's own converter makes a GGUF file of it (from the source
distribution of llama-cpp-python, as tools/peers has it; the tokenizer alone is replaced by a list of words, which no
result depends on), and xllamacpp's wheel, in an environment of its own, says what it takes for the next token's
log-probabilities after several beginnings of a text. All of them are compared, not the best ones only. Exits with 1
where the two programs differ over a file; "not in the file" is what the converter leaves out.

"-" is what kbit or llama.cpp says it does not have, with the reason (-v).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "peers"), str(HERE.parents[1] / "tests" / "cases")]

from common import PeerError, make_venv, peers_dir, run  # noqa: E402
from llama_cpp import fetch  # noqa: E402

Logs = npt.NDArray[np.float64]

XLLAMACPP = "xllamacpp==2026.10.11549"
# Beginnings that end before, in and after the windows of the cases.
LENGTHS = (1, 4, 13, 24)
# Of log-probabilities: float32 in three programs, sums in other orders. llama.cpp's GELU is a table of 16-bit numbers,
# 2^-11 of values up to about 10.
KBIT_LIMIT, LLAMA_LIMIT = 1e-3, 3e-2

# Where llama.cpp computes something else than transformers does, by its source.
_BY_ROOM = "llama.cpp chooses LongRoPE's factors by the room that it makes, not by a text's length"
# What llama.cpp has for granted of delta nets: heads of values as wide as those of keys.
_WIDE = {"linear_key_head_dim": 32, "linear_value_head_dim": 32}
# (And of Qwen 3.5 sections of 32 pairs, which its converter writes whatever heads are.)
_QWEN3_5 = {**_WIDE, "head_dim": 128}
LLAMA_NEEDS: dict[str, dict[str, Any]] = {"qwen3-next": _WIDE, "qwen3_5": _QWEN3_5, "qwen3_5-moe": _QWEN3_5}
# No more experts a token than there are; and what the converter asks of a configuration.
LLAMA_NEEDS |= {"granite-hybrid": {"num_experts_per_tok": 0}, "bamba": {"mlp_bias": False}}
LLAMA_NEEDS |= {"falcon-h1": {"head_dim": 8}, "falcon-h1-norm": {"head_dim": 8}}
LLAMA_DIFFERS = {
    "phi3-window": "llama.cpp turns Phi-3's windows off",
    "phi3-longrope": _BY_ROOM,
    "phi3-longrope-partial": _BY_ROOM,
    "minicpm3-longrope": _BY_ROOM,
    "exaone4": "llama.cpp has windows for the 64 layers of EXAONE 4 32B only",
}


@dataclass(frozen=True)
class Verdict:
    """What became of one case. Differences are the largest of all log-probabilities; None: it was not had, and why.

    Attributes:
        file: kbit of the GGUF file from kbit of the folder.
        llama: llama.cpp from kbit, both of the GGUF file.
        export: llama.cpp of the file that kbit exports from kbit of the folder.
    """

    case: str
    file: float | None = None
    llama: float | None = None
    export: float | None = None
    why: str = ""

    @property
    def lost(self) -> bool:
        """Whether the file says less than the folder does."""
        return (self.file or 0.0) > KBIT_LIMIT

    @property
    def bad(self) -> bool:
        """Whether the two programs read the file differently."""
        return self.case not in LLAMA_DIFFERS and max(self.llama or 0.0, self.export or 0.0) > LLAMA_LIMIT

    def line(self, verbose: bool) -> str:
        shown = ["-" if value is None else f"{value:.1e}" for value in (self.file, self.llama, self.export)]
        known = f"  {LLAMA_DIFFERS[self.case]}" if self.case in LLAMA_DIFFERS else ""
        remark = "  DIFFER" if self.bad else "  not in the file" if self.lost else known
        text = f"{self.case:<28}{shown[0]:>12}{shown[1]:>12}{shown[2]:>12}{remark}"
        return f"{text}  {self.why}" if verbose and self.why else text


def judge(case: str, folder: Path, source: Path, llama_python: Path | None) -> Verdict:
    """One case, in a folder of its own."""
    import torch
    from decoder_cases import saved_model
    from gguf_family_cases import CASES as SAYABLE
    from gguf_hybrid_cases import CASES as HYBRID
    from gguf_older_cases import CASES as OLDER

    from kbit.host.errors import KbitError

    # With what a GGUF file has no key for at the value that llama.cpp assumes.
    found = next((cases[case][-1] for cases in (SAYABLE, OLDER, HYBRID) if case in cases), {})
    changes = LLAMA_NEEDS.get(case, {}) | found
    try:
        model = saved_model(case, folder / "model", **{"max_position_embeddings": 64, **changes})
    except (AttributeError, TypeError, ValueError) as error:
        return Verdict(case, why=f"transformers: {_last_line(str(error))}")
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(4, model.config.vocab_size, (max(LENGTHS),), generator=generator).tolist()
    file = folder / "model.gguf"
    options = ["--outfile", file, "--outtype", "f32"]
    if case.startswith(("qwen3-next", "qwen3_5")):
        options.append("--no-mtp")  # layers that predict further tokens, which these have not
    original, verdict = kbit_log_probabilities(folder / "model", ids), Verdict(case)
    if llama_python is not None:
        try:
            exported(folder / "model", folder / "ours.gguf")
            theirs = llama_log_probabilities(llama_python, folder / "ours.gguf", ids)
            verdict = replace(verdict, export=float(np.abs(theirs - original).max()))
        except (KbitError, PeerError) as error:
            verdict = replace(verdict, why=f"export: {_last_line(str(error))}")
    try:
        run([sys.executable, HERE / "llama_convert.py", source, folder / "model", *options], folder / "convert.log")
    except PeerError as error:
        return replace(verdict, why=f"{verdict.why} converter: {_last_line(str(error))}")
    try:
        ours = kbit_log_probabilities(file, ids)
        verdict = replace(verdict, file=float(np.abs(original - ours).max()))
        if llama_python is None:
            return verdict
        theirs = llama_log_probabilities(llama_python, file, ids)
    except KbitError as error:
        return replace(verdict, why=f"{verdict.why} kbit: {error}")
    except PeerError as error:
        return replace(verdict, why=f"{verdict.why} llama.cpp: {_last_line(str(error))}")
    return replace(verdict, llama=float(np.abs(theirs - ours).max()))


def exported(model: Path, out: Path) -> None:
    """A folder without a tokenizer as kbit exports it, with words that stand for themselves (`llama_convert`).

    Raises:
        KbitError: kbit does not write it.
    """
    from kbit.checkpoint.gguf.source import GGUFSource
    from kbit.checkpoint.gguf.writing import GGUFWriter, NewTensor, Value
    from kbit.models.export_gguf import export_gguf
    from kbit.models.opening import open_model

    bare = out.with_name("bare.gguf")
    with open_model(str(model)) as source:
        export_gguf(source, bare)
        count = int(source.config["vocab_size"])
    with GGUFSource(bare) as ours:
        made: dict[str, Value] = {"model": "gpt2", "pre": "default", "tokens": [f"<{index}>" for index in range(count)]}
        made |= {"token_type": [1] * count, "merges": ["a b"]}
        words = {f"tokenizer.ggml.{key}": value for key, value in made.items()}
        tensors = [NewTensor(each.name, each.shape, each.type.name) for each in ours.stored_tensors()]
        with GGUFWriter(out, {**ours.stored_metadata(), **words}, tensors, overwrite=True) as writer:
            for tensor in tensors:
                writer.write(tensor.name, ours.stored_bytes(tensor.name))
            writer.finish()


def kbit_log_probabilities(path: Path, ids: list[int]) -> Logs:
    """Of the token after each beginning, (LENGTHS, V)."""
    import torch

    from kbit.backends.reference.backend import ReferenceBackend
    from kbit.models.load import load_decoder
    from kbit.models.opening import open_model

    with open_model(str(path)) as source:
        decoder = load_decoder(source, ReferenceBackend())
    logits = decoder.forward(torch.tensor([ids]), decoder.new_cache(1, len(ids)))[0].double()
    return np.asarray(torch.log_softmax(logits, -1)[[length - 1 for length in LENGTHS]].numpy(), dtype=np.float64)


def llama_log_probabilities(python: Path, file: Path, ids: list[int]) -> Logs:
    """The same of llama.cpp, (LENGTHS, V).

    Raises:
        PeerError: it does not open the file, or dies.
    """
    asked = json.dumps([ids[:length] for length in LENGTHS])
    command = [str(python), str(HERE / "llama_logprobs.py"), str(file), asked]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise PeerError(done.stderr.strip() or f"exit code {done.returncode}")
    return np.array(json.loads(done.stdout.splitlines()[-1]), dtype=np.float64)


def _last_line(text: str) -> str:
    """What a program said last; of llama.cpp's log, what it called an error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if " E " in line or "error" in line.lower() or "ASSERT" in line]
    return (errors or lines or [text])[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="of tests/cases/decoder_cases.py; all of them by default")
    parser.add_argument("--no-llama", action="store_true", help="compare kbit with llama.cpp's converter only")
    parser.add_argument("-v", "--verbose", action="store_true", help="say why something was not had")
    arguments = parser.parse_args()
    from decoder_cases import CASES

    unknown = [case for case in arguments.cases if case not in CASES]
    if unknown:
        parser.error(f"{unknown[0]}: no such case; one of {', '.join(CASES)}")
    home = peers_dir()
    try:
        source = fetch(home / "llama.cpp", force=False)
        python = None if arguments.no_llama else make_venv(home / "xllamacpp", [XLLAMACPP], home / "xllamacpp.log")
    except (OSError, PeerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{'largest difference':<28}{'from folder':>12}{'llama.cpp':>12}{'exported':>12}")
    differ = 0
    for case in arguments.cases or CASES:
        with tempfile.TemporaryDirectory() as folder:
            verdict = judge(case, Path(folder), source, python)
        differ += verdict.bad
        print(verdict.line(arguments.verbose), flush=True)
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
