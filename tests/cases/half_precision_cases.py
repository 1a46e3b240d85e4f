"""How far logits may be from the reference's where a backend rounds to half precision."""

from __future__ import annotations

import torch
from decoder_cases import DictSource
from native_cases import random_ids

from kbit.backends.reference.backend import ReferenceBackend
from kbit.formats.quant_tensor import QuantTensor
from kbit.models.load import load_decoder


def assert_close(found: torch.Tensor, expected: torch.Tensor, source: DictSource, unit: float = 2.0**-11) -> None:
    """Within four times what rounding its weights to half precision does to the reference itself.

    A model's sensitivity to rounding is its own: here it is measured, on some tokens, by moving every weight by one unit
    up or down. The kernels round the factors of each product, weights and activations (as much again), its result, and
    the probabilities of attention, so twice as much is expected, and the largest deviation of many is twice the typical.
    """
    found = found.cpu()
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    worst = float((found - expected).abs().max() / expected.abs().max())
    bound = 4 * sensitivity(source) * unit
    assert worst <= bound, f"logits differ by {worst:.2e} of the largest, expected at most {bound:.2e}"


def sensitivity(source: DictSource) -> float:
    """Largest change of a logit, relative to the largest logit, per relative change of all weights."""
    if not hasattr(source, "sensitivity"):
        generator = torch.Generator().manual_seed(3)
        step = 2.0**-11
        moved = {}
        for name, tensor in source.data.items():
            weight = tensor.dequantize() if isinstance(tensor, QuantTensor) else tensor.float()
            signs = torch.randint(0, 2, weight.shape, generator=generator) * 2.0 - 1.0
            moved[name] = weight if weight.ndim == 1 else weight * (1.0 + step * signs)
        ids = random_ids(1, 12, seed=9)
        changed = DictSource(source.config, moved)
        models = [load_decoder(model, ReferenceBackend()) for model in (source, changed)]
        before, after = (model.forward(ids, model.new_cache(1, 12)) for model in models)
        setattr(source, "sensitivity", float((after - before).abs().max() / before.abs().max()) / step)  # noqa: B010
    return float(source.sensitivity)  # type: ignore[attr-defined]
