"""The architecture, checked: imports only point down, and start-up stays light."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# Lowest first. A module may import from its own layer and from those before it.
LAYERS = (
    ("host", "_native"),
    ("formats",),
    ("kernels",),
    ("graph",),
    ("text", "audio", "checkpoint"),
    ("backends",),
    ("models",),
    ("calibration",),
    ("quantizers", "tuning"),
    ("gpu_check",),
    ("engine",),
    ("evaluate",),
    ("scaling", "planner"),
    ("api", "modules"),
    ("transformers", "vllm", "llm_plugin"),
    ("serve",),
    ("cli", "__main__"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def modules() -> Iterator[tuple[str, Path]]:
    """(layer, file) of every module of the package."""
    for path in sorted((REPOSITORY / "kbit").rglob("*.py")):
        yield path.relative_to(REPOSITORY / "kbit").parts[0].removesuffix(".py"), path
    for path in sorted((REPOSITORY / "kernels").rglob("*.py")):
        yield "kernels", path


def imported_layers(path: Path) -> Iterator[tuple[int, str]]:
    """(line, layer) of every import of kbit's own, those inside functions and type-checking blocks included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            names = [node.module] if node.module != "kbit" else [f"kbit.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "kbit" and len(parts) > 1 and parts[1] in RANK:
                yield getattr(node, "lineno", 0), parts[1]


@pytest.mark.parametrize(
    ("layer", "path"), [pytest.param(*found, id=str(found[1].relative_to(REPOSITORY))) for found in modules()]
)
def test_imports_point_down(layer: str, path: Path) -> None:
    if layer == "__init__":
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            checking = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            assert checking or "from kbit" not in ast.unparse(node), "the package itself imports nothing"
        return
    wrong = [f"line {line}: {other}" for line, other in imported_layers(path) if RANK[other] > RANK[layer]]
    assert not wrong, f"{layer} imports from layers above it: {wrong}"


def test_every_folder_is_a_layer() -> None:
    found = {layer for layer, _ in modules()} - {"__init__"}
    assert found <= RANK.keys()


def loaded_after(statement: str) -> set[str]:
    """Top-level names of the modules loaded once `statement` has run in a fresh interpreter."""
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(sys.prefix)
    )
    return set(result.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import kbit",
        "from kbit import KbitError; import kbit; dir(kbit)",
        "from kbit.cli.main import build; build([])",
        "import kbit.quantizers.plan",
        "import kbit.models.families, kbit.models.check",
    ],
)
def test_imports_stay_light(statement: str) -> None:
    """`kbit --help` and `kbit info` must answer at once: nothing heavy before a command needs it."""
    heavy = {"torch", "numpy", "transformers", "tokenizers", "jinja2", "huggingface_hub", "gguf", "rich"}
    assert not heavy & loaded_after(statement)


@pytest.mark.parametrize(
    "statement",
    [
        "import kbit.graph.recording, kbit.graph.fuse, kbit.graph.cache",
        "import kbit.models.decoder, kbit.models.load",
        "from kbit import Model, load",
    ],
)
def test_what_a_model_is_made_of_needs_no_torch(statement: str) -> None:
    assert not {"torch", "scipy", "transformers", "triton"} & loaded_after(statement)


@pytest.mark.parametrize(
    "options",
    [[], ["--temperature", "0.7", "--seed", "1", "--top-k", "5"], ["--kv-bits", "32", "--speculate", "ngram"]],
)
def test_running_on_the_cpu_needs_no_torch(tmp_path: Path, tiny_model: Path, options: list[str]) -> None:
    """Neither the first run, which prepares the weights, nor later ones: importing torch alone takes a second."""
    arguments = ["run", "Hello there", "--model", str(tiny_model), "--max-tokens", "4", *options]
    code = (
        "import sys; from kbit.cli.main import _run\n"
        f"code = _run({arguments!r}, True)\n"
        "print(code, *{'torch', 'scipy', 'matplotlib', 'transformers', 'pandas', 'rich'} & sys.modules.keys(), file=sys.stderr)"
    )
    environment = {**os.environ, "KBIT_PREPARED": str(tmp_path)}
    for _ in ("first", "later"):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        assert done.stderr.splitlines()[-1] == "0"
    assert len(list(tmp_path.glob("*.kbit"))) == 1
