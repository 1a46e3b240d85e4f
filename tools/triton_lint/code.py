"""Machine code as a list of instructions with kinds, whatever the maker of the GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

# What an instruction does, as far as the lint asks.
LOAD, ASYNC_LOAD, STORE, ATOMIC = "load", "async load", "store", "atomic"
SHARED_LOAD, SHARED_STORE, SHUFFLE, SPILL = "shared load", "shared store", "shuffle", "spill"
MMA, BARRIER, BRANCH, OTHER = "mma", "barrier", "branch", "other"

# Which unit works on it (see model): logic and integers, fp32, slow functions and conversions, memory, tensor cores.
ALU, FMA, XU, LSU, TENSOR, SCALAR = "alu", "fma", "xu", "lsu", "tensor", "scalar"


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        address: position in the code, ascending.
        op: mnemonic with its modifiers.
        operands: the rest of the line.
        kind: one of the kinds above.
        unit: one of the units above.
        width: bits per thread of a load or store, else 0.
        flops: multiplications and additions a warp does with it (tensor-core instructions), else 0.
        streaming: a load marked to be evicted first (weights and caches that are read once).
        target: address a branch goes to, or -1.
        ends: whether the program never goes on behind it (an exit or return without condition).
    """

    address: int
    op: str
    operands: str = field(repr=False)
    kind: str = OTHER
    unit: str = ALU
    width: int = 0
    flops: int = 0
    streaming: bool = False
    target: int = -1
    ends: bool = False


@dataclass(frozen=True)
class Code:
    """A kernel's instructions and what the assembler reports about it.

    Attributes:
        instructions: in order of address, without padding.
        registers: per thread.
        spilled_bytes: of stack per thread that the assembler spilled to.
        occupancy_note: resident warps per SIMD as AMD's assembler states them, or 0.
    """

    instructions: tuple[Instruction, ...]
    registers: int
    spilled_bytes: int
    occupancy_note: int = 0

    @property
    def spills(self) -> int:
        """Instructions that move a register to or from the stack."""
        return sum(i.kind == SPILL for i in self.instructions)

    def loops(self) -> list[tuple[Instruction, ...]]:
        """Bodies of all loops, shortest first: backward branches, but for those back from code behind the program's end
        (the slow path of a division, say).
        """
        spans = {(i.target, i.address) for i in self.instructions if i.kind == BRANCH and 0 <= i.target < i.address}
        bodies = [tuple(i for i in self.instructions if low <= i.address <= high) for low, high in spans]
        return sorted((body for body in bodies if not any(i.ends for i in body)), key=len)

    def hot_loop(self) -> tuple[Instruction, ...]:
        """The loop that does the work: of the innermost loops, the one with the most arithmetic on tensor cores, else
        the most loaded bytes, else the longest. Empty where there is no loop.

        A loop counts as innermost unless a shorter one inside it has half of what it is chosen for: waiting for an
        asynchronous copy is a loop of its own on some targets.
        """
        loops = self.loops()
        measures = (
            lambda body: sum(i.flops for i in body),
            lambda body: sum(i.width for i in body if i.kind in (LOAD, ASYNC_LOAD) and i.streaming),
            lambda body: sum(i.width for i in body if i.kind in (LOAD, ASYNC_LOAD)),
            len,
        )
        for measure in measures:
            sizes = [measure(body) for body in loops]
            if not any(sizes):
                continue
            innermost = [
                (size, index)
                for index, size in enumerate(sizes)
                if not any(0 < size <= 2 * sizes[n] and _inside(loops[n], loops[index]) for n in range(index))
            ]
            return loops[max(innermost)[1]]
        return ()


def _inside(inner: Sequence[Instruction], outer: Sequence[Instruction]) -> bool:
    low, high = outer[0].address, outer[-1].address
    return len(inner) < len(outer) and low <= inner[0].address and inner[-1].address <= high


def count(instructions: Sequence[Instruction], kind: str) -> int:
    return sum(i.kind == kind for i in instructions)


def widths(instructions: Sequence[Instruction], kind: str, *, streaming: bool | None = None) -> dict[int, int]:
    """How many loads (or stores) of each width there are, widest first."""
    found = Counter(i.width for i in instructions if i.kind == kind and (streaming is None or i.streaming == streaming))
    return dict(sorted(found.items(), reverse=True))


def mma_names(instructions: Sequence[Instruction]) -> dict[str, int]:
    """Tensor-core instructions by mnemonic."""
    return dict(Counter(i.op for i in instructions if i.kind == MMA))
