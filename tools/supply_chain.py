"""What kbit depends on: under which licences, with which known weaknesses, as a bill of materials.

    python tools/supply_chain.py licences                   # every package that is needed, its version and licence
    python tools/supply_chain.py audit                      # pip install pip-audit; asks the index of vulnerabilities
    python tools/supply_chain.py sbom -o kbit.cdx.json      # pip install cyclonedx-bom; CycloneDX, of constraints.txt

Licences are those that the installed packages state; exit code 1: a package states none, or one of the strong copyleft
kind, which kbit does not build on. The audit exits with 1 where a version in constraints.txt has a known vulnerability,
and with 2 where packages could not be looked up, which is no success. Needs Python 3.11.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import tomllib

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
# What the classifiers and long names of licences are called in short.
_SHORT = (
    ("MIT", r"\bMIT\b|Expat"),
    ("BSD", r"\bBSD\b|ISC|3-Clause|2-Clause"),
    ("Apache-2.0", r"Apache"),
    ("MPL-2.0", r"MPL|Mozilla"),
    ("PSF-2.0", r"PSF|Python Software Foundation"),
    ("Unlicense", r"Unlicense|Public Domain|CC0"),
    ("zlib", r"\bzlib\b"),
    ("LGPL", r"LGPL|Lesser General Public"),
    ("GPL", r"\bA?GPL|General Public License"),
)


@dataclass(frozen=True)
class Package:
    """An installed package and what it says of its licence."""

    name: str
    version: str
    licence: str
    needed_by: str

    @property
    def kinds(self) -> list[str]:
        """Short names of the licence; of "A or B" both."""
        found = [short for short, pattern in _SHORT if re.search(pattern, self.licence, re.IGNORECASE)]
        return [kind for kind in found if kind != "GPL" or "LGPL" not in found]


def needed() -> list[Package]:
    """The installed packages that kbit needs, with all its extras, and those that they need; by name."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    wanted: list[str] = [text for texts in lists for text in texts]
    waiting: list[tuple[Requirement, tuple[str, ...], str]] = [(Requirement(text), ("",), "kbit") for text in wanted]
    found: dict[str, Package] = {}
    seen = set()
    while waiting:
        requirement, extras, by = waiting.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        key = (name, tuple(sorted(requirement.extras)))
        marker = requirement.marker
        holds = marker is None or any(marker.evaluate({"extra": extra}) for extra in extras)
        if name == "kbit" or key in seen or not holds:
            continue
        seen.add(key)
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # of an extra that is not installed
        found[name] = Package(name, distribution.version, _licence(distribution), by)
        waiting += [(Requirement(text), (*key[1], ""), name) for text in distribution.requires or ()]
    return [found[name] for name in sorted(found)]


def _licence(distribution: metadata.Distribution) -> str:
    """What a package states: the expression, else its classifiers, else the first line of its text."""
    about: Any = distribution.metadata  # (its type lacks `get` of a mapping)
    expression = about.get("License-Expression")
    if expression:
        return str(expression)
    classifiers = [line for line in about.get_all("Classifier") or () if line.startswith("License ::")]
    named = [line.rpartition(" :: ")[2] for line in classifiers if not line.endswith("OSI Approved")]
    if named:
        return ", ".join(named)
    lines = [line.strip() for line in str(about.get("License") or "").splitlines() if line.strip()]
    return lines[0][:80] if lines else ""


def licences() -> int:
    """Prints a line a package."""
    packages = needed()
    width = max(len(package.name) for package in packages)
    wrong = []
    for package in packages:
        print(f"{package.name:{width}}  {package.version:12}  {package.licence or 'none stated'}")
        if not package.kinds or package.kinds == ["GPL"]:
            wrong.append(package)
    counts: dict[str, int] = {}
    for package in packages:
        for kind in package.kinds:
            counts[kind] = counts.get(kind, 0) + 1
    print(f"{len(packages)} packages: " + ", ".join(f"{kind} {n}" for kind, n in sorted(counts.items())))
    for package in wrong:
        said = package.licence or "no licence"
        print(f"{package.name} {package.version}, needed by {package.needed_by}, states {said}: look", file=sys.stderr)
    return 1 if wrong else 0


def audit() -> int:
    """pip-audit on constraints.txt; says of how many packages anything is known."""
    command = [sys.executable, "-m", "pip_audit", "-r", str(CONSTRAINTS), "--no-deps", "--disable-pip", "-f", "json"]
    done = subprocess.run([*command, "--progress-spinner", "off"], capture_output=True, text=True, check=False)
    try:
        report: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        lines = done.stderr.strip().splitlines() or ["no word"]
        print(f"pip-audit did not run: {lines[-1][:300]} (pip install pip-audit)", file=sys.stderr)
        return 2
    return judge(report)


def judge(report: list[dict[str, Any]]) -> int:
    """Prints what pip-audit found; the exit code."""
    skipped = [entry for entry in report if "skip_reason" in entry]
    weak = [(entry, each) for entry in report for each in entry.get("vulns", ())]
    for entry, each in weak:
        fixed = ", ".join(each.get("fix_versions") or ["none yet"])
        print(f"{entry['name']} {entry['version']}: {each['id']}, fixed in {fixed}")
    print(f"{len(report) - len(skipped)} of {len(report)} packages looked up, {len(weak)} vulnerabilities")
    if skipped:
        print(
            f"{len(skipped)} could not be looked up ({skipped[0]['skip_reason'][:120]}): the index of "
            "vulnerabilities was not reached, or does not know them",
            file=sys.stderr,
        )
    return 1 if weak else 2 if skipped else 0


def sbom(out: Path) -> int:
    """CycloneDX's own tool on constraints.txt."""
    command = [sys.executable, "-m", "cyclonedx_py", "requirements", str(CONSTRAINTS), "--pyproject"]
    command += [str(ROOT / "pyproject.toml"), "--output-reproducible", "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not out.is_file():
        lines = done.stderr.strip().splitlines() or ["no word"]
        print(f"cyclonedx-py did not run: {lines[-1][:300]} (pip install cyclonedx-bom)", file=sys.stderr)
        return 2
    print(f"{out}: {sum(1 for _ in _components(out))} components")
    return 0


def _components(path: Path) -> Iterator[Any]:
    yield from json.loads(path.read_text(encoding="utf-8")).get("components", ())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("licences", "audit", "sbom"))
    parser.add_argument("-o", "--output", type=Path, default=Path("kbit.cdx.json"), help="of sbom [kbit.cdx.json]")
    arguments = parser.parse_args()
    if arguments.what == "sbom":
        return sbom(arguments.output)
    return audit() if arguments.what == "audit" else licences()


if __name__ == "__main__":
    sys.exit(main())
