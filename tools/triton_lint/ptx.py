"""Loops of PTX, to find how often the assembler unrolled the loop that Triton wrote."""

from __future__ import annotations

import re

from triton_lint import code
from triton_lint.code import Code, Instruction


def read(text: str) -> Code:
    """The loads, tensor-core instructions and branches of one kernel's PTX; everything else is "other"."""
    labels: dict[str, int] = {}
    lines: list[tuple[int, str, str]] = []
    for address, raw in enumerate(text.splitlines()):
        line = raw.split("//", 1)[0].strip()
        if found := re.match(r"^(\$\w+):", line):
            labels[found.group(1)] = address
        elif found := re.match(r"^(?:@!?%p\d+\s+)?([a-z]\w*(?:[.:]+\w+)*)\s*([^;]*);", line):
            lines.append((address, found.group(1), found.group(2)))
    return Code(tuple(_instruction(where, op, operands, labels) for where, op, operands in lines), 0, 0)


def _instruction(address: int, op: str, operands: str, labels: dict[str, int]) -> Instruction:
    if op.startswith("bra"):
        return Instruction(address, op, operands, code.BRANCH, target=labels.get(operands.split()[-1], -1))
    if re.match(r"(mma|wgmma\.mma|tcgen05\.mma)", op):
        return Instruction(address, op, operands, code.MMA, flops=1)
    if op.startswith("ld.global"):
        lanes = re.search(r"\.v([248])", op)
        bits = re.search(r"\.[busf](\d+)$", op)
        width = int(lanes.group(1) if lanes else 1) * int(bits.group(1) if bits else 32)
        return Instruction(address, op, operands, code.LOAD, width=width, streaming="evict_first" in op)
    if re.match(r"cp\.async\.c[ag]\.", op):
        size = operands.split(",")[2].strip()
        return Instruction(address, op, operands, code.ASYNC_LOAD, width=8 * int(size, 0))
    return Instruction(address, op, operands)


def unroll(text: str, body: tuple[Instruction, ...]) -> int:
    """How many turns of Triton's loop one turn of the machine code's hot loop makes.

    Args:
        text: the kernel's PTX.
        body: the hot loop of the machine code.
    """
    written = read(text).hot_loop()
    for kinds in ((code.MMA,), (code.LOAD, code.ASYNC_LOAD)):
        size = len if kinds == (code.MMA,) else lambda found: sum(i.width for i in found)
        before = size([i for i in written if i.kind in kinds])
        after = size([i for i in body if i.kind in kinds])
        # PTX counts mma.sync as the machine does, but for sizes that are split in two (m16n8k16 on older targets).
        if before and after:
            return max(1, round(after / before))
    return 1
