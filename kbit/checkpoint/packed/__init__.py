"""Weights that other quantizers have packed: a file for each of them, one way to read them all (`weight.py`)."""

from __future__ import annotations

# quant_method -> the module of this package that reads it. Imported when it is needed: it brings numpy in.
READERS = {
    "gptq": "gptq",
    "awq": "awq",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed_tensors",
    "mlx": "mlx",
    "hqq": "hqq",
    "fbgemm_fp8": "nvidia",
    "modelopt": "nvidia",
    "torchao": "torchao",
    "quanto": "quanto",
    "bitnet": "bitnet",
}
