"""Choosing the tokens of a step natively, all rows in one call, with the bits of `kbit.engine.sampler.Sampler`."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Sequence
from copy import copy
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kbit import _native
from kbit.engine.sampler import Logits, SamplingParams, not_finite

if TYPE_CHECKING:
    from kbit.host.errors import KbitError

Mask = NDArray[np.bool_]


class NativeSampler:
    """Draws the tokens of one request and remembers them for the penalties: `Sampler`, without `verify`.

    Args:
        params, prompt_ids, choice: see `Sampler`.

    Attributes:
        params: as given.
        seed: the seed in use, also when params.seed was None.
        native: what the native kernels know of it.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Iterable[int] = (), choice: int = 0) -> None:
        self.params = p = params
        self.seed = secrets.randbits(63) if p.seed is None else p.seed
        with np.errstate(over="ignore"):  # a penalty beyond float32 is infinite
            self.native = _native.RowSampler(
                factor=p.inverse_temperature,
                top_k=p.top_k,
                top_p=p.top_p,
                min_score=math.log(p.min_p) if p.min_p else -math.inf,
                typical_p=p.typical_p,
                repetition_penalty=float(np.float32(p.repetition_penalty)),
                presence_penalty=float(np.float32(p.presence_penalty)),
                frequency_penalty=float(np.float32(p.frequency_penalty)),
                bias_tokens=np.array([token for token, _ in p.logit_bias], np.int64),
                biases=np.array([bias for _, bias in p.logit_bias], np.float64).astype(np.float32),
                seed=self.seed,
                choice=choice,
            )
        if p.repetition_penalty != 1:
            self.native.see(np.fromiter(prompt_ids, np.int64))

    def copy(self) -> NativeSampler:
        """Another one that has chosen the same tokens so far."""
        other = copy(self)
        other.native = self.native.copy()
        return other

    def sample(self, logits: Logits) -> int:
        """The next token, which is then counted as generated.

        Args:
            logits: (V,) on any device. -inf marks a token that must not be chosen.

        Raises:
            KbitError: a logit is NaN or +inf, or all are -inf.
        """
        row = logits if isinstance(logits, np.ndarray) else logits.detach().cpu().float().numpy()
        (token,) = sample_rows([self], np.ascontiguousarray(row, np.float32)[None], [0])
        if isinstance(token, int):
            return token
        raise token


def sample_rows(
    samplers: Sequence[NativeSampler],
    logits: NDArray[np.float32],
    rows: Sequence[int],
    masks: Sequence[Mask | None] = (),
    isa: str = "",
) -> list[int | KbitError]:
    """The next token of several samplers, which is counted as generated. The GIL is not held meanwhile.

    Args:
        samplers: R of them, each once.
        logits: (L, V), contiguous.
        rows: (R,), the row of each.
        masks: (R,), bool (at most V,), the tokens that may be chosen, those beyond may not; None, or no masks: all.
        isa: the instruction set; "" for the best.

    Returns:
        (R,), tokens; an error where the row has NaN or +inf, or nothing but -inf.
    """
    tokens, best = np.empty(len(rows), np.int64), np.empty(len(rows), np.float32)
    _native.sample_rows(
        [sampler.native for sampler in samplers],
        logits,
        np.asarray(rows, np.int64),
        list(masks),
        tokens,
        best,
        isa,
    )
    return [
        token if token >= 0 else not_finite(float(value), sampler.native.position)
        for token, value, sampler in zip(tokens.tolist(), best, samplers, strict=True)
    ]
