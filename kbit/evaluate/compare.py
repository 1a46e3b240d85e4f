"""How far a model is from a reference on the same windows: KL divergence, top-1 agreement, paired loss difference.

Perplexity differences of two good quantizations drown in the noise of the text; paired measures do not, because the
text's difficulty cancels. KL(reference || model) is the primary one: it sees the whole distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kbit.evaluate.logits import Evaluable, LogitsSource, row_step
from kbit.evaluate.perplexity import PerplexityResult, Progress, as_source, check_finite, window_targets
from kbit.evaluate.statistics import DRAWS, SEED, bootstrap_interval, cluster, standard_error
from kbit.host.errors import UsageError
from kbit.text.windows import Windows

KL_PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)


@dataclass(frozen=True, eq=False)
class Comparison:
    """A model against a reference, token by token. Arrays are (W windows, S scored tokens).

    Attributes:
        model: the model's losses.
        reference: the reference's losses.
        kl: KL(reference || model) at every scored position in nats, float64. Never clipped: rounding may leave
            -1e-15 where the two agree, and it is exactly 0 where their logits are equal.
        same_top: whether both put the same token first, bool. Ties go to the lowest token id.
    """

    model: PerplexityResult
    reference: PerplexityResult
    kl: NDArray[np.float64]
    same_top: NDArray[np.bool_]

    @property
    def kl_mean(self) -> float:
        """Mean KL divergence in nats per token."""
        return float(self.kl.mean())

    @property
    def kl_stderr(self) -> float | None:
        """Standard error of kl_mean, clustered by window."""
        return standard_error(cluster(self.kl))

    @property
    def kl_max(self) -> float:
        """Largest KL divergence of a token."""
        return float(self.kl.max())

    def kl_percentile(self, percent: float) -> float:
        """Percentile of the tokens' KL divergences, linearly interpolated."""
        return float(np.percentile(self.kl, percent))

    @property
    def top1_agreement(self) -> float:
        """Fraction of positions where both put the same token first."""
        return float(self.same_top.mean())

    @property
    def top1_stderr(self) -> float | None:
        """Standard error of top1_agreement, clustered by window."""
        return standard_error(cluster(self.same_top))

    @property
    def delta_nll(self) -> float:
        """Mean of (model's loss - reference's loss) in nats per token: the log of the perplexities' ratio."""
        return float((self.model.nll - self.reference.nll).mean())

    @property
    def delta_nll_stderr(self) -> float | None:
        """Standard error of delta_nll, clustered by window."""
        return standard_error(cluster(self.model.nll - self.reference.nll))

    def delta_nll_interval(
        self, level: float = 0.95, draws: int = DRAWS, seed: int = SEED
    ) -> tuple[float, float] | None:
        """Cluster-bootstrap percentile interval of delta_nll (see kbit.evaluate.statistics)."""
        return bootstrap_interval(cluster(self.model.nll - self.reference.nll), level, draws, seed)


def compare(
    model: Evaluable | LogitsSource,
    reference: Evaluable | LogitsSource,
    windows: Windows,
    progress: Progress | None = None,
) -> Comparison:
    """Run both models window by window, piece by piece in step, and compare their distributions.

    Args:
        model: the model to judge.
        reference: the model it should be like; a StoredLogits where several models are compared with one.
        progress: called after every window with the model's mean loss.

    Raises:
        UsageError: the vocabularies differ in size.
        KbitError: NaN or infinite logits.
    """
    ours, theirs = as_source(model), as_source(reference)
    check_vocabularies(ours.vocab_size, theirs.vocab_size)
    shape = (windows.count, windows.scored_per_window)
    nll, reference_nll, kl = np.empty(shape), np.empty(shape), np.empty(shape)
    same_top = np.empty(shape, dtype=np.bool_)
    step = row_step(ours.vocab_size)
    for index in range(windows.count):
        targets = window_targets(windows, index)
        at = 0
        for logits, reference_logits in zip(ours.window(windows, index), theirs.window(windows, index), strict=True):
            same = logits.argmax(dim=1).cpu() == reference_logits.argmax(dim=1).cpu()
            same_top[index, at : at + len(same)] = same.numpy()
            for start in range(0, len(logits), step):
                rows = logits[start : start + step]
                span = slice(at, at + len(rows))
                part = _compare_rows(rows, reference_logits[start : start + step], targets[span])
                nll[index, span], reference_nll[index, span], kl[index, span] = part.cpu().numpy()
                at = span.stop
        check_finite(nll[index], "the model's loss", windows, index)
        check_finite(reference_nll[index], "the reference's loss", windows, index)
        check_finite(kl[index], "the KL divergence", windows, index)
        if progress is not None:
            progress(index + 1, windows.count, float(nll[: index + 1].mean()))
    return Comparison(
        PerplexityResult(nll, windows.convention, windows.context),
        PerplexityResult(reference_nll, windows.convention, windows.context),
        kl,
        same_top,
    )


def compare_many(
    candidates: Iterable[tuple[str, Callable[[], Evaluable]]],
    reference: Evaluable | LogitsSource,
    windows: Windows,
    progress: Callable[[str], Progress] | None = None,
) -> Iterator[tuple[str, Comparison]]:
    """Compare candidates with one reference, one candidate in memory at a time.

    Args:
        candidates: (name, function that loads the candidate).
        reference: pass a StoredLogits to run the reference only once.
        progress: given a candidate's name, its progress callback.
    """
    for name, load in candidates:
        yield name, compare(load(), reference, windows, None if progress is None else progress(name))


def check_vocabularies(model: int, reference: int) -> None:
    """Raises UsageError where two vocabularies differ in size."""
    if model != reference:
        raise UsageError(
            f"the model has a vocabulary of {model} tokens, the reference one of {reference}: "
            "compare models that share a tokenizer"
        )


def _compare_rows(logits: torch.Tensor, reference: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Losses of model and reference and KL(reference || model) of a few rows: float64 (3, P).

    With z the logits and L their log-sum-exp, KL = sum p (z_ref - z) - L_ref + L: the sum has no log to take, and
    equal logits give exactly zero. Everything is in float64: KL of an 8-bit model is 1e-4, float32 log-probabilities
    are off by 1e-6 each.
    """
    ours = logits.double()  # (P, V)
    theirs = reference.to(logits.device).double()
    _, _, our_sum = _exponentials(ours)
    weights, total, their_sum = _exponentials(theirs)
    chosen = targets[:, None].to(ours.device)
    nll = our_sum - ours.gather(1, chosen)[:, 0]
    reference_nll = their_sum - theirs.gather(1, chosen)[:, 0]
    kl = weights.mul_(theirs.sub_(ours)).sum(dim=1) / total - their_sum + our_sum
    return torch.stack((nll, reference_nll, kl))


def _exponentials(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """exp(z - max z) of each row (P, V), its sum (P,) and log-sum-exp (P,): every logit goes through exp once."""
    top = rows.amax(dim=1, keepdim=True)
    weights = (rows - top).exp_()
    total = weights.sum(dim=1)
    return weights, total, total.log() + top[:, 0]
