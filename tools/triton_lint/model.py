"""An estimate of a launch's time from its machine code: a model, not a measurement, and never checked on a GPU.

It serves to refuse bad code (as a gate in tests) and to leave a handful of configurations worth timing. Five bounds:

    issue    warp instructions of the busiest multiprocessor / what its schedulers start per clock
    unit     the same for the busiest kind of unit (integers and logic, fp32, slow functions, shared memory and L1)
    tensor   matrix arithmetic / what the tensor cores do per clock
    memory   bytes / (0.92 x bandwidth x min(1, bytes in flight / (bandwidth x latency)))
    latency  one memory latency

and the estimate is the largest. 0.92 is the share of the data sheet's bandwidth that plain copies reach. Left out: bank
conflicts, caches, dependencies between instructions, clock changes, the launch itself. What lies outside the hot loop
counts once per program.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from triton_lint import code
from triton_lint.chips import Chip
from triton_lint.code import Code, Instruction

REACHED_BANDWIDTH = 0.92


@dataclass(frozen=True)
class Work:
    """What one launch has to do, for all programs together.

    How often the hot loop runs follows from `steps`, else from `flops`, else from `stream_bytes`: a kernel with a loop
    needs one of them.

    Attributes:
        bytes: read from and written to memory at least once: the floor of the time is bytes / bandwidth.
        units: what instructions are counted per: weights, cached values, elements.
        flops: arithmetic of the tensor cores, padding of tiles included.
        steps: turns of the kernel's hot loop as it stands in the source, summed over all programs. (The assembler's
            unrolling is found by comparing with the PTX; on AMD it is taken to be 1.)
        stream_bytes: bytes that the hot loop loads with evict-first loads. Asynchronous copies do not carry the mark.
    """

    bytes: float = 0
    units: float = 0
    flops: float = 0
    steps: float = 0
    stream_bytes: float = 0


@dataclass(frozen=True)
class Estimate:
    """What the model says, times in seconds.

    Attributes:
        per_unit: thread instructions of the hot loop per unit of work.
        in_flight: bytes a multiprocessor has asked memory for at a time.
        bounds: the bounds by name.
        tensor_share: time of the tensor cores' part over the largest bound within a multiprocessor.
        time: the largest bound.
        floor: bytes / bandwidth.
    """

    per_unit: float
    in_flight: float
    bounds: dict[str, float]
    tensor_share: float
    time: float
    floor: float

    @property
    def over_floor(self) -> float:
        """Estimate divided by the floor."""
        return self.time / self.floor if self.floor else math.inf


def unit_clocks(instructions: Sequence[Instruction], chip: Chip) -> dict[str, float]:
    """Clocks of a multiprocessor that each kind of unit needs for one warp's instructions."""
    clocks = dict.fromkeys((code.ALU, code.FMA, code.XU, code.LSU), 0.0)
    for i in instructions:
        if i.unit == code.ALU:
            clocks[code.ALU] += chip.warp / chip.int_lanes
        elif i.unit == code.FMA:
            lanes = chip.int_lanes if i.op.startswith("IMAD") else chip.float_lanes
            clocks[code.FMA] += chip.warp / lanes
        elif i.unit == code.XU:
            clocks[code.XU] += chip.warp / 16
        elif i.unit == code.LSU:  # 128 bytes a clock between the L1 cache or shared memory and registers
            clocks[code.LSU] += max(1.0, chip.warp * i.width / 8 / 128)
    return clocks


def issued(instructions: Sequence[Instruction], chip: Chip) -> int:
    """Instructions that take an issue slot: on AMD scalar ones go beside the vector instructions of other waves."""
    if chip.scalar_beside:
        return sum(i.unit != code.SCALAR for i in instructions)
    return len(instructions)


def in_flight(body: Sequence[Instruction], stages: int) -> int:
    """Bytes a thread has asked for and not yet waited for, at most, in one turn of a loop.

    A plain load waits where one of its registers is read (the loop is walked twice, so that loads used in the next turn
    count); asynchronous copies run `stages` - 1 turns ahead.
    """
    most = 0
    waiting: list[tuple[set[int], int]] = []
    for i in [*body, *body]:
        result, _, sources = i.operands.partition(",")
        if waiting:
            stores = i.kind in (code.STORE, code.SHARED_STORE, code.ATOMIC, code.BRANCH)
            read = _registers(i.operands if stores else sources)
            waiting = [(registers, bits) for registers, bits in waiting if not registers & read]
        if i.kind == code.LOAD:
            first = min(_registers(result), default=None)
            if first is not None:
                registers = set(range(first, first + max(1, i.width // 32)))
                waiting = [(others, bits) for others, bits in waiting if not others & registers]
                waiting.append((registers, i.width))
                most = max(most, sum(bits for _, bits in waiting))
    ahead = sum(i.width for i in body if i.kind == code.ASYNC_LOAD) * max(1, stages - 1)
    return (most + ahead) // 8


def _registers(operands: str) -> set[int]:
    """Vector registers named in operands: R12 (NVIDIA, where wider ones are named by their first), v3, v[4:7] (AMD)."""
    found = {int(number) for number in re.findall(r"\b[Rv](\d+)\b", operands)}
    for low, high in re.findall(r"\bv\[(\d+):(\d+)\]", operands):
        found.update(range(int(low), int(high) + 1))
    return found


def turns(body: Sequence[Instruction], work: Work, threads: int, warps: int, unroll: int) -> float:
    """Turns of the machine code's hot loop, all programs together.

    Raises:
        ValueError: nothing in `work` tells.
    """
    if work.steps:
        return work.steps / unroll
    flops = warps * sum(i.flops for i in body)
    if work.flops and flops:
        return work.flops / flops
    stream = threads * sum(i.width for i in body if i.kind in (code.LOAD, code.ASYNC_LOAD) and i.streaming) / 8
    if work.stream_bytes and stream:
        return work.stream_bytes / stream
    raise ValueError(
        f"how often the hot loop runs cannot be told from {work}: give steps (a turn of the loop has {flops} flops of "
        f"known shape and {stream:.0f} evict-first bytes)"
    )


def estimate(
    machine: Code,
    body: Sequence[Instruction],
    work: Work,
    chip: Chip,
    *,
    programs: int,
    warps: int,
    resident: int,
    stages: int,
    unroll: int,
) -> Estimate:
    """The model; see the module.

    Args:
        machine: the kernel.
        body: its hot loop, or () for a kernel without one.
        work: of the whole launch.
        chip: the GPU.
        programs: of the launch.
        warps: of a program.
        resident: programs a multiprocessor can hold.
        stages: of the software pipeline.
        unroll: turns of the source's hot loop in one of `body`.

    Raises:
        ValueError: there is a hot loop and nothing says how often it runs.
    """
    inside = {i.address for i in body}
    outside = [i for i in machine.instructions if i.address not in inside]
    each = turns(body, work, warps * chip.warp, warps, unroll) / programs if body else 0.0
    busiest = math.ceil(programs / chip.units)  # programs on the busiest multiprocessor

    def per_program(of_body: float, of_rest: float) -> float:
        return warps * (of_body * each + of_rest)

    start = busiest * per_program(issued(body, chip), issued(outside, chip)) / (chip.issue * chip.clock)
    clocks_body, clocks_rest = unit_clocks(body, chip), unit_clocks(outside, chip)
    units = {unit: busiest * per_program(clocks_body[unit], clocks_rest[unit]) / chip.clock for unit in clocks_body}
    names = [i.op for i in machine.instructions if i.kind == code.MMA]
    warp_level = any(name.startswith(("HMMA", "IMMA", "QMMA")) for name in names)
    rate = chip.tensor * (chip.tensor_warp_level if warp_level else 1.0)
    if any(name.startswith(("IMMA", "IGMMA")) or "i8" in name or "iu8" in name for name in names):
        rate *= chip.tensor_int8
    elif any(name.startswith(("QMMA", "QGMMA", "UTCQMMA")) or "fp8" in name for name in names):
        rate *= chip.tensor_fp8
    tensor = work.flops / programs * busiest / (rate * chip.clock)
    held = min(resident, busiest) if resident else 1
    # Without a loop every load of the kernel may be on its way at once.
    asked = held * warps * chip.warp * in_flight(body or machine.instructions, stages)
    everywhere = asked * min(programs, chip.units)
    reached = REACHED_BANDWIDTH * min(1.0, everywhere / (chip.bandwidth * chip.latency)) if asked else REACHED_BANDWIDTH
    memory = work.bytes / (chip.bandwidth * reached)
    bounds = {"issue": start, "unit": max(units.values()), "tensor": tensor, "memory": memory, "latency": chip.latency}
    inner = max(start, max(units.values()), tensor)
    per_unit = 0.0
    if work.units:
        per_unit = (
            chip.warp * warps * (issued(body, chip) * each if body else issued(outside, chip)) * programs / work.units
        )
    return Estimate(
        per_unit, asked, bounds, tensor / inner if inner else 0.0, max(bounds.values()), work.bytes / chip.bandwidth
    )
