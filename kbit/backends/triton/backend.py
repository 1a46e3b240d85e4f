"""TritonBackend: models on Triton kernels, on a GPU (or, for tests, in Triton's interpreter)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton

from kbit.backends.triton.kv_cache import TritonPages
from kbit.backends.triton.shared import SharedMatrices
from kbit.backends.triton.states import TritonStates
from kbit.backends.triton.weight import TritonMatrix
from kbit.formats.quant_tensor import QuantTensor
from kbit.graph.backend import Definition, Group
from kbit.graph.cache import Cache, check_size
from kbit.graph.pages import PagePool, PerLayer, pages_for
from kbit.graph.states import StateSpec
from kbit.host.errors import UnsupportedError
from kbit.kernels.triton.codecs.layout import prepare_weight
from kbit.kernels.triton.product.limits import ROUNDED_TOKENS
from kbit.kernels.triton.product.rounded import KINDS, check_arch
from kbit.kernels.triton.target import active, current_arch

if TYPE_CHECKING:
    from kbit.backends.triton.runner import TritonRunner

# The type of what is not rounded further, by compute.
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float16, "fp8": torch.float16}

FLOAT_KINDS = ("fp16", "bf16")  # of caches


class TritonBackend:
    """Runs models on the Triton kernels.

    Between token ids and logits everything runs on the device. Products take half precision and sum in float32, as does
    attention; the residual stream and the logits are float32.

    Args:
        device: a CUDA device (ROCm's are called so too); "cpu" only where Triton interprets (TRITON_INTERPRET=1).
        compute: what activations and decoded weights are rounded to before they are multiplied. "fp16"; "bf16", which
            has the range of float32, for models whose activations leave that of fp16 (65504); "int8" or "fp8", which
            round both to 8 bits in the layers' products of more than ROUNDED_TOKENS tokens (prompts, large batches)
            and are "fp16" otherwise: the head, float weights, fewer tokens. They cost accuracy, see
            `kbit.kernels.triton.product.gemm_rounded`.
        kv: what keys and values are stored as: "16" (fp16, or bf16 with it), or bits of codes, "8", "4", "3" or "2";
            "8,4" where those of keys and values differ. Codes are those of `reference.quantize_kv`: of equal steps at 4
            bits too, and of keys with the bias that all keys may have (Qwen2's do), which the native backend leaves
            out and puts back. Such models want 8 bits for keys here.
        graphs: replay decoding as a CUDA graph; None: on a GPU, unless there is a group.
        group: the processes that share a model, if several do (`kbit.graph.backend.SplitBackend`).

    Raises:
        UnsupportedError: no such GPU, one that cannot compute like this, or graphs with a group. A model with a format
            that "int8" or "fp8" does not take is refused by `bind`.
    """

    name = "triton"
    keeps_latents = False

    def __init__(
        self,
        device: str | torch.device = "cuda",
        *,
        compute: str = "fp16",
        kv: str = "16",
        graphs: bool | None = None,
        group: Group | None = None,
    ) -> None:
        self.device = torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise UnsupportedError(
                "--device cuda: torch sees no GPU. Is there one, and is this torch a CUDA or ROCm build? Otherwise use "
                "--device cpu"
            )
        if self.device.type != "cuda" and not triton.knobs.runtime.interpret:
            raise UnsupportedError(f"the Triton backend runs on GPUs, not on {self.device}")
        self.compute = compute
        self.dtype = DTYPES[compute]
        self.kv = ("bf16" if compute == "bf16" else "fp16") if kv == "16" else kv
        self.activations = compute if compute in KINDS else ""
        if self.activations:
            with active(self.device):
                check_arch(self.activations, current_arch())
        if graphs and group is not None:
            raise UnsupportedError("CUDA graphs do not hold the sums over several processes: leave graphs off")
        # Capturing a collective needs all processes to capture at once, and nccl's watchdog, a thread of its own, to
        # make no call that a capture forbids meanwhile. Nobody has tried this here on GPUs: until then, no graphs.
        self.graphs = (self.device.type == "cuda" and group is None) if graphs is None else graphs
        self.group = group
        self._shared: dict[str, SharedMatrices] = {}

    def describe(self) -> str:
        where = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "Triton's interpreter"
        kv = f"{self.kv}-bit" if self.kv not in FLOAT_KINDS else self.kv
        how = ", CUDA graphs" if self.graphs else "" if self.group is None else f", {self.group.size} processes"
        many = f" for more than {ROUNDED_TOKENS} tokens at once, else fp16" if self.activations else ""
        return f"triton: {where}, {self.compute} compute{many}, {kv} KV cache{how}"

    def split(self, group: Group) -> TritonBackend:
        here = torch.device("cuda", torch.cuda.current_device()) if self.device.type == "cuda" else self.device
        kv = "16" if self.kv in FLOAT_KINDS else self.kv
        return TritonBackend(here, compute=self.compute, kv=kv, group=group)

    def prepare(self, weight: torch.Tensor | QuantTensor, *, lookup: bool = False) -> TritonMatrix:
        # Rearranged where it will live: sorting bits is quick on a GPU.
        return TritonMatrix(prepare_weight(weight.to(self.device), self.device, self.dtype))

    def shared(self, model: str) -> SharedMatrices:
        return self._shared.setdefault(model, SharedMatrices(self.prepare, self.device, self.dtype))

    def prepare_vector(self, vector: torch.Tensor) -> torch.Tensor:
        return vector.to(self.device, torch.float32).contiguous()

    def new_pool(
        self, layers: int, kv_heads: PerLayer, head_dim: PerLayer, pages: int, *, latent: bool = False
    ) -> PagePool:
        if latent:
            raise UnsupportedError("the triton backend keeps the keys and values of every head, and no latent vectors")
        k_kind, _, v_kind = self.kv.partition(",")
        return PagePool(
            TritonPages(layers, kv_heads, head_dim, pages, k_kind=k_kind, v_kind=v_kind or k_kind, device=self.device)
        )

    def new_states(self, specs: Sequence[StateSpec], slots: int) -> PagePool:
        return PagePool(TritonStates(specs, slots, self.device))

    def new_cache(
        self, layers: int, batch: int, kv_heads: PerLayer, head_dim: PerLayer, capacity: int, *, latent: bool = False
    ) -> Cache:
        check_size(batch, capacity)
        return Cache.alone(self.new_pool(layers, kv_heads, head_dim, batch * pages_for(capacity)), batch, capacity)

    def bind(self, definition: Definition) -> TritonRunner:
        from kbit.backends.triton.runner import TritonRunner

        return TritonRunner(
            definition, self.device, self.dtype, graphs=self.graphs, group=self.group, activations=self.activations
        )
