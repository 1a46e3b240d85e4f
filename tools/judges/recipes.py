"""Runs the code on docs/recipes.md against a `kbit serve` that it starts, and says what ran with which versions.

    python tools/judges/recipes.py --python clients/bin/python --python llm/bin/python --folder MODEL

Every block marked as Python or sh is run by itself, as it stands but for the server's address, in the first of the
given Pythons that has the packages which the block imports; its scripts come first on PATH. They are several as
packages may not agree (llama-index wants openai 2, llm has 3). The server runs in the Python that runs this. --folder
is served, too, and is what the page calls out/: a folder with a tokenizer.json that transformers reads. A block that
lacks a package, or the folder, is told of, and is no failure. Exit code 1: a block failed, or none ran.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "recipes.md"
ADDRESS, MODEL, FOLDER = "http://127.0.0.1:8080", "smollm2-135m-instruct", "out/"
# In a Python: the versions of what provides the named modules; fails where one of them is not there.
_VERSIONS = """
import importlib.metadata as metadata, importlib.util, sys
for name in sys.argv[1:]:
    assert importlib.util.find_spec(name) is not None
owners = metadata.packages_distributions()
names = sorted({owner for name in sys.argv[1:] for owner in owners.get(name.partition(".")[0], [])})
print(", ".join(f"{name} {metadata.version(name)}" for name in names))
"""


@dataclass(frozen=True)
class Block:
    """A block of code on the page.

    Attributes:
        heading: what it is under.
        line: its first, on the page.
        language: "python" or "sh".
        code: its text.
    """

    heading: str
    line: int
    language: str
    code: str

    @property
    def needs(self) -> list[str]:
        """Modules that it imports; of sh, the program that it begins with, where that is a module."""
        if self.language == "sh":
            return ["llm"] if self.code.startswith("llm ") else []
        return sorted(set(re.findall(r"^(?:from|import) ([\w.]+)", self.code, re.M)))


def blocks(text: str) -> list[Block]:
    """The page's blocks that can be run, in order."""
    found, heading = [], ""
    for match in re.finditer(r"^## ([^\n]+)$|^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        if match[1]:
            heading = match[1]
        elif match[2] in ("python", "sh"):
            found.append(Block(heading, text.count("\n", 0, match.start(3)) + 1, match[2], match[3]))
    return found


def versions(python: str, modules: list[str]) -> str | None:
    """What a Python has of some modules; None: not all of them."""
    done = subprocess.run([python, "-c", _VERSIONS, *modules], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


@contextmanager
def serving(folder: str | None) -> Iterator[str]:
    """The address of a server of the page's model, and of a folder's."""
    models = [MODEL] if folder is None else [MODEL, f"{FOLDER.strip('/')}={folder}"]
    command = [sys.executable, "-m", "kbit", "serve", *models, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if "OPENAI_BASE_URL" in line:
                break
        found = re.search(r"http://[\d.]+:\d+", "".join(said))
        if process.poll() is not None or found is None:
            raise SystemExit("the server did not start: " + "".join(said))
        yield found[0]
    finally:
        process.terminate()
        process.wait()


def run(block: Block, python: str, address: str, folder: str | None, home: str) -> subprocess.CompletedProcess[str]:
    """Runs one block in a Python, or in a shell that finds that Python's scripts; what llm logs goes to `home`."""
    code = block.code.replace(ADDRESS, address).replace(FOLDER, folder or FOLDER)
    scripts = os.pathsep.join([str(Path(python).parent), os.environ.get("PATH", "")])
    command = [python, "-c", code] if block.language == "python" else [shutil.which("bash") or "sh", "-ec", code]
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PATH": scripts, "LLM_USER_PATH": home},
        timeout=600,
    )


def main() -> int:
    """Runs the page; prints a line for each block, and what it said."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", action="append", metavar="PYTHON", help="has clients' packages; several in turn")
    parser.add_argument("--folder", type=os.path.abspath, help=f"the model that the page calls {FOLDER}")
    arguments = parser.parse_args()
    pythons = [os.path.abspath(python) for python in arguments.python or [sys.executable]]
    failed = ran = 0
    with serving(arguments.folder) as address, tempfile.TemporaryDirectory() as home:
        for block in blocks(PAGE.read_text(encoding="utf-8")):
            where = f"{block.heading}, line {block.line}"
            if FOLDER in block.code and arguments.folder is None:
                print(f"NOT RUN  {where}: it needs --folder")
                continue
            has = ((python, versions(python, block.needs)) for python in pythons)
            python, found = next(((python, found) for python, found in has if found is not None), ("", None))
            if found is None:
                print(f"NOT RUN  {where}: no Python here has all of {', '.join(block.needs)}")
                continue
            done = run(block, python, address, arguments.folder, home)
            said = done.stdout.strip()
            good = done.returncode == 0 and said != ""
            ran, failed = ran + good, failed + (not good)
            print(f"{'ran' if good else 'FAILED'}  {where} ({found or 'no package'})")
            print(*(f"    {line}" for line in said.splitlines()[-8:]), sep="\n", flush=True)
    print(f"{ran} ran, {failed} failed")
    return 1 if failed or not ran else 0


if __name__ == "__main__":
    sys.exit(main())
