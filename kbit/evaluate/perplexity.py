"""Perplexity of a model on windows of text, with its standard error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kbit.evaluate.logits import Evaluable, LogitsSource, ModelLogits, pieces, row_step
from kbit.evaluate.statistics import cluster, standard_error
from kbit.host.errors import KbitError
from kbit.text.windows import Convention, Windows

# (windows done, windows in all, mean loss so far in nats)
Progress = Callable[[int, int, float], None]


@dataclass(frozen=True, eq=False)
class PerplexityResult:
    """Losses of one model, token by token, so that models can be compared pairwise afterwards.

    Attributes:
        nll: negative log-likelihood of every scored token in nats, float64 (W, S).
        convention: how the windows were made.
        context: tokens per window.
    """

    nll: NDArray[np.float64]
    convention: Convention
    context: int

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return int(self.nll.size)

    @property
    def windows(self) -> int:
        """W."""
        return int(self.nll.shape[0])

    @property
    def mean_nll(self) -> float:
        """Mean loss per scored token in nats."""
        return float(self.nll.mean())

    @property
    def perplexity(self) -> float:
        """exp(mean_nll); infinity where that exceeds a float64."""
        return _exp(self.mean_nll)

    @property
    def perplexity_stderr(self) -> float | None:
        """Standard error of `perplexity` from clusters of tokens (windows), by the delta method: ppl * se(mean_nll).

        This one, not the per-token error below, is the figure to quote: tokens of one window share their context and
        their subject, their losses are correlated, and the error that takes them for independent comes out too
        small. None where there is one cluster only.
        """
        error = standard_error(cluster(self.nll))
        return None if error is None else self.perplexity * error

    @property
    def perplexity_stderr_tokens(self) -> float | None:
        """The same with every token its own cluster: what llama.cpp prints after "+/-". None for a single token."""
        if self.nll.size < 2:
            return None
        return self.perplexity * float(self.nll.std(ddof=1)) / math.sqrt(self.nll.size)

    @property
    def clusters(self) -> int:
        """Clusters behind `perplexity_stderr` (see kbit.evaluate.statistics)."""
        return cluster(self.nll).count


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log softmax(logits)[target] in nats, float64 (P,), computed in float64 a few rows at a time.

    Args:
        logits: (P, V), any float type.
        targets: int64 (P,).
    """
    step = row_step(logits.shape[-1])
    parts = []
    for start in range(0, len(targets), step):
        rows = logits[start : start + step].double()
        chosen = rows.gather(1, targets[start : start + step, None])[:, 0]
        parts.append(torch.logsumexp(rows, dim=1) - chosen)
    return torch.cat(parts)


def evaluate_perplexity(
    model: Evaluable | LogitsSource, windows: Windows, progress: Progress | None = None
) -> PerplexityResult:
    """Perplexity of a model on windows.

    Args:
        model: a decoder, or a source of its logits.
        progress: called after every window.

    Raises:
        KbitError: the model's logits are NaN or infinite.
    """
    source = as_source(model)
    nll = np.empty((windows.count, windows.scored_per_window))
    for index in range(windows.count):
        targets = window_targets(windows, index)
        for (start, stop), logits in zip(
            pieces(windows, source.vocab_size), source.window(windows, index), strict=True
        ):
            span = slice(start - windows.first_scored, stop - windows.first_scored)
            nll[index, span] = token_nll(logits, targets[span].to(logits.device)).cpu().numpy()
        check_finite(nll[index], "the model's loss", windows, index)
        if progress is not None:
            progress(index + 1, windows.count, float(nll[: index + 1].mean()))
    return PerplexityResult(nll, windows.convention, windows.context)


def as_source(model: Evaluable | LogitsSource) -> LogitsSource:
    """A source of logits as it is, or a decoder as one."""
    return model if isinstance(model, LogitsSource) else ModelLogits(model)


def window_targets(windows: Windows, index: int) -> torch.Tensor:
    """The tokens a window's scored positions predict, int64 (S,)."""
    return torch.from_numpy(windows.ids[index, windows.first_scored + 1 :])


def check_finite(values: NDArray[np.float64], what: str, windows: Windows, index: int) -> None:
    """Raises KbitError naming the first token where `values` (S,) of window `index` is NaN or infinite."""
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        token = windows.first_scored + 1 + int(bad[0])
        raise KbitError(
            f"{what} is {values[bad[0]]} at token {token} of window {index}: the weights or the arithmetic are broken"
        )


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
