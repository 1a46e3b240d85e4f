"""Builds kbit's wheel (or takes one), looks into it, installs it where there is no compiler, and runs a model.

    python tools/wheel_check.py                               # builds it from this checkout
    python tools/wheel_check.py --wheel dist/kbit-...whl      # one that is there
    python tools/wheel_check.py --installed                   # the kbit of this environment (cibuildwheel's test)

A wheel must hold every module and data file of the package and no C++, say nothing of the machine it was built on, and
carry the kernels of every instruction set of its architecture. In a fresh virtual environment, with nothing on PATH
but Python and no compiler to be found, it is installed from wheels alone and answers with a model of a few kilobytes
that kbit writes itself; with KBIT_DATA, with novels-2m as well. Needs a package index for what kbit depends on.
"""

from __future__ import annotations

import argparse
import getpass
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
# What CMakeLists.txt compiles on an architecture, besides "amx" where the assembler has it.
SETS = {
    "x86_64": {"scalar", "avx2", "avx512vnni", "avx512bf16", "amx-emulated", "amx"},
    "aarch64": {"scalar", "neon", "i8mm", "amx-emulated"},
}
# Prints which kernels are compiled in, whether or not this processor has them.
COMPILED = "import json; from kbit import _native; print(json.dumps(_native.compiled_sets()))"

# Writes a model of a few kilobytes into a new folder.
TINY = """
import sys
from pathlib import Path
from kbit.planner.process_probe import write_model
folder = Path(sys.argv[1])
folder.mkdir()
write_model(folder)
"""


def build(folder: Path) -> Path:
    """The wheel of this checkout."""
    command = [sys.executable, "-m", "pip", "wheel", str(REPOSITORY), "--no-deps", "-w", str(folder)]
    subprocess.run(command, check=True)
    return next(folder.glob("kbit-*.whl"))


def package_files() -> set[str]:
    """Names in a wheel of everything that belongs into it, but the compiled module."""
    found = set()
    for folder, name in (("kbit", "kbit"), ("kernels", "kbit/kernels")):
        listed = subprocess.run(
            ["git", "ls-files", folder], cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        found |= {name + file.removeprefix(folder) for file in listed if not file.endswith((".cpp", ".h", ".hpp"))}
    return found


def traces() -> Iterator[bytes]:
    """What a wheel must not say: folders and names of this machine that are no common words."""
    folders = [REPOSITORY, Path.home(), *([Path(sys.prefix)] if sys.prefix != sys.base_prefix else [])]
    yield from (os.fsencode(f"{folder}/") for folder in folders if len(folder.parts) > 1)
    names = (socket.gethostname(), getpass.getuser())
    yield from (name.encode() for name in names if len(name) >= 8 and name != "localhost")


def look_into(wheel: Path) -> list[str]:
    """What is wrong with a wheel's files."""
    wrong = []
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        module = [name for name in names if re.fullmatch(r"kbit/_native\.[\w.-]+\.so", name)]
        if len(module) != 1:
            wrong.append(f"compiled modules: {module}")
        missing = package_files() - names
        if missing:
            wrong.append(f"missing: {sorted(missing)[:5]}")
        sources = [name for name in names if name.endswith((".cpp", ".h", ".hpp", ".o", ".a"))]
        if sources:
            wrong.append(f"belong to building only: {sources[:5]}")
        marks = list(traces())
        for name in sorted(names):
            data = archive.read(name)
            wrong += [f"{name} names {mark.decode()}" for mark in marks if mark in data]
    return wrong


def run(command: list[str], environment: dict[str, str], folder: Path, text: str = "") -> str:
    """The output of a command that must succeed."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    return done.stdout


def bare(folder: Path) -> tuple[Path, dict[str, str]]:
    """(Python of a new virtual environment, an environment without a compiler)."""
    run([sys.executable, "-m", "venv", str(folder / "venv")], dict(os.environ), folder)
    keep = ("HOME", "LANG", "TMPDIR", "KBIT_DATA", "KBIT_CACHE", "PIP_", "SSL_CERT", "REQUESTS_CA", "HTTP", "http")
    environment = {name: value for name, value in os.environ.items() if name.startswith(keep)}
    bin_folder = folder / "venv" / "bin"
    environment |= {"PATH": str(bin_folder), "CC": "no-compiler", "CXX": "no-compiler"}
    return bin_folder / "python", environment


def try_out(python: Path, environment: dict[str, str], folder: Path) -> None:
    """Runs the kbit of an environment."""
    sets = set(json.loads(run([str(python), "-c", COMPILED], environment, folder)))
    expected = SETS[platform.machine()]
    if sets != expected:
        sys.exit(f"kernels of {sorted(sets)} are compiled in, {sorted(expected)} were expected")
    print(f"kernels: {', '.join(sorted(sets))}")
    info = json.loads(run([str(python), "-m", "kbit", "info", "--json"], environment, folder))
    print(f"kbit {info['kbit']}, {info['instruction_set']} on this machine")
    tiny = folder / "tiny"
    run([str(python), "-c", TINY, str(tiny)], environment, folder)
    models = [tiny]
    if "KBIT_DATA" in environment:
        models.append(Path(environment["KBIT_DATA"]).resolve() / "models" / "novels-2m")
    for model in models:
        command = [str(python), "-m", "kbit", "run", "It was a dark night, and", "--model", str(model), "--raw"]
        result = json.loads(run([*command, "--max-tokens", "12", "--json"], environment, folder))
        if result["completion_tokens"] != 12:
            sys.exit(f"{model.name}: {result['completion_tokens']} tokens were generated, not 12")
        print(f"kbit run {model.name}: {result['text']!r}")
    script = python.parent / "kbit"
    if not run([str(script), "--version"], environment, folder).startswith("kbit "):
        sys.exit(f"{script}: does not tell its version")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, help="a wheel that is there")
    parser.add_argument("--installed", action="store_true", help="the kbit of this environment")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="wheel-check-") as name:
        folder = Path(name)
        if arguments.installed:
            try_out(Path(sys.executable), dict(os.environ), folder)
            return
        wheel = (arguments.wheel or build(folder)).resolve()
        wrong = look_into(wheel)
        if wrong:
            sys.exit("\n".join([f"{wheel.name}:", *wrong]))
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, complete, and says nothing of this machine")
        python, environment = bare(folder)
        run([str(python), "-m", "pip", "install", "--only-binary", ":all:", str(wheel)], environment, folder)
        print("installed from wheels alone, without a compiler")
        try_out(python, environment, folder)


if __name__ == "__main__":
    main()
