"""Step 4 of tools/gpu_day.py: what the model of tools/triton_lint says of the launches that step 3 timed.

The same launches are compiled and their machine code read, with this GPU's number of multiprocessors and the bandwidth
that step 3 measured in place of the data sheet's. It compiles and runs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from kbit.gpu_check.place import Place, Row
from kbit.host.errors import one_line

if TYPE_CHECKING:
    from triton_lint.cases import Case

DRY_CASE, DRY_ARCH = "product int4-b64 1x4096x4096", "sm_90"


def items(place: Place) -> Sequence[str]:
    """Timed launches that the lint has a case for."""
    if not place.timed:
        return [DRY_CASE]
    return [row["case"] for row in place.earlier.get("times", ()) if row.get("us") and _is_known(row["case"])]


def run(place: Place, item: str) -> list[Row]:
    """{"case", "estimate_us", "us", "factor", "bound"}."""
    from triton_lint.chips import CHIPS
    from triton_lint.driver import compile_for
    from triton_lint.model import REACHED_BANDWIDTH
    from triton_lint.report import report

    row: Row = {"case": item, "us": None}
    facts = next(iter(place.earlier.get("facts", ())), {})
    arch = facts.get("arch") or DRY_ARCH
    try:
        if arch not in CHIPS:
            return [row | {"why": f"the lint knows no {arch}: add it to tools/triton_lint/chips.py"}]
        timed = {found["case"]: found for found in place.earlier.get("times", ())}
        copied = timed.get("limits", {}).get("copy_GB_per_s")
        if copied:
            bandwidth = copied * 1e9 / REACHED_BANDWIDTH
            CHIPS[arch] = replace(CHIPS[arch], bandwidth=bandwidth, units=facts["multiprocessors"])
        case = _case(item)
        with compile_for(arch) as launches:
            case.launch(arch, None)
        found = [report(launch, work).estimate for launch in launches if (work := case.work(launch, None)) is not None]
        estimates = [one for one in found if one is not None]
        row["estimate_us"] = sum(one.time for one in estimates) * 1e6
        row["bound"] = max(estimates[0].bounds, key=estimates[0].bounds.__getitem__)
        row["us"] = timed.get(item, {}).get("us")
        if row["us"]:
            row["factor"] = row["us"] / row["estimate_us"]
    except Exception as error:  # of the compiler, of any kind
        row["error"] = f"{type(error).__name__}: {one_line(error)}"
    return [row]


def _is_known(case: str) -> bool:
    kind, _, size = case.split()
    if kind == "product":
        _, rows, columns = size.split("x")
        return rows == columns
    return kind == "decode" or size == "2048"


def _case(item: str) -> Case:
    from triton_lint import cases_attention, cases_matmul

    kind, what, size = item.split()
    if kind == "decode":
        return cases_attention.decode_case(what, what, context=int(size))
    if kind == "prefill":
        return cases_attention.paged_case(what, what)
    tokens, columns, _ = map(int, size.split("x"))
    if what.startswith("trellis"):
        return cases_matmul.trellis_case(what, tokens, size=columns)
    if tokens <= 4:
        return cases_matmul.gemv_case(what, tokens=tokens, size=columns)
    return cases_matmul.gemm_case(what, tokens, size=columns)
