"""NVIDIA machine code: from a cubin to `Code`."""

from __future__ import annotations

import re
import subprocess
import tempfile

from triton import knobs

from triton_lint import code
from triton_lint.code import Code, Instruction

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Za-z0-9_.]*)([^;]*);", re.MULTILINE)

# Patterns of mnemonics, first match wins: kind and unit.
_KINDS = tuple(
    (re.compile(pattern), kind, unit)
    for pattern, kind, unit in (
        (r"[HIQBO]GMMA|UTC\w*MMA|[HIQOBD]MMA", code.MMA, code.TENSOR),
        (r"LDGSTS|UTMALDG|UBLKCP", code.ASYNC_LOAD, code.LSU),
        (r"LDG(?!DEPBAR)|LD\.", code.LOAD, code.LSU),
        (r"STG|ST\.|UTMASTG", code.STORE, code.LSU),
        (r"LDSM|LDS", code.SHARED_LOAD, code.LSU),
        (r"STSM|STS", code.SHARED_STORE, code.LSU),
        (r"LDL|STL", code.SPILL, code.LSU),
        (r"RED\.|RED$|ATOM", code.ATOMIC, code.LSU),
        (r"SHFL", code.SHUFFLE, code.LSU),
        (r"LDC|ULDC", code.OTHER, code.SCALAR),
        (
            r"BAR|SYNCS|WARPSYNC|WARPGROUP|DEPBAR|LDGDEPBAR|ERRBAR|MEMBAR|FENCE|B(SSY|SYNC|REAK)",
            code.BARRIER,
            code.SCALAR,
        ),
        (r"BRA|BRX|JMP|CALL|RET|EXIT", code.BRANCH, code.SCALAR),
        (r"MUFU|I2F(?!P)|F2I(?!P)|F2F(?!P)|FRND|POPC|FLO|BREV|S2R", code.OTHER, code.XU),
        (r"FFMA|FMUL|FADD|IMAD|HFMA2|HMUL2|HADD2|FFMA2|FADD2|FMUL2|IDP", code.OTHER, code.FMA),
        (r"U[A-Z]|R2UR|S2UR|NANOSLEEP|YIELD|ELECT|VOTEU", code.OTHER, code.SCALAR),
    )
)

_WIDTH = re.compile(r"\.(256|128|64|U16|S16|U8|S8|16|8)(?=\.|$)")
_MMA_SHAPE = re.compile(r"\.(\d+x\d+x\d+|\d{4,6})")


def read(cubin: bytes) -> Code:
    """Disassemble a cubin with one kernel."""
    resources = _cuobjdump(cubin, "--dump-resource-usage")
    found = re.search(r"Function \S+:\s*(REG:.*)", resources)
    if found is None:
        raise ValueError(f"no kernel in the cubin: {resources[:200]}")
    usage = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", found.group(1))}
    instructions = tuple(
        _instruction(int(address, 16), op, operands.strip(), predicate)
        for address, predicate, op, operands in _LINE.findall(_cuobjdump(cubin, "-sass"))
        if op != "NOP"
    )
    return Code(instructions, usage["REG"], usage.get("STACK", 0))


def _cuobjdump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _instruction(address: int, op: str, operands: str, predicate: str) -> Instruction:
    kind, unit = code.OTHER, code.ALU
    for pattern, its_kind, its_unit in _KINDS:
        if pattern.match(op):
            kind, unit = its_kind, its_unit
            break
    target = -1
    if kind == code.BRANCH and (found := re.findall(r"0x([0-9a-f]+)", operands)):
        target = int(found[-1], 16)
        if target == address:  # the trap behind the last instruction
            target = -1
    width = 0
    if unit == code.LSU:
        found = _WIDTH.search(op)
        # LDSM moves 8x8 matrices of 16 bits: one is 32 bits a thread.
        lead = re.search(r"\.(?:M88\.|MT88\.)?([24])$|\.([24])\.", op) if op.startswith(("LDSM", "STSM")) else None
        if lead:
            width = 32 * int(lead.group(1) or lead.group(2))
        else:
            width = int(re.sub(r"[US]", "", found.group(1))) if found else 32
    flops = _flops(op) if kind == code.MMA else 0
    streaming = kind in (code.LOAD, code.ASYNC_LOAD) and bool(re.search(r"\.EF(\.|$)", op))
    ends = not predicate and op.startswith(("EXIT", "RET"))
    return Instruction(address, op, operands, kind, unit, width, flops, streaming, target, ends)


def _flops(op: str) -> int:
    """Two times m n k of a tensor-core instruction, per warp that issues it.

    HMMA.16816 is a warp's; HGMMA.64x128x16 belongs to four warps, so each is given a quarter. tcgen05 instructions
    (UTCHMMA) do not carry their shape: 0.
    """
    shape = _MMA_SHAPE.search(op)
    if shape is None:
        return 0
    digits = shape.group(1)
    if "x" in digits:
        m, n, k = (int(number) for number in digits.split("x"))
        return 2 * m * n * k // 4
    sizes = {"884": (8, 8, 4), "1684": (16, 8, 4), "1688": (16, 8, 8), "16816": (16, 8, 16), "16832": (16, 8, 32),
             "16864": (16, 8, 64), "8816": (8, 8, 16), "8832": (8, 8, 32)}  # fmt: skip
    m, n, k = sizes.get(digits, (0, 0, 0))
    return 2 * m * n * k
