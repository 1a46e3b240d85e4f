"""The tokens of a step: those of all answers that wait for one, chosen and scored in one go."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kbit.engine.answers import Choice, TokenInfo
from kbit.engine.logprobs import token_infos
from kbit.engine.native_sampler import Mask, sample_rows
from kbit.engine.sampler import Probabilities
from kbit.host.errors import KbitError


def choose_tokens(
    choices: Sequence[Choice], logits: NDArray[np.float32], rows: Sequence[int]
) -> list[TokenInfo | KbitError]:
    """The next token of several answers, by their samplers and constraints.

    Args:
        choices: R of them, each once.
        logits: (L, V), contiguous.
        rows: (R,), the row of each.

    Returns:
        (R,), tokens, with log-probabilities where the request asks for them; an error where the logits are no numbers
        or the constraint cannot go on.
    """
    found: list[TokenInfo | KbitError | None] = [None] * len(choices)
    masks: list[Mask | None] = []
    able = []
    drawn_by: dict[int, Probabilities] = {}
    for i, choice in enumerate(choices):
        try:
            mask = None if choice.constraint is None else choice.constraint.mask()
            if choice.distribution is not None:
                drawn_by[i] = choice.distribution.distribution(_masked(logits[rows[i]], mask))
            masks.append(mask)
            able.append(i)
        except KbitError as error:
            found[i] = error
    tokens = sample_rows(
        [choices[i].sampler for i in able],
        logits,
        [rows[i] for i in able],
        masks if any(mask is not None for mask in masks) else (),
    )
    scored: list[tuple[int, int, int]] = []  # (which, its token, how many others to name)
    for i, token in zip(able, tokens, strict=True):
        choice, asked = choices[i], choices[i].request.logprobs
        found[i] = token if isinstance(token, KbitError) else TokenInfo(token)
        if isinstance(token, KbitError):
            continue
        try:
            if choice.constraint is not None:
                choice.constraint.accept(token)
        except KbitError as error:
            found[i] = error
        else:
            if choice.distribution is not None:
                choice.distribution.count(token)
                found[i] = _drawn(token, drawn_by[i], asked or 0)
            elif asked is not None:
                scored.append((i, token, asked))
    if scored:
        most = max(top for _, _, top in scored)
        infos = token_infos(logits, [rows[i] for i, _, _ in scored], [token for _, token, _ in scored], most)
        for (i, token, top), info in zip(scored, infos, strict=True):
            found[i] = TokenInfo(token, logprob=info.logprob, top=info.top[:top])
    return [each for each in found if each is not None]


def _masked(row: NDArray[np.float32], mask: Mask | None) -> NDArray[np.float32]:
    """Logits (V,) of the tokens that a mask (at most V,) allows; -inf for the others."""
    if mask is None:
        return row
    allowed = np.zeros(row.size, np.bool_)
    allowed[: mask.size] = mask[: row.size]
    return np.where(allowed, row, np.float32(-np.inf))


def _drawn(token: int, probabilities: Probabilities, top: int) -> TokenInfo:
    """A token, and the most probable ones, by the probabilities (V,) it was drawn by; none that could not come."""
    order = np.argsort(-probabilities, kind="stable")[:top]
    named = tuple((int(each), math.log(probabilities[each])) for each in order if probabilities[each] > 0)
    # The native sampler rounds in another order: what lies at the edge of a cut may be in there and not here.
    own = float(probabilities[token])
    return TokenInfo(token, logprob=math.log(own) if own > 0 else -math.inf, top=named)
