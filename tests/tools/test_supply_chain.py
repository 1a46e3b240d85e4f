"""tools/supply_chain.py: licences of what is installed, and what it makes of pip-audit's reports."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

pytest.importorskip("tomllib", reason="tools/supply_chain.py needs Python 3.11")

from supply_chain import Package, judge, licences, needed  # noqa: E402

SOUND = {"name": "numpy", "version": "2.4.6", "vulns": []}
WEAK = {"name": "jinja2", "version": "3.1.5", "vulns": [{"id": "CVE-2025-27516", "fix_versions": ["3.1.6"]}]}
UNKNOWN = {"name": "toy", "skip_reason": "Dependency not found on PyPI"}


def test_what_is_installed_has_licences_that_kbit_may_build_on(capsys: pytest.CaptureFixture[str]) -> None:
    packages = {package.name: package for package in needed()}
    assert {"torch", "numpy", "jinja2", "markupsafe"} <= packages.keys()
    assert packages["markupsafe"].needed_by == "jinja2"
    assert licences() == 0, capsys.readouterr().err
    assert "packages: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("said", "kinds"),
    [
        ("MIT License", ["MIT"]),
        ("Apache-2.0 OR BSD-2-Clause", ["BSD", "Apache-2.0"]),
        ("GNU General Public License v3 (GPLv3)", ["GPL"]),
        ("GNU Lesser General Public License v2.1", ["LGPL"]),
        ("AGPL-3.0-only", ["GPL"]),
        ("Proprietary", []),
        ("", []),
    ],
)
def test_kinds(said: str, kinds: list[str]) -> None:
    assert Package("toy", "1", said, "kbit").kinds == kinds


@pytest.mark.parametrize(
    ("report", "code", "words"),
    [
        ([SOUND], 0, "1 of 1 packages looked up, 0 vulnerabilities"),
        ([SOUND, WEAK], 1, "jinja2 3.1.5: CVE-2025-27516, fixed in 3.1.6"),
        ([SOUND, UNKNOWN], 2, "1 of 2 packages looked up"),
    ],
)
def test_an_audit_that_reached_nobody_is_no_success(
    report: list[dict[str, Any]], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert judge(report) == code
    assert words in capsys.readouterr().out
