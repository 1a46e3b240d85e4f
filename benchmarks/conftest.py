"""How the benchmarks are run, and what they share: the default model, as it is and converted, and the evaluation text.

    pytest benchmarks/                      # the short suite: accuracy, throughput, quantizing, installed peers
    pytest benchmarks/ --full               # everything there is
    pytest benchmarks/test_cpu_engine.py    # a named file runs whole
    pytest benchmarks/ --device cuda        # a GPU's benchmarks instead

Results are printed as each benchmark ends and saved below .benchmarks/ with a description of the machine
(--benchmark-json FILE saves them elsewhere); tools/compare_benchmarks.py compares two such files.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch
    from ladder import Ladder

    from kbit.text.datasets import TextData

BENCHMARKS = Path(__file__).resolve().parent
sys.path.insert(0, str(BENCHMARKS))  # modules that benchmarks share: pytest's importlib mode adds no folders

SUMMARY = pytest.StashKey[str]()
SAMPLED_TOKENS = 2048  # of the text that stands in for WikiText-2: some minutes' work on two slow cores


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kbit benchmarks")
    group.addoption(
        "--device", default="cpu", help="cpu (the default), or a GPU: cuda, cuda:1: then only test_gpu_* run."
    )
    group.addoption("--full", action="store_true", help="Run every benchmark, not only the short suite.")


@pytest.hookimpl(tryfirst=True)  # pytest-benchmark reads its options in its own pytest_configure
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: a benchmark that `pytest benchmarks/` leaves to --full.")
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("pytest-benchmark is not installed: pip install -c constraints.txt '.[bench]'")
    option = config.option
    if getattr(option, "numprocesses", None):
        raise pytest.UsageError("-n: benchmarks have the machine to themselves, one after the other; leave it out")
    if is_short(config) and not named_files(config) and not option.verbose:
        option.benchmark_quiet = True  # its table of rounds says nothing that the reports do not say better
    elsewhere = option.benchmark_json or option.benchmark_save or option.benchmark_autosave
    if elsewhere or option.benchmark_disable or option.collectonly:
        return
    folder = config.rootpath / ".benchmarks"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise pytest.UsageError(f"{folder}: {error.strerror}: name a file with --benchmark-json FILE") from None
    option.benchmark_json = folder / time.strftime("%Y%m%dT%H%M%SZ.json", time.gmtime())


def pytest_report_header(config: pytest.Config) -> str | None:
    if is_short(config) and not named_files(config) and config.getoption("--device") == "cpu":
        return "benchmarks: the short suite (below 10 minutes on 2 cores); --full runs all, --device cuda a GPU's"
    return None


def is_short(config: pytest.Config) -> bool:
    """Whether this run takes the short suite, of the folders it was given; named files and -m run what they name."""
    return not config.getoption("--full") and not config.option.markexpr


def named_files(config: pytest.Config) -> set[Path]:
    """The files that the command line names, alone or before "::"."""
    paths = ((config.invocation_params.dir / argument.split("::")[0]).resolve() for argument in config.args)
    return {path for path in paths if path.is_file()}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a GPU only what measures it: the CPU's benchmarks say nothing about it. Else the short suite, or all."""
    named, on_gpu = named_files(config), config.getoption("--device") != "cpu"

    def runs(item: pytest.Item) -> bool:
        if item.path.parent != BENCHMARKS:
            return True
        of_gpu = item.path.name.startswith("test_gpu_")
        if of_gpu or on_gpu:
            return of_gpu and (on_gpu or item.path in named)
        return not is_short(config) or item.path in named or item.get_closest_marker("full") is None

    chosen = [item for item in items if runs(item)]
    left = [item for item in items if not runs(item)]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = chosen
    config.pluginmanager.register(Show(config, {item.nodeid for item in chosen if item.path.parent == BENCHMARKS}))


class Show:
    """Prints what a benchmark printed as soon as it ends; pytest would keep the output of what passes."""

    def __init__(self, config: pytest.Config, benchmarks: set[str]) -> None:
        self._terminal = config.pluginmanager.get_plugin("terminalreporter")
        self._benchmarks = benchmarks

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self._terminal is None or report.when != "call" or not report.passed:
            return  # what fails is printed by pytest
        if report.nodeid in self._benchmarks:
            for name, text in report.sections:
                if name == "Captured stdout call":
                    self._terminal.ensure_newline()
                    self._terminal.write(text.lstrip("\n") + "\n")


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    from measuring import run_facts

    machine_info["kbit"] = run_facts()


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    from summary import summary

    config.stash[SUMMARY] = summary(output_json)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    text = config.stash.get(SUMMARY, None)  # None: nothing has been saved
    if text:
        terminalreporter.section("what the bits cost, and what they gain")
        terminalreporter.write_line(text)
    saved = config.option.benchmark_json
    if text is not None and saved is not None:
        terminalreporter.write_line(f"saved in {os.path.relpath(saved)}; two such files compare with")
        terminalreporter.write_line("    python tools/compare_benchmarks.py BEFORE.json AFTER.json")


@pytest.fixture(scope="session")
def gpu(request: pytest.FixtureRequest) -> torch.device:
    """The GPU that --device names; skips without one."""
    import torch

    name = request.config.getoption("--device")
    if name == "cpu":
        pytest.skip("measures a GPU: pytest benchmarks/ --device cuda")
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    if not torch.cuda.is_available():
        pytest.skip(f"--device {name}: torch sees no GPU")
    device = torch.device(name)
    torch.cuda.set_device(device)
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="session")
def converted(smollm2: Path) -> Callable[[int, int], Path]:
    """A function (bits, bits of embedding and head) -> the default model converted so: a folder, made once and kept."""

    def convert(bits: int, head: int) -> Path:
        from kbit.host.cache_folder import cache_dir

        folder = cache_dir() / "benchmarks" / f"smollm2-135m-instruct-{bits}bit-head{head}"
        widths = ["--bits", str(bits), "--embedding-bits", str(head)]
        command = [
            "-m",
            "kbit.cli.main",
            "quantize",
            str(smollm2),
            *widths,
            "--method",
            "rtn",
            "-o",
            str(folder),
            "--force",
        ]
        if not (folder / "config.json").is_file():  # quantize moves a finished folder into place, never a part of it
            subprocess.run([sys.executable, *command], check=True, capture_output=True, cwd=Path.home())
        return folder

    return convert


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default model's GGUF file, downloaded into the cache on first use."""
    from kbit.checkpoint.pull import pull
    from kbit.host.errors import KbitError

    try:
        return pull("smollm2-135m-instruct")
    except KbitError as error:
        pytest.skip(f"the default model could not be fetched: {error}")


@pytest.fixture(scope="session")
def subject(request: pytest.FixtureRequest) -> tuple[str, Path]:
    """(name, path) of what the short suite measures: the default model, else novels-5m of the data folder."""
    try:
        return "smollm2-135m-instruct", request.getfixturevalue("smollm2")
    except pytest.skip.Exception as reason:
        folder = find_data_dir() / "models" / "novels-5m"
        if not (folder / "config.json").is_file():
            pytest.skip(f"{reason}; and there is no {folder}: set KBIT_DATA")
        return "novels-5m", folder


@pytest.fixture(scope="session")
def ladder(subject: tuple[str, Path]) -> Iterator[Ladder]:
    """The subject at every width, in memory."""
    from ladder import Ladder

    with Ladder(*subject) as ladder:
        yield ladder


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of evaluation text: KBIT_DATA, else shared/data beside the checkout."""
    folder = find_data_dir()
    if not folder.is_dir():
        pytest.skip(f"no evaluation data at {folder}: set KBIT_DATA")
    return folder


@pytest.fixture(scope="session")
def text(subject: tuple[str, Path]) -> TextData:
    """WikiText-2's test split: of the data folder, or of the cache, into which it is downloaded on first use; where
    there is neither data nor network, text that the subject writes itself."""
    from kbit.evaluate.sampled_data import SAMPLED, evaluation_text
    from kbit.host.errors import KbitError
    from kbit.text.datasets import resolve_data

    if find_data_dir().is_dir():
        os.environ.setdefault("KBIT_DATA", str(find_data_dir()))
    try:
        return resolve_data("wikitext2")
    except KbitError as error:
        print(f"text sampled from {subject[0]}: {error}", file=sys.stderr)
        return evaluation_text(SAMPLED, str(subject[1]), SAMPLED_TOKENS)


def find_data_dir() -> Path:
    """Where the data folder is, if there is one."""
    named = os.environ.get("KBIT_DATA")
    return Path(named) if named else BENCHMARKS.parent.parent / "shared" / "data"
