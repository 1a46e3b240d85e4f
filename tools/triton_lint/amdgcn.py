"""AMD machine code: from Triton's assembly listing to `Code`."""

from __future__ import annotations

import re

from triton_lint import code
from triton_lint.code import Code, Instruction

_KINDS = tuple(
    (re.compile(pattern), kind, unit)
    for pattern, kind, unit in (
        (r"v_(mfma|smfmac|wmma|swmmac)", code.MMA, code.TENSOR),
        (r"(global|buffer)_load_lds|(global|buffer)_load.*_lds", code.ASYNC_LOAD, code.LSU),
        (r"(global|buffer|flat)_load", code.LOAD, code.LSU),
        (r"(global|buffer|flat)_store", code.STORE, code.LSU),
        (r"(global|buffer|flat)_atomic", code.ATOMIC, code.LSU),
        (r"scratch_", code.SPILL, code.LSU),
        (r"ds_(b?permute|swizzle)", code.SHUFFLE, code.LSU),
        (r"ds_(read|load)", code.SHARED_LOAD, code.LSU),
        (r"ds_(write|store)", code.SHARED_STORE, code.LSU),
        (r"s_barrier|s_wait", code.BARRIER, code.SCALAR),
        (r"s_c?branch|s_setpc|s_endpgm", code.BRANCH, code.SCALAR),
        (r"s_", code.OTHER, code.SCALAR),
        (r"v_(exp|log|rcp|rsq|sqrt|sin|cos)", code.OTHER, code.XU),
        (r"v_(fma|mul_f|add_f|sub_f|mac|pk_|dot|mad)", code.OTHER, code.FMA),
    )
)

_WIDTHS = (
    (r"(dwordx4|b128)", 128),
    (r"(dwordx3|b96)", 96),
    (r"(dwordx2|b64)", 64),
    (r"(ushort|sshort|short|u16|i16|b16|d16)", 16),
    (r"(ubyte|sbyte|byte|u8|i8|b8)", 8),
)


def read(listing: str) -> Code:
    """Parse the assembly of one kernel."""
    labels: dict[str, int] = {}
    lines: list[tuple[int, str, str]] = []
    address = 0
    for raw in listing.splitlines():
        line = raw.split(";", 1)[0].strip()
        if found := re.match(r"^(\.L\w+|\w+):", line):
            labels[found.group(1)] = address
        elif found := re.match(r"^((?:v|s|ds|global|buffer|flat|scratch)_\w+)\b(.*)", line):
            lines.append((address, found.group(1), found.group(2).strip()))
            address += 1
        if line.startswith(".section") and lines:  # the code ends where the descriptor begins
            break
    instructions = tuple(_instruction(where, op, operands, labels) for where, op, operands in lines)
    registers = _note(listing, "vgpr_count") or 1
    # On gfx90a and gfx942 accumulation registers are counted in vgpr_count; agpr_count is their part of it.
    note = re.search(r";\s*Occupancy:\s*(\d+)", listing)
    spilled = 4 * _note(listing, "vgpr_spill_count")
    return Code(instructions, registers, spilled, int(note.group(1)) if note else 0)


def _note(listing: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s*(\d+)", listing)
    return int(found.group(1)) if found else 0


def _instruction(address: int, op: str, operands: str, labels: dict[str, int]) -> Instruction:
    kind, unit = code.OTHER, code.ALU
    for pattern, its_kind, its_unit in _KINDS:
        if pattern.match(op):
            kind, unit = its_kind, its_unit
            break
    if kind == code.OTHER and re.search(r"(quad_perm|row_|wave_|bank_mask)", operands):
        kind = code.SHUFFLE  # data-parallel primitives: a move between lanes within an arithmetic instruction
    target = labels.get(operands.split()[0], -1) if kind == code.BRANCH and operands else -1
    width = 0
    if unit == code.LSU:
        width = next((bits for pattern, bits in _WIDTHS if re.search(pattern, op)), 32)
        if op.startswith(("ds_read2", "ds_write2", "ds_load_2addr", "ds_store_2addr")):
            width = 128 if "b64" in op else 64
    flops = 0
    if kind == code.MMA and (shape := re.search(r"(\d+)x(\d+)x(\d+)", op)):
        m, n, k = (int(number) for number in shape.groups())
        flops = 2 * m * n * k
        if blocks := re.search(r"_(\d+)b_", op):
            flops *= int(blocks.group(1))
    streaming = kind in (code.LOAD, code.ASYNC_LOAD) and bool(re.search(r"\b(nt|slc|TH_LOAD_NT)\b", operands))
    ends = op.startswith(("s_endpgm", "s_setpc"))
    return Instruction(address, op, operands, kind, unit, width, flops, streaming, target, ends)
