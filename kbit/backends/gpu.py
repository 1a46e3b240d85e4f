"""What GPU there is, for reports: as the driver tells it, so that asking imports no torch and touches no GPU."""

from __future__ import annotations

import subprocess
from functools import lru_cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

from kbit.kernels.triton.product import limits
from kbit.kernels.triton.product.limits import DECODE_TOKENS, GEMV_TOKENS, ROUNDED_TOKENS

NVIDIA = Path("/proc/driver/nvidia/gpus")
AMD = Path("/sys/class/kfd/kfd/topology/nodes")
DEVICES = Path("/dev")
NVIDIA_VERSION, AMD_VERSION = Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version")


def gpu_summary(nvidia: Path = NVIDIA, amd: Path = AMD, devices: Path = DEVICES) -> str | None:
    """Names of the GPUs that the drivers list, or None where there are none or Triton is not installed.

    Args:
        nvidia: the driver's folder, a folder with a file `information` per GPU.
        amd: likewise, a folder with a file `name` per node; processors are nodes without a name.
        devices: where a sandbox that hides the driver's folder shows the GPUs themselves, as nvidia0 and so on.
    """
    if find_spec("triton") is None:
        return None
    names = []
    for file in sorted(nvidia.glob("*/information")):
        lines = dict(line.split(":", 1) for line in _text(file).splitlines() if ":" in line)
        names.append(lines.get("Model", "NVIDIA GPU").strip())
    if not names:
        names = ["NVIDIA GPU" for node in sorted(devices.glob("nvidia[0-9]*"))]
    names += [name for file in sorted(amd.glob("*/name")) if (name := _text(file).strip())]
    return ", ".join(names) or None


def driver_version() -> str:
    """The kernel driver's, as it says it; "" where nothing does. Touches no GPU."""
    for file in (NVIDIA_VERSION, AMD_VERSION):
        try:
            line = file.read_text(errors="replace").splitlines()[0]
        except (OSError, IndexError):
            continue
        words = [word for word in line.split() if word[:1].isdigit() and "." in word]
        return words[0] if words else line.strip()
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return said.strip().splitlines()[0] if said.strip() else ""


@lru_cache(maxsize=1)
def kernels_hash() -> str:
    """sha256 of the Triton kernels' sources: other kernels have other best configurations, and other errors."""
    digest = sha256()
    for path in sorted(Path(limits.__file__).parents[1].rglob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def gpu_kernels(float_weights: bool) -> dict[str, str]:
    """Which kernel of kbit.kernels.triton runs what of a model on a GPU.

    Args:
        float_weights: the model has matrices that are not quantized.
    """
    kernels = {
        "embedding": "embed",
        "norms": "rms_norm",
        f"products, up to {GEMV_TOKENS} tokens": "gemv",
        f"products, more than {GEMV_TOKENS} tokens": "gemm",
        f"the layers', more than {ROUNDED_TOKENS} tokens, --compute int8": "gemm_rounded",
        f"the layers', more than {ROUNDED_TOKENS} tokens, --compute fp8": "gemm_rounded",
        "rotation and cache": "kv_append",
        f"attention, up to {DECODE_TOKENS} new tokens a row": "attention_decode",
        "attention, otherwise": "attention_prefill",
        "activation": "in gemv and gemm; activate where gate and up have biases, or there is no gate",
    }
    if float_weights:
        kernels["float weights"] = "torch.matmul"
    return kernels


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
