"""Machine code, without a GPU: the lint finds what it must find, and the kernels pass their gates (tools/aot.py).

Compiling and interpreting exclude each other within a process, so everything here runs in processes of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS = REPOSITORY / "tools"

# Known kernels: what the lint must say about them is told in the tests below.
PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch, triton, triton.language as tl
from triton_lint import Work, compile_for, report
from triton_lint.cases import Gate

@triton.jit
def copy(x, o, stride, BLOCK: tl.constexpr):
    at = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    tl.store(o + at, tl.load(x + at, eviction_policy="evict_first"))

@triton.jit
def total(x, o, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    x += tl.program_id(0) * n
    for start in range(0, n, BLOCK):
        sums += tl.load(x + start + at, eviction_policy="evict_first")
    tl.store(o + tl.program_id(0) * BLOCK + at, sums)

@triton.jit
def product(x, y, o, n, SIZE: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    out = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    for start in range(0, n, SIZE):
        out = tl.dot(tl.load(x + row * n + start + column), tl.load(y + (start + row) * n + column), out)
    tl.store(o + row * SIZE + column, out)

@triton.jit
def crowded(x, o, SIZE: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    a = tl.load(x + row * SIZE + column)
    tl.store(o + row * SIZE + column, tl.dot(a, a))

def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")

def numbers(launch, work=None):
    found = report(launch, work)
    answer = dict(registers=found.registers, spills=found.spills, shared=found.shared, fits=found.fits, mma=found.mma,
                  loads=found.loads, streams=found.stream_loads, grid=launch.grid, loop=len(found.hot), text=str(found),
                  broken=Gate(load_bits=128).broken(found))
    if found.estimate:
        e = found.estimate
        answer["model"] = dict(per_unit=e.per_unit, time=e.time, floor=e.floor, bounds=e.bounds, share=e.tensor_share)
    return answer

answers = {}
for arch in sys.argv[2:]:
    half = torch.float16
    with compile_for(arch) as launches:
        copy[(4096,)](meta(4096, 2048), meta(4096, 2048), 2048, 2048)
        copy[lambda meta: (3, 2)](meta(9), meta(9), 2047, 2048)
        total[(1024,)](meta(1024, 4096), meta(1024, 1024), 4096, 1024)
        product[(1,)](meta(64, 4096, dtype=half), meta(4096, 64, dtype=half), meta(64, 64), 4096, 64)
        crowded[(1,)](meta(256, 256, dtype=half), meta(256, 256), 256, num_warps=4)
    size = 1024 * 4096
    kernels = [
        numbers(launches[0], Work(bytes=4096 * 2048 * 8, units=4096 * 2048)),
        numbers(launches[1]),
        numbers(launches[2], Work(bytes=size * 4, units=size, steps=1024 * 4)),
        numbers(launches[3], Work(bytes=1, units=1, flops=2 * 64 * 64 * 4096, steps=64)),
        numbers(launches[4]),
    ]
    try:
        report(launches[2], Work(bytes=1))
        unknown = ""
    except ValueError as error:
        unknown = str(error)
    by_stream = 0
    if arch.startswith("sm_"):  # AMD's loads do not carry the mark
        by_stream = report(launches[2], Work(bytes=size * 4, units=size, stream_bytes=size * 4)).estimate.per_unit
    answers[arch] = dict(kernels=kernels, unknown=unknown, by_stream=by_stream)
print(json.dumps(answers))
"""


def run_python(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=variables, check=False, timeout=900)


ARCHES = ("sm_80", "sm_90", "gfx942", "gfx1100")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    program = tmp_path_factory.mktemp("lint") / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    result = run_python(program, TOOLS, *ARCHES)
    assert result.returncode == 0, result.stderr
    answers: dict[str, Any] = json.loads(result.stdout)
    return answers


@pytest.mark.parametrize("arch", ARCHES)
def test_widths_of_loads_follow_alignment(arch: str, found: dict[str, Any]) -> None:
    aligned, odd, *_ = found[arch]["kernels"]
    assert aligned["loads"].keys() == {"128"}
    assert odd["loads"].keys() == {"32"}
    assert aligned["grid"] == [4096, 1, 1]
    assert odd["grid"] == [3, 2, 1]
    if arch.startswith("sm_"):
        assert aligned["streams"] == aligned["loads"]
        assert not aligned["broken"]
        assert odd["broken"] == [f"no evict-first or asynchronous load of 128 bits: {{32: {odd['loads']['32']}}}"]


@pytest.mark.parametrize("arch", ARCHES)
def test_the_model_of_a_copy_is_its_memory_traffic(arch: str, found: dict[str, Any]) -> None:
    model = found[arch]["kernels"][0]["model"]
    assert model["time"] == model["bounds"]["memory"]
    assert model["time"] == pytest.approx(model["floor"] / 0.92)


@pytest.mark.parametrize("arch", ARCHES)
def test_tensor_core_instructions_are_named(arch: str, found: dict[str, Any]) -> None:
    kind = {"sm_80": "HMMA", "sm_90": "HGMMA", "gfx942": "v_mfma", "gfx1100": "v_wmma"}[arch]
    product = found[arch]["kernels"][3]
    assert any(name.startswith(kind) for name in product["mma"]), product["mma"]
    assert 0 < product["model"]["share"] <= 1


@pytest.mark.parametrize("arch", ARCHES)
def test_a_tile_too_large_spills_or_does_not_fit(arch: str, found: dict[str, Any]) -> None:
    crowded = found[arch]["kernels"][4]
    assert crowded["spills"] > 0 or not crowded["fits"], crowded["text"]
    assert crowded["broken"]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_turns_of_a_loop(arch: str, found: dict[str, Any]) -> None:
    """However often the assembler unrolled it: told by turns of the source, and by the bytes it streams."""
    total = found[arch]["kernels"][2]
    assert total["loop"] > 0
    assert total["model"]["per_unit"] == pytest.approx(found[arch]["by_stream"])
    # An addition and a quarter of a 128-bit load per element at least; the loop's own instructions shared by several.
    assert 1.25 <= total["model"]["per_unit"] < 4


def test_a_loop_of_unknown_length_is_an_error(found: dict[str, Any]) -> None:
    assert "give steps" in found["sm_90"]["unknown"]


def test_interpreting_and_compiling_exclude_each_other() -> None:
    code = (
        f"import os, sys; os.environ['TRITON_INTERPRET'] = '1'; sys.path.insert(0, {str(TOOLS)!r})\n"
        "from triton_lint import compile_for\nwith compile_for('sm_90'): pass"
    )
    result = run_python("-c", code)
    assert "compile and interpret in separate processes" in result.stderr


def test_unknown_targets_and_cases_are_usage_errors() -> None:
    assert run_python(TOOLS / "aot.py", "--target", "sm_42").returncode == 2
    result = run_python(TOOLS / "aot.py", "--case", "no-such-case")
    assert result.returncode == 2
    assert "no case has no-such-case in its name" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_kernels_pass_their_gates(arch: str, tmp_path: Path) -> None:
    """The representative subset: no spills, vector loads, tensor-core instructions, budgets of instructions."""
    out = tmp_path / "rows.json"
    result = run_python(TOOLS / "aot.py", "--quick", "--gates", "--target", arch, "--json", out)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(out.read_text())
    assert len({row["kernel"] for row in rows}) >= 5
    assert all(row["fits"] for row in rows)
