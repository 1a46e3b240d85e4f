"""LoRA adapters of PEFT on k-bit layers: `config = with_kbit(LoraConfig(...))`, then PEFT as always (QLoRA)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from kbit.host.errors import KbitError, UnsupportedError
from kbit.modules.linear import KbitLinear
from kbit.modules.packed import PackedMatrix

try:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import check_adapters_to_merge
except ModuleNotFoundError:
    raise UnsupportedError(
        "kbit.transformers.lora needs PEFT, which this Python has not: pip install 'peft>=0.21'"
    ) from None

C = TypeVar("C")


def with_kbit(config: C) -> C:
    """Tells PEFT of k-bit layers; also of a configuration that was read from an adapter's folder.

    Args:
        config: a `peft.LoraConfig`.

    Returns:
        The same.
    """
    config._register_custom_module({KbitLinear: KbitLoraLinear})  # type: ignore[attr-defined]  # (PEFT's public way)
    return config


class KbitLoraLinear(nn.Module, LoraLayer):  # type: ignore[misc]  # (PEFT has no types)
    """A k-bit layer with adapters, as PEFT's own layers are; PEFT makes it.

    What merging adds is rounded to the layer's format, so it can be lost where a rounding step is larger; unmerging
    gives the layer from before, bit for bit. To merge exactly, put plain layers there first:
    `kbit.transformers.dequantize_`.
    """

    # (Of `LoraLayer`.)
    base_layer: Any
    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    scaling: Any
    merged_adapters: list[str]
    active_adapters: Any
    update_layer: Any
    _check_forward_args: Any
    _cast_input_dtype: Any

    def __init__(
        self, base_layer: KbitLinear, adapter_name: str, config: Any, r: int = 0, lora_alpha: int = 1, **kwargs: Any
    ) -> None:
        if config.lora_bias:
            raise UnsupportedError("LoRA with lora_bias=True is not supported on k-bit layers: set it to False")
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.fan_in_fan_out = False
        self._active_adapter = adapter_name
        self._whole: nn.Module | None = None  # the layer from before merging
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to the weight.

        Args:
            safe_merge: refuse weights that are no numbers.
            adapter_names: which; None: all active ones.

        Raises:
            KbitError: such weights.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) or () if name in self.lora_A]
        if not names:
            return
        if self._whole is None:
            self._whole = self.base_layer
        base = self.base_layer
        delta = torch.stack([self.get_delta_weight(name) for name in names]).sum(dim=0)
        weight = base.dequantize() if isinstance(base, KbitLinear) else base.weight.detach().float()
        merged = weight + delta.to(weight.device)
        if safe_merge and not bool(torch.isfinite(merged).all()):
            raise KbitError(
                f"merging {', '.join(names)}: the weights would hold NaN or infinity: the adapter is broken"
            )
        self.base_layer = _with_weight(base, merged)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Puts the layer from before all merging back."""
        if self._whole is not None:
            self.base_layer, self._whole = self._whole, None
            self.merged_adapters.clear()

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What an adapter adds to the weight: float32 (N, K)."""
        up, down = (side[adapter].weight.detach().float() for side in (self.lora_B, self.lora_A))
        delta: torch.Tensor = up @ down * self.scaling[adapter]
        return delta

    def forward(self, x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        self._check_forward_args(x, *arguments, **options)
        names = options.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            names = ["__base__"] * len(x)
        result: torch.Tensor = self.base_layer(x, *arguments, **options)
        if self.merged or self.disable_adapters:
            return result
        if names is None:
            for name in self.active_adapters:
                if name in self.lora_A:
                    result = result + self._added(name, x).to(result.dtype)
            return result
        for name in dict.fromkeys(names):  # each row of a batch with its own
            if name in self.lora_A:
                rows = torch.tensor([index for index, other in enumerate(names) if other == name], device=x.device)
                result = result.index_add(0, rows, self._added(name, x[rows]).to(result.dtype))
        return result

    def _added(self, name: str, x: torch.Tensor) -> torch.Tensor:
        down, up = self.lora_A[name], self.lora_B[name]
        if not torch.is_autocast_enabled():
            x = self._cast_input_dtype(x, down.weight.dtype)
        added: torch.Tensor = up(down(self.lora_dropout[name](x))) * self.scaling[name]
        return added

    def __repr__(self) -> str:
        return f"lora.{super().__repr__()}"


def _with_weight(base: Any, weight: torch.Tensor) -> nn.Module:
    """A layer like another with another weight (N, K): rounded to its formats, or a plain one."""
    if not isinstance(base, KbitLinear):
        plain = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(weight.to(base.weight.dtype), requires_grad=False)
        plain.register_parameter("bias", base.bias)
        return plain
    if base.order is not None:
        weight = torch.empty_like(weight).index_copy_(0, base.order, weight)
    parts, start = [], 0
    for part in base.parts:
        stop = start + part.shape[0]
        parts.append(PackedMatrix(part.format.encode(_reader(weight[start:stop]), part.shape).to(weight.device)))
        start = stop
    layer = KbitLinear(parts, base.bias, order=base.order, compute=base.compute, dtype=base.dtype)
    return layer.requires_grad_(False)


def _reader(rows: torch.Tensor) -> Callable[[int, int], torch.Tensor]:
    return lambda start, stop: rows[start:stop]
