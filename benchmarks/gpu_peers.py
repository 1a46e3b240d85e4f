"""Other libraries' products of quantized weights, as far as they are installed: each a maker of layers.

A maker takes a weight (N, K) fp16 on the GPU and gives a layer: x (M, K) fp16 -> (M, N), and the bytes it reads. Each
library's interface is used as its documentation has it; where it has changed, its error is what the report says.
None of these has run here, for want of a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

GROUP = 128  # weights that share a scale: what all of these support


class Layer(NamedTuple):
    """A peer's prepared product.

    Attributes:
        run: x (M, K) -> (M, N).
        nbytes: of the weight, scales included.
        dtype: of the activations it takes.
    """

    run: Callable[[torch.Tensor], torch.Tensor]
    nbytes: int
    dtype: torch.dtype = torch.float16


class Peer(NamedTuple):
    """A library's product.

    Attributes:
        engine: its name.
        name: with what it does.
        package: that is imported.
        install: how to get it.
        make: weight (N, K) fp16 -> layer.
    """

    engine: str
    name: str
    package: str
    install: str
    make: Callable[[torch.Tensor], Layer]


def torch_fp16(weight: torch.Tensor) -> Layer:
    weight = weight.clone()  # a copy of its own, as every layer has
    return Layer(lambda x: x @ weight.T, _bytes(weight))


def torch_int4(weight: torch.Tensor) -> Layer:
    """torch's own int4 product ("tinygemm"), in bf16."""
    codes, scales, zeros = _quantize(weight)
    packed = torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), 8)
    # It multiplies (code - 8) scale + zero.
    zeros = (8 - zeros) * scales
    both = torch.stack([scales, zeros], dim=-1).transpose(0, 1).contiguous().bfloat16()  # (K / GROUP, N, 2)

    def run(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, both)
        return result

    return Layer(run, _bytes(packed, both), torch.bfloat16)


def bitsandbytes_nf4(weight: torch.Tensor) -> Layer:
    import bitsandbytes as bnb
    import bitsandbytes.functional as F

    packed, state = F.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    return Layer(lambda x: bnb.matmul_4bit(x, packed.t(), quant_state=state), _bytes(packed, state.absmax))


def bitsandbytes_int8(weight: torch.Tensor) -> Layer:
    """Its activations are 8 bits wide too."""
    import bitsandbytes as bnb

    linear = bnb.nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False)
    linear.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    linear = linear.to(weight.device)
    return Layer(linear, weight.numel())


def gemlite(weight: torch.Tensor) -> Layer:
    from gemlite.core import DType, GemLiteLinearTriton

    codes, scales, zeros = _quantize(weight)
    rows, columns = weight.shape
    types = {"input_dtype": DType.FP16, "output_dtype": DType.FP16}
    linear = GemLiteLinearTriton(4, group_size=GROUP, in_features=columns, out_features=rows, **types)
    linear.pack(codes, scales.reshape(-1, 1).half(), zeros.reshape(-1, 1).half(), None)
    return Layer(linear, weight.numel() // 2 + 4 * scales.numel())


def hqq(weight: torch.Tensor) -> Layer:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    linear = HQQLinear(_linear(weight), quant_config=config, compute_dtype=torch.float16, device=str(weight.device))
    return Layer(linear, weight.numel() // 2 + weight.numel() // 64 * 4)


def torchao_int4(weight: torch.Tensor) -> Layer:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    linear = _linear(weight.bfloat16())
    quantize_(linear, Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d"))
    return Layer(linear, weight.numel() // 2 + weight.numel() // GROUP * 4, torch.bfloat16)


def torchao_int8(weight: torch.Tensor) -> Layer:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    linear = _linear(weight.bfloat16())
    quantize_(linear, Int8WeightOnlyConfig())
    return Layer(linear, weight.numel() + 2 * weight.shape[0], torch.bfloat16)


def vllm_marlin(weight: torch.Tensor) -> Layer:
    from vllm.model_executor.layers.quantization.utils import marlin_utils
    from vllm.model_executor.layers.quantization.utils.marlin_utils_test import marlin_quantize
    from vllm.scalar_type import scalar_types

    kind = scalar_types.uint4b8
    columns, rows = weight.shape[1], weight.shape[0]
    _, packed, scales, order, sort, _ = marlin_quantize(weight.T.contiguous(), kind, GROUP, False)
    workspace = marlin_utils.marlin_make_workspace_new(weight.device)
    zeros = marlin_utils.marlin_make_empty_g_idx(weight.device)

    def run(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = marlin_utils.apply_gptq_marlin_linear(
            x, packed, scales, zeros, order, sort, workspace, kind, rows, columns, True
        )
        return result

    return Layer(run, _bytes(packed, scales))


PEERS = (
    Peer("torch", "torch fp16", "torch", "", torch_fp16),
    Peer("torch", "torch int4 (tinygemm)", "torch", "", torch_int4),
    Peer("bitsandbytes", "bitsandbytes nf4", "bitsandbytes", "pip install bitsandbytes", bitsandbytes_nf4),
    Peer("bitsandbytes", "bitsandbytes int8", "bitsandbytes", "pip install bitsandbytes", bitsandbytes_int8),
    Peer("gemlite", "gemlite int4", "gemlite", "pip install gemlite", gemlite),
    Peer("HQQ", "HQQ int4", "hqq", "pip install hqq", hqq),
    Peer("torchao", "torchao int4", "torchao", "pip install torchao", torchao_int4),
    Peer("torchao", "torchao int8", "torchao", "pip install torchao", torchao_int8),
    Peer("vLLM", "vLLM Marlin int4", "vllm", "pip install vllm", vllm_marlin),
)


def absent(peer: Peer) -> str | None:
    """Why a peer cannot take part, if its package is not installed."""
    if find_spec(peer.package) is None:
        return f"{peer.name}: not installed; to install it: {peer.install}"
    return None


def _quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes uint8 (N, K) of 4 bits, and per group of GROUP scales and zero points (N, K / GROUP): w is about
    (code - zero) scale."""
    groups = weight.float().unflatten(-1, (-1, GROUP))
    low, high = groups.amin(-1), groups.amax(-1)
    scales = ((high - low) / 15).clamp(min=1e-8)
    zeros = (-low / scales).round().clamp(0, 15)
    codes = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 15).to(torch.uint8)
    return codes.flatten(-2), scales, zeros


def _linear(weight: torch.Tensor) -> Any:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype, device=weight.device)
    linear.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    return linear


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
