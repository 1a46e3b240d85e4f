"""What the model knows about GPUs: limits of a multiprocessor, and speeds of one chip of each architecture.

Limits: NVIDIA's CUDA C++ programming guide (compute capabilities) and AMD's LLVM AMDGPU backend documentation and ISA
guides. Speeds: the vendors' data sheets (boost clocks). Latencies are round numbers of the size that published
microbenchmarks find (H100: 600 to 700 ns from HBM); they are assumptions of the model.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """A GPU.

    Attributes:
        name: the product the speeds belong to.
        warp: threads of a warp (wavefront).
        units: multiprocessors (compute units).
        clock: Hz.
        bandwidth: memory, bytes/s.
        latency: of a load that misses the caches, seconds.
        issue: warp instructions a multiprocessor starts per clock (AMD: vector instructions).
        int_lanes: 32-bit integer and logic results per clock of a multiprocessor.
        float_lanes: fp32 results (fused multiply-adds) per clock.
        tensor: fp16 multiply-add operations times two, dense with fp32 accumulation, per clock of a multiprocessor.
        tensor_warp_level: share of `tensor` that warp-level instructions (HMMA) reach, where larger ones exist.
        tensor_int8: int8 operations per clock over `tensor`.
        tensor_fp8: fp8 operations (fp32 accumulation) per clock over `tensor`, or 0 without them.
        registers: 32-bit registers per multiprocessor (AMD: per lane of a SIMD).
        granule: registers are given out in multiples of this many (NVIDIA: per warp; AMD: per lane).
        shared: shared memory per multiprocessor, bytes.
        shared_program: shared memory one program may use, bytes.
        warps: resident warps per multiprocessor.
        programs: resident programs per multiprocessor.
        simds: SIMDs that share the multiprocessor's warps evenly (AMD), or 0 where registers are one pool (NVIDIA).
    """

    name: str
    warp: int
    units: int
    clock: float
    bandwidth: float
    latency: float
    issue: float
    int_lanes: int
    float_lanes: int
    tensor: int
    tensor_warp_level: float
    tensor_int8: float
    tensor_fp8: float
    registers: int
    granule: int
    shared: int
    shared_program: int
    warps: int
    programs: int
    simds: int

    @property
    def scalar_beside(self) -> bool:
        """Whether scalar instructions take no slot of the vector instructions (AMD)."""
        return self.simds > 0


def _nvidia(
    name: str,
    units: int,
    clock: float,
    bandwidth: float,
    *,
    latency: float,
    floats: int,
    ints: int,
    tensor: int,
    shared: int,
    warps: int,
    programs: int,
    warp_level: float = 1.0,
    int8: float = 2.0,
    fp8: float = 2.0,
) -> Chip:
    # 1 KB of every program's shared memory is the system's; a program may use all but that.
    limit = (shared - 1) * 1024
    return Chip(
        name, 32, units, clock, bandwidth, latency, 4, ints, floats, tensor, warp_level, int8, fp8,
        65536, 256, shared * 1024, limit, warps, programs, 0,
    )  # fmt: skip


def _amd(
    name: str, units: int, clock: float, bandwidth: float, *, cdna: bool, tensor: int, registers: int, granule: int,
    int8: float = 2.0, fp8: float = 0.0,
) -> Chip:  # fmt: skip
    # A CDNA unit has four SIMDs of 16 lanes, of which each starts a vector instruction (64 lanes) every 4 clocks; half
    # of an RDNA work-group processor has two SIMDs of 32 lanes.
    return Chip(
        name, 64 if cdna else 32, units, clock, bandwidth, 800e-9 if cdna else 600e-9, 1 if cdna else 2, 64, 64,
        tensor, 1.0, int8, fp8, registers, granule, 65536, 65536, 32, 32, 4 if cdna else 2,
    )  # fmt: skip


CHIPS = {
    "sm_80": _nvidia("A100 80GB SXM", 108, 1.41e9, 2.039e12, latency=600e-9, floats=64, ints=64, tensor=2048,
                     shared=164, warps=64, programs=32, fp8=0),
    # GeForce cards sum fp16 products in float32 at half the rate, int8 ones at the full rate: four times as many (white
    # papers of GA102, Ada and RTX Blackwell: 71 and 284, 165 and 661, 210 and 838 TFLOPS and TOPS).
    "sm_86": _nvidia("RTX 3090", 82, 1.695e9, 936e9, latency=550e-9, floats=128, ints=64, tensor=512,
                     shared=100, warps=48, programs=16, int8=4, fp8=0),
    "sm_89": _nvidia("RTX 4090", 128, 2.52e9, 1008e9, latency=550e-9, floats=128, ints=64, tensor=512,
                     shared=100, warps=48, programs=24, int8=4),
    # HMMA reaches about 63 % of the peak that HGMMA has (Luo et al. 2024, "Dissecting the Hopper GPU").
    "sm_90": _nvidia("H100 SXM", 132, 1.755e9, 3.35e12, latency=650e-9, floats=128, ints=64, tensor=4096,
                     shared=228, warps=64, programs=32, warp_level=0.63),
    "sm_100": _nvidia("B200", 148, 1.85e9, 8.0e12, latency=750e-9, floats=128, ints=64, tensor=8192,
                      shared=228, warps=64, programs=32, warp_level=0.25),
    "sm_120": _nvidia("RTX 5090", 170, 2.41e9, 1792e9, latency=600e-9, floats=128, ints=128, tensor=512,
                      shared=100, warps=48, programs=24, int8=4),
    "gfx90a": _amd("MI250X (one die)", 110, 1.7e9, 1.6e12, cdna=True, tensor=1024, registers=512, granule=8,
                   int8=1),
    "gfx942": _amd("MI300X", 304, 2.1e9, 5.3e12, cdna=True, tensor=2048, registers=512, granule=8,
                   fp8=2),
    "gfx1100": _amd("RX 7900 XTX", 96, 2.5e9, 960e9, cdna=False, tensor=512, registers=1536, granule=24,
                    int8=1),
    "gfx1201": _amd("RX 9070 XT", 64, 2.97e9, 640e9, cdna=False, tensor=1024, registers=1536,
                    granule=24, fp8=2),
}  # fmt: skip

TARGETS = tuple(CHIPS)
