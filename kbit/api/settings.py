"""From the keyword arguments of a Python program to a request of the engine."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kbit.api.results import Settings
from kbit.engine.answers import Request
from kbit.engine.sampler import SamplingParams
from kbit.host.errors import UsageError

if TYPE_CHECKING:
    from kbit.models.spec import ModelSpec

_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)
_MAX_TOKENS = 128


def request_of(ids: Sequence[int], settings: Settings, spec: ModelSpec, *, continues_prompt: bool) -> Request:
    """The engine's request, with a seed.

    Args:
        ids: the prompt's tokens.
        settings: what the program says.
        spec: the model's sizes.
        continues_prompt: the text goes on where the prompt ends; else it answers.

    Raises:
        UsageError: a setting that does not exist, or a value out of range.
    """
    given: dict[str, Any] = dict(settings)
    unknown = given.keys() - Settings.__annotations__.keys()
    if unknown:
        raise UsageError(f"{min(unknown)}: there is no such setting; there are {', '.join(Settings.__annotations__)}")
    sampling = {name: given[name] for name in _SAMPLING if given.get(name) is not None}
    sampling.setdefault("seed", secrets.randbits(63))
    most, named = given.get("max_tokens", _MAX_TOKENS), given.get("logprobs")
    if type(most) is not int or most < 1:
        raise UsageError(f"max_tokens {most!r}: expected a whole number, at least 1")
    if named is not None and (type(named) is not int or not 0 <= named <= spec.vocab_size):
        raise UsageError(f"logprobs {named!r}: expected a whole number from 0 to {spec.vocab_size}")
    stop = given.get("stop") or ()
    try:
        chosen = SamplingParams(**sampling, logit_bias=_bias(given.get("logit_bias") or {}, spec))
    except TypeError:
        wrong = next(name for name, value in sampling.items() if not isinstance(value, (int, float)))
        raise UsageError(f"{wrong} {sampling[wrong]!r}: expected a number") from None
    return Request(
        tuple(ids),
        chosen,
        max_tokens=most,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        continues_prompt=continues_prompt,
        logprobs=named,
        stop_repetition=not given.get("allow_repetition", False),
        adapter=given.get("adapter"),
    )


def _bias(given: Mapping[int, float], spec: ModelSpec) -> tuple[tuple[int, float], ...]:
    for token in given:
        if type(token) is not int or not 0 <= token < spec.vocab_size:
            raise UsageError(f"logit_bias: {token!r} is no token of this model, which has 0 to {spec.vocab_size - 1}")
    return tuple(sorted(given.items()))
