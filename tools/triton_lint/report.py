"""One kernel's machine code in a few numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

from triton_lint import amdgcn, code, ptx, sass
from triton_lint.chips import CHIPS, Chip
from triton_lint.code import Code, Instruction
from triton_lint.driver import Launch
from triton_lint.model import Estimate, Work, estimate


@dataclass(frozen=True)
class Report:
    """What the lint says about a compiled launch.

    Attributes:
        launch: what was compiled.
        code: its machine code.
        hot: the loop that does the work (see Code.hot_loop); () without one.
        registers: per thread.
        spills: instructions that move registers to or from the stack.
        shared: bytes of shared memory per program.
        resident: programs a multiprocessor holds at once.
        occupancy: resident warps over the most it can hold.
        fits: shared memory and registers are within the target's limits.
        loads: {bits per thread: count} of global loads in the hot loop (the whole kernel without one).
        stream_loads: those of them marked evict-first.
        async_loads: the same for copies to shared memory.
        mma: tensor-core instructions of the whole kernel by mnemonic.
        counts: of the hot loop by kind (see code.py).
        estimate: the model's, or None where no work was given.
    """

    launch: Launch
    code: Code = field(repr=False)
    hot: tuple[Instruction, ...] = field(repr=False)
    registers: int
    spills: int
    shared: int
    resident: int
    occupancy: float
    fits: bool
    loads: dict[int, int]
    stream_loads: dict[int, int]
    async_loads: dict[int, int]
    mma: dict[str, int]
    counts: dict[str, int]
    estimate: Estimate | None

    def has_mma(self, *starts: str) -> bool:
        """Whether there is a tensor-core instruction, of one of these kinds ("HGMMA", "v_mfma") if any are named."""
        return any(not starts or name.startswith(starts) for name in self.mma)

    def __str__(self) -> str:
        launch = self.launch
        text = (
            f"{launch.arch:8} {launch.kernel:28} {launch.num_warps}w {launch.num_stages}s {self.registers:3} regs "
            f"{self.spills:3} spills {self.shared:6} B shared {self.occupancy:4.0%} ({self.resident}) "
            f"loads {_widths(self.loads)}"
        )
        if self.async_loads:
            text += f" async {_widths(self.async_loads)}"
        shuffles, shared = self.counts.get(code.SHUFFLE, 0), self.counts.get(code.SHARED_LOAD, 0)
        text += f" | loop {len(self.hot)}: {shuffles} shfl {shared}/{self.counts.get(code.SHARED_STORE, 0)} lds/sts"
        text += f" {self.counts.get(code.MMA, 0)} mma"
        if self.mma:
            text += f" ({', '.join(sorted(self.mma))})"
        if self.estimate:
            e = self.estimate
            bounds = " ".join(f"{name} {seconds * 1e6:.2f}" for name, seconds in e.bounds.items())
            text += (
                f" | model: {e.per_unit:.2f} instr/unit, {bounds} us -> {e.time * 1e6:.2f} us = "
                f"{e.over_floor:.2f} x floor, tensor share {e.tensor_share:.0%}"
            )
        return text if self.fits else f"{text} DOES NOT FIT"


def _widths(counts: dict[int, int]) -> str:
    return "+".join(f"{number}x{bits}" for bits, number in counts.items()) or "none"


def occupancy(chip: Chip, registers: int, shared: int, warps: int) -> int:
    """Programs a multiprocessor can hold at once: 0 where one is too much."""
    if shared > chip.shared_program:
        return 0
    if chip.simds:
        given = -(-max(registers, 1) // chip.granule) * chip.granule
        per_simd = min(chip.warps // chip.simds, chip.registers // given)
        by_shared = chip.shared // shared if shared else chip.programs
        return min(per_simd * chip.simds // warps, by_shared, chip.programs)
    per_warp = -(-registers * 32 // chip.granule) * chip.granule
    by_registers = chip.registers // per_warp // warps
    by_shared = chip.shared // (-(-(shared + 1024) // 128) * 128)  # 1 KB of each program's is the system's
    return min(by_registers, by_shared, chip.warps // warps, chip.programs)


def report(launch: Launch, work: Work | None = None) -> Report:
    """Disassemble a compiled launch and count.

    Args:
        launch: from compile_for.
        work: what the launch has to do, for the model's estimate; None leaves it out.
    """
    chip = CHIPS[launch.arch]
    asm = launch.compiled.asm
    machine = sass.read(asm["cubin"]) if launch.arch.startswith("sm_") else amdgcn.read(asm["amdgcn"])
    shared = int(launch.compiled.metadata.shared)
    warps, stages = launch.num_warps, launch.num_stages
    resident = occupancy(chip, machine.registers, shared, warps)
    most = chip.warps
    hot = machine.hot_loop()
    body = hot or machine.instructions
    kinds = {i.kind for i in body}
    guess = None
    if work is not None:
        guess = estimate(
            machine,
            hot,
            work,
            chip,
            programs=launch.programs,
            warps=warps,
            resident=resident,
            stages=stages,
            unroll=ptx.unroll(asm["ptx"], hot) if "ptx" in asm and hot else 1,
        )
    return Report(
        launch=launch,
        code=machine,
        hot=hot,
        registers=machine.registers,
        spills=machine.spills or machine.spilled_bytes // 4,
        shared=shared,
        resident=resident,
        occupancy=resident * warps / most,
        fits=resident > 0,
        loads=code.widths(body, code.LOAD),
        stream_loads=code.widths(body, code.LOAD, streaming=True),
        async_loads=code.widths(body, code.ASYNC_LOAD),
        mma=code.mma_names(machine.instructions),
        counts={kind: code.count(body, kind) for kind in sorted(kinds)},
        estimate=guess,
    )
