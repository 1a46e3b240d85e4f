"""Run the Triton kernels' tests under ttsem: races, accesses out of bounds, and bfloat16 as the compiler means it.

    python tools/ttsem_check.py                      every test file of a kernel
    python tools/ttsem_check.py --quick              a few tests of each
    python tools/ttsem_check.py tests/kernels/triton/test_triton_rows.py -k softcap

ttsem executes the IR that Triton's frontend makes of every launch, on the CPU. The tests are those that the interpreter
and a GPU run (KBIT_TEST_DEVICE=cuda); here every launch also fails at the kernel's line if it touches memory outside
its tensors or two programs race, and fresh memory is filled with NaN. Two planted faults are run first, to see that
they are found.

ttsem says that it needs Python 3.12, but 0.1.0 works on 3.10 and 3.11:

    pip download --no-deps --ignore-requires-python ttsem==0.1.0
    unzip ttsem-0.1.0-*.whl -d SOMEWHERE     and     export KBIT_TTSEM=SOMEWHERE

Exit code 0: all passed; 1: a fault or a wrong value; 3: ttsem is not there.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
MISSING = 3

# Tests of a file that --quick runs: at least one of every test function, spread over its cases.
QUICK = 16
# The kernels' own test files: tests/kernels/triton/test_triton_<name>.py.
KERNELS = ("rows", "blockwise", "gemv", "gemm", "grouped", "kv", "attention_prefill", "attention_decode", "recurrent")

PLANTED = """
import sys
import torch, triton, triton.language as tl

@triton.jit
def past_the_end(x, o, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(o + at, tl.load(x + at, mask=at < n))

@triton.jit
def race(x, o, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(o + at, tl.load(o + at) + tl.load(x + tl.program_id(0) * BLOCK + at))

x = torch.ones(100, device="cuda")
if sys.argv[1] == "past_the_end":
    past_the_end[(2,)](x, torch.empty(100, device="cuda"), 100, 64)
else:
    race[(4,)](x, torch.zeros(16, device="cuda"), 16)
"""


def environment() -> dict[str, str] | None:
    """Environment of a run under ttsem, or None where ttsem is not there."""
    paths = [str(REPOSITORY / "tests" / "cases"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    named = os.environ.get("KBIT_TTSEM")
    if named:
        if not (Path(named) / "ttsem" / "sanitize.py").is_file():
            return None
        paths.insert(0, named)
    elif importlib.util.find_spec("ttsem") is None:
        return None
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**variables, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "KBIT_TEST_DEVICE": "cuda"}


def run(arguments: list[str], variables: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ttsem.sanitize", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=variables, cwd=folder, check=False)


def planted_faults(variables: dict[str, str], folder: Path) -> list[str]:
    """What ttsem failed to find of what it must find."""
    program = folder / "planted.py"
    program.write_text(PLANTED, encoding="utf-8")
    missed = []
    for fault, line, words in (("past_the_end", 8, "past the end"), ("race", 13, "touch element")):
        result = run([str(program), "--", fault], variables, folder)
        said = result.stdout + result.stderr
        if result.returncode == 0 or words not in said or f"planted.py:{line}" not in said:
            missed.append(f"planted fault {fault!r} was not found: {said[-500:]}")
    return missed


def test_files(named: list[str]) -> list[Path]:
    if named:
        return [Path(name).resolve() for name in named]
    found = [REPOSITORY / "tests" / "kernels" / "triton" / f"test_triton_{name}.py" for name in KERNELS]
    return [path for path in found if path.is_file()]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("files", nargs="*", help="test files (default: those of all kernels)")
    parser.add_argument("--quick", action="store_true", help=f"about {QUICK} tests of each file")
    parser.add_argument("--sample", type=int, metavar="N", help="about N tests of each file")
    parser.add_argument("--planted", choices=("first", "only", "not"), default="first", help="the planted faults")
    parser.add_argument("-k", dest="expression", help="only tests that match (as pytest -k)")
    arguments = parser.parse_args()
    variables = environment()
    if variables is None:
        print("ttsem is not installed: nothing was checked (see the top of tools/ttsem_check.py)", file=sys.stderr)
        return MISSING
    sample = arguments.sample or (QUICK if arguments.quick else 0)
    variables["KBIT_SAMPLE"] = str(sample)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        failed = False
        if arguments.planted != "not":
            missed = planted_faults(variables, folder)
            print(*(missed or ["planted faults: both found at their lines"]), sep="\n", flush=True)
            failed = bool(missed)
        for path in test_files(arguments.files) if arguments.planted != "only" else []:
            options = ["-q", "-p", "triton_cases", "-p", "no:cacheprovider", "--no-header", "-r", "fE"]
            options += ["-c", str(REPOSITORY / "pyproject.toml"), "--rootdir", str(REPOSITORY), str(path)]
            options += ["-k", arguments.expression] if arguments.expression else []
            result = run(["pytest", *options], variables, folder)
            lines = result.stdout.strip().splitlines()
            print(f"{path.name}: {lines[-1] if lines else result.stderr[-500:]}", flush=True)
            if result.returncode not in (0, 5):  # 5: nothing selected
                failed = True
                print(result.stdout[-4000:], result.stderr[-2000:], sep="\n", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
