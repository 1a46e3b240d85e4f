"""Compile Triton kernels for any GPU without one, and read their machine code.

    from triton_lint import Work, compile_for, report

    with compile_for("sm_90") as launches:        # from here on a launch compiles and runs nothing
        matmul(x, weight)                         # a launcher as it is, on tensors of device "meta" or "cpu"
    for launch in launches:
        print(report(launch, Work(bytes=..., stream_bytes=..., units=...)))

`compile_for` puts a stand-in driver in place and turns every kernel launch into a compilation with the same arguments,
so alignment and constants are specialised as they are on a GPU. `report` disassembles the result: registers, spills,
shared memory, occupancy, widths of loads, tensor-core instructions, instruction counts of the hot loop, and, given the
work of the launch, a model's estimate of its time (see `model`; never measured on a GPU).

TRITON_INTERPRET must not be set: compile and interpret in separate processes.
"""

from triton_lint.chips import CHIPS, TARGETS, Chip
from triton_lint.driver import Launch, compile_for
from triton_lint.model import Estimate, Work
from triton_lint.report import Report, report

__all__ = ["CHIPS", "TARGETS", "Chip", "Estimate", "Launch", "Report", "Work", "compile_for", "report"]
