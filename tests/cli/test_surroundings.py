"""What surrounds a command: the locale, names of folders, a clock that jumps. None of it changes what comes out."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conversion_cases import files_of
from error_cases import check_line, run_command
from serve_cases import serving

from kbit.host.quantities import ago

pytestmark = pytest.mark.usefixtures("no_network")

AWKWARD = "a b\n\U0001f600\u00e9 'q' $HOME -x"
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # streams and arguments in ASCII


@pytest.fixture(scope="module")
def awkward(tmp_path_factory: pytest.TempPathFactory, zoo: Path) -> Path:
    """A model in a folder whose name has spaces, quotes, a line feed, letters beyond ASCII and an emoji."""
    folder = tmp_path_factory.mktemp("awkward") / AWKWARD
    try:
        folder.mkdir()
    except (OSError, UnicodeError):
        pytest.skip("this file system does not take such names")
    shutil.copytree(zoo / "good", folder / "good")
    return folder


@pytest.mark.skipif(os.name == "nt", reason="no such names, and another way to say the locale")
def test_names_that_the_locale_cannot_spell(awkward: Path, zoo: Path) -> None:
    """The same bytes as elsewhere, one line of error, and nothing that disturbs a terminal."""
    kept = {name: value for name, value in os.environ.items() if name not in ("LANG", "LC_CTYPE", "PYTHONIOENCODING")}
    environment = {**kept, **ASCII, "KBIT_PREPARED": str(awkward / "prepared")}

    def kbit(*arguments: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [sys.executable, "-m", "kbit", *arguments], env=environment, capture_output=True, timeout=300
        )

    out = awkward / "out"
    done = kbit("quantize", str(awkward / "good"), "--method", "rtn", "-o", str(out))
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"bits per weight" in done.stdout.splitlines()[0]
    assert files_of(out) == files_of(zoo / "done")
    for _ in range(2):  # the second one finds what the first has prepared, in a folder of such a name too
        told = kbit("run", "--raw", "a", "--model", str(out), "--max-tokens", "4", "--seed", "1")
        assert (told.returncode, told.stderr.count(b"\n")) == (0, 1), told.stderr
        assert told.stdout.isascii()
    assert list((awkward / "prepared").rglob("*.kbit"))
    missing = kbit("info", str(awkward / "no\nwhere"))
    assert missing.returncode == 2
    check_line(missing.stdout.decode("ascii"), missing.stderr.decode("ascii"))


def test_a_clock_that_jumps(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Back to 1970 and on to 2100 at every look: the same files, the same answers, no wait and no timeout."""
    model = {"prompt": "a", "max_tokens": 4, "seed": 1, "model": "m"}

    def answers() -> tuple[object, str]:
        with serving(("m", zoo / "good")) as client:
            whole = client.post("/v1/completions", json=model)
            assert whole.status_code == 200, whole.text
            code, said, error = run_command(
                ["run", "--raw", "a", "-m", str(zoo / "good"), "--max-tokens", "4", "--seed", "1"]
            )
            assert code == 0, error
            return whole.json()["choices"], said

    before = answers()
    looks = itertools.cycle((0.0, 4.1e9, 1.0e9, 4.0e9))
    monkeypatch.setattr(time, "time", lambda: next(looks))
    code, _, error = run_command(["quantize", str(zoo / "good"), "--method", "rtn", "-o", str(tmp_path / "out")])
    assert code == 0, error
    assert files_of(tmp_path / "out") == files_of(zoo / "done")
    assert answers() == before


def test_ages_of_what_is_from_the_future() -> None:
    assert (ago(-5.0), ago(-4e8), ago(0.0), ago(59.0), ago(61.0)) == ("now", "now", "now", "now", "1 minute ago")
