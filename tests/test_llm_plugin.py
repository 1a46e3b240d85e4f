"""kbit's models in the program `llm`: found by the entry point, asked on its command line and from Python."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from serve_cases import with_template

llm = pytest.importorskip("llm", reason="needs the program llm: pip install 'llm>=0.32'")
if not hasattr(llm, "Message"):
    pytest.skip("kbit's models need llm 0.32 or later", allow_module_level=True)

from kbit.api.model import load  # noqa: E402
from kbit.host.errors import KbitError  # noqa: E402
from kbit.llm_plugin import KbitModel, local_names  # noqa: E402

REPOSITORY = Path(__file__).resolve().parent.parent
GREEDY = ["-o", "temperature", "0", "-o", "max_tokens", "12"]


@pytest.fixture(scope="module")
def folder(novels_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_template(Path(novels_folder), tmp_path_factory.mktemp("llm") / "novels-chat")


def greedy(folder: Path, messages: list[dict[str, Any]], **settings: Any) -> str:
    with load(folder, threads=1) as model:
        return model.chat(messages, **{"max_tokens": 12, **settings}).text  # type: ignore[arg-type]


def test_on_the_command_line(folder: Path, tmp_path: Path) -> None:
    """As installed: llm reads the entry point, here from metadata made of pyproject.toml."""
    entry = re.search(
        r"^\[project.entry-points.llm\]\n(\S+ = )\"(\S+)\"$", (REPOSITORY / "pyproject.toml").read_text(), re.M
    )
    assert entry is not None
    metadata = tmp_path / "kbit-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kbit\nVersion: 0.1.0\n")
    (metadata / "entry_points.txt").write_text(f"[llm]\n{entry[1]}{entry[2]}\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "LLM_USER_PATH": str(tmp_path / "llm")}
    environment.pop("LLM_LOAD_PLUGINS", None)

    def asked(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "llm", *arguments],
            capture_output=True, text=True, env=environment, cwd=folder.parent, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.removesuffix("\n")

    first = asked("-m", "kbit/novels-chat", "-s", "Be brief.", "The sea", *GREEDY)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The sea"}]
    assert first == greedy(folder, messages) != ""
    again = asked("-c", "And then?", "--no-stream", *GREEDY)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "And then?"}]
    assert again == greedy(folder, messages)


def test_streams_counts_and_keeps_one_model(folder: Path, tmp_path: Path) -> None:
    import kbit.llm_plugin as plugin

    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    model, other = KbitModel("one", str(folder)), KbitModel("two", str(copy))
    response = model.prompt("The sea", temperature=0.9, top_p=0.8, seed=5, max_tokens=12)
    pieces = iter(response)
    start = next(pieces)
    assert other.prompt("The sea", temperature=0, max_tokens=3).text()
    assert plugin._kept is not None
    assert plugin._kept[0] == str(copy)
    rest = list(pieces)  # of a model that another has taken the place of
    assert len(rest) > 2
    asked = [{"role": "user", "content": "The sea"}]
    assert start + "".join(rest) == greedy(folder, asked, temperature=0.9, top_p=0.8, seed=5)
    assert response.usage().output == 12
    assert response.json() == {"finish_reason": "length", "seed": 5}


def test_what_is_not_said_is_as_recommended(folder: Path) -> None:
    with load(folder, threads=1) as model:
        recommended = model.recommended
    assert recommended["temperature"] > 0
    said = KbitModel("one", str(folder)).prompt("The sea", seed=3, max_tokens=12).text()
    assert said == greedy(folder, [{"role": "user", "content": "The sea"}], seed=3, **recommended)


def test_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    names = local_names()
    assert names["novels-chat"] == str(folder.resolve())
    assert "smollm2-135m-instruct" in names
    assert not any(name.startswith("/") for name in names)


def test_refusals(folder: Path, novels_folder: str) -> None:
    model = KbitModel("one", str(folder))
    with pytest.raises(KbitError, match="--temperature -1"):
        model.prompt("The sea", temperature=-1).text()
    with pytest.raises(KbitError, match="no chat template"):
        KbitModel("base", novels_folder).prompt("The sea").text()
    with pytest.raises(KbitError, match="AttachmentPart"):
        model.prompt(messages=[llm.user("Look", llm.Attachment(content=b"x", type="image/png"))]).text()
