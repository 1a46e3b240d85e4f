"""Runs llama.cpp's own tests of its server against `kbit serve`, and says which failures have no reason.

    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36
    tar xzf llama_cpp_python-0.3.36.tar.gz
    python -m venv judges
    judges/bin/pip install pytest pytest-timeout filelock requests wget openai prometheus-client
    python tools/judges/llama_server_tests.py llama_cpp_python-0.3.36/vendor/llama.cpp judges/bin/python [FILE] [-k ...]

This interpreter has kbit; the other one runs the tests, all that are not marked slow. Their model, stories260K, is made
from KBIT_DATA (stories_gguf.py), and stands for others of that family; LLAMA_SHIM_ENCODER may name an encoder's folder
or GGUF file. Exit code 1: a failure that llama_server_reasons.txt does not list.
"""

from __future__ import annotations

import os
import re
import shutil
import socketserver
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
# The files of which llama-server passes all but 17 tests with this model and without a network.
FILES = (
    *("basic", "chat_completion", "compat_anthropic", "compat_gcp", "compat_oai_responses", "completion", "ctx_shift"),
    *("ignore_eos", "infill", "kv_keep_only_active", "metrics", "security", "slot_save", "template"),
    *("tokenize", "tool_call"),
)


def reasons() -> list[tuple[str, str]]:
    """(a regular expression of tests that fail, why)."""
    found = []
    for line in (HERE / "llama_server_reasons.txt").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            pattern, _, why = line.partition("  ")
            found.append((pattern, why.strip()))
    return found


def main() -> int:
    """Runs the tests; prints the counts."""
    source, python, *more = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="llama-tests-") as folder:
        tests = _copied(Path(source), Path(folder))
        models = _models(Path(folder))
        executable, socket = Path(folder) / "llama-server", Path(folder) / "socket"
        shim = (HERE / "llama_server_shim.py").absolute()
        executable.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{shim}" "$@"\n')
        executable.chmod(0o755)
        forks = subprocess.Popen([sys.executable, HERE / "llama_server_shim.py", "--fork-server", socket])
        try:
            while not socket.exists():
                time.sleep(0.1)
            lines = _run(python, tests, more, executable, socket, models)
        finally:
            forks.kill()
    return _judge(lines)


def _models(folder: Path) -> dict[str, str]:
    """Variables of llama_server_shim.py that name the models: stories260K whole, with marks to fill in, and in parts.

    An encoder, where `LLAMA_SHIM_ENCODER` names one already.
    """
    stories = Path(os.environ["KBIT_DATA"]) / "models" / "stories260K"
    made = {}
    for kind, flags in (("MODEL", []), ("INFILL", ["--infill"]), ("SPLIT", ["--split"])):
        model = folder / f"stories260K{'-' + kind.lower() if flags else ''}.gguf"
        subprocess.run([sys.executable, HERE / "stories_gguf.py", stories, model, *flags], check=True)
        parts = sorted(folder.glob(f"{model.stem}-*-of-*.gguf"))
        made[f"LLAMA_SHIM_{kind}"] = str(parts[0] if parts else model)
    return made


def _copied(source: Path, folder: Path) -> Path:
    """The tests where they find the templates that they name; without the start of every model they know."""
    shutil.copytree(source / "models" / "templates", folder / "models" / "templates")
    tests = folder / "tools" / "server" / "tests"
    shutil.copytree(source / "tools" / "server" / "tests", tests)
    # Skipped there, as llama-server's answers depend on its cache.
    completion = tests / "unit" / "test_completion.py"
    completion.write_text(completion.read_text().replace('@pytest.mark.skip(reason="This test fails on linux', "#"))
    config = tests / "conftest.py"
    config.write_text(config.read_text().replace("ServerPreset.load_all()", "pass"))
    return tests


def _run(
    python: str, tests: Path, more: list[str], executable: Path, socket: Path, models: dict[str, str]
) -> list[str]:
    files = [f"unit/test_{name}.py" for name in FILES] if not any(each.endswith(".py") for each in more) else []
    environment = {
        **os.environ,
        "LLAMA_SERVER_BIN_PATH": str(executable),
        "LLAMA_SHIM_SOCKET": str(socket),
        "PORT": str(_free_port()),
        **models,
    }
    command = [python, "-m", "pytest", "-q", "-m", "not slow", "--tb=line", "-rpfE", "--timeout=240", *files, *more]
    lines = []
    with subprocess.Popen(command, cwd=tests, env=environment, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for line in running.stdout:
            lines.append(line.rstrip())
            print(line, end="", flush=True)
    return lines


def _free_port() -> int:
    with socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler) as server:
        return int(server.server_address[1])


def _judge(lines: list[str]) -> int:
    outcomes = {}
    for line in lines:
        found = re.match(r"(PASSED|FAILED|ERROR|SKIPPED) (unit/\S+::.+?)(?: - .*)?$", line)
        if found:
            outcomes[found[2].removeprefix("unit/")] = found[1]
    counts: Counter[str] = Counter()
    unexplained = []
    for name, outcome in outcomes.items():
        why = next((why for pattern, why in reasons() if re.search(pattern, name)), None)
        if outcome == "PASSED":
            counts["passed"] += 1
        else:
            counts[why or "no reason"] += 1
            if why is None:
                unexplained.append(name)
    print(f"{counts.pop('passed', 0)} of {len(outcomes)} pass")
    for reason, count in counts.most_common():
        print(f"{count:4d} fail: {reason}")
    print(*unexplained, sep="\n")
    return 1 if unexplained or not outcomes else 0


if __name__ == "__main__":
    sys.exit(main())
