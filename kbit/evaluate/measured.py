"""How far a quantized model is from the original, as the engine runs it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kbit.host.progress import Progress
from kbit.quantizers.calibrated import CalibratedRounding
from kbit.quantizers.request import MEASURED_TOKENS, QuantizeRequest


@dataclass(frozen=True)
class Measured:
    """A comparison on text that the original wrote.

    Attributes:
        bits: of a nested model those that it was measured at.
        tokens: compared.
        kl_mean, kl_stderr: KL divergence in nats per token, and its standard error (None where there is one token).
        top1_agreement: share of tokens of which both find the same most probable.
    """

    bits: float | None
    tokens: int
    kl_mean: float
    kl_stderr: float | None
    top1_agreement: float


def measure(
    request: QuantizeRequest, method: CalibratedRounding, out: Path, progress: Progress | None = None
) -> Measured:
    """
    Args:
        request: what was asked; the original is its model.
        method: that made it.
        out: the result.
        progress: told how far it is.
    """
    from kbit.evaluate.evaluation import Request, evaluate_model

    bits = None if method.nesting is None else method.nesting.anchor
    asked = Request(
        model=str(out), reference=request.model, data="sampled", max_tokens=MEASURED_TOKENS, threads=request.threads,
        reference_backend="native-fp32", bits=bits,
    )  # fmt: skip
    found = evaluate_model(
        asked, None if progress is None else lambda done, total, _: progress("measuring", done, total)
    )
    compared = found.comparison
    assert compared is not None
    return Measured(bits, compared.kl.size, compared.kl_mean, compared.kl_stderr, compared.top1_agreement)
