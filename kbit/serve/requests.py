"""From the fields of an HTTP request to a request of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kbit.engine.answers import ConstraintMaker, Request
from kbit.engine.sampler import SamplingParams
from kbit.serve.errors import bad_request
from kbit.serve.grammar import GrammarCompiler
from kbit.serve.models import ModelOptions, ServedModel
from kbit.serve.schemas import SamplingFields

_MOST_STOPS = 64


def sampling_of(body: SamplingFields, model: ServedModel) -> SamplingParams:
    """The settings of a request; those it does not name are the model's defaults.

    Temperature, where it is named, comes without the defaults' cuts: they belong together.

    Raises:
        ApiError, UsageError: a value out of range.
    """
    assert model.defaults is not None
    defaults = model.defaults.params
    base = defaults if body.temperature is None else SamplingParams(temperature=1.0, seed=defaults.seed)
    given = {
        name: getattr(body, name)
        for name in (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "typical_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        )
        if getattr(body, name) is not None
    }
    for name, alias in (("repetition_penalty", body.repeat_penalty), ("typical_p", body.typ_p)):
        if alias is not None:
            given.setdefault(name, alias)
    if given.get("top_p") == 0:  # of OpenAI's range: the most probable token
        given.update(temperature=0.0, top_p=1.0)
    if 0 < given.get("temperature", 1.0) < 1e-6:
        given["temperature"] = 0.0
    seed = defaults.seed if body.seed is None else body.seed % (1 << 63)
    return replace(base, **given, seed=seed, logit_bias=_bias(body, model))


def request_of(
    body: SamplingFields,
    model: ServedModel,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    continues_prompt: bool = True,
    constraint: ConstraintMaker | None = None,
    show_special: bool = False,
    after_settings: bool = False,
) -> Request:
    """The engine's request.

    Raises:
        ApiError, UsageError: a value out of range.
    """
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stops) > _MOST_STOPS:
        raise bad_request(f"stop: {len(stops)} strings, of at most {_MOST_STOPS}", "stop")
    return Request(
        tuple(prompt),
        sampling_of(body, model),
        max_tokens=max_tokens,
        choices=body.n or 1,
        stop=tuple(stops),
        stop_ids=frozenset(body.stop_token_ids or ()),
        ignore_end=body.ignore_eos,
        continues_prompt=continues_prompt,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        show_special=show_special or not body.skip_special_tokens,
        constraint=constraint or constraint_of(body, model),
        stop_repetition=body.stop_repetition,
        adapter=model.adapter,
        after_settings=after_settings,
        progress=bool(body.stream) and (body.return_progress or body.timings_per_token),
        slot=_slot(body, model),
    )


def check_slot(number: int, options: ModelOptions) -> None:
    """
    Raises:
        ApiError: there is no slot of this number.
    """
    if not 0 <= number < options.seats:
        raise bad_request(f"slot {number}: this server has slots 0 to {options.seats - 1} (--parallel)", "id_slot")


def _slot(body: SamplingFields, model: ServedModel) -> int | None:
    options = model.options
    if options is None or options.slot_folder is None or body.id_slot in (None, -1):
        return None
    check_slot(body.id_slot, options)
    return body.id_slot


def constraint_of(body: SamplingFields, model: ServedModel) -> ConstraintMaker | None:
    """What an answer must look like.

    Raises:
        ApiError: something that is not known or cannot be enforced.
    """
    grammars = model.grammars
    assert isinstance(grammars, GrammarCompiler)
    asked = [name for name in ("regex", "grammar", "json_schema") if getattr(body, name) is not None]
    form = body.response_format or {"type": "text"}
    kind = form.get("type")
    if kind != "text":
        asked.append("response_format")
    if len(asked) > 1:
        raise bad_request(f"{asked[0]} and {asked[1]}: an answer can have one form: leave one out", asked[1])
    if body.regex is not None:
        return grammars.regex(body.regex)
    if body.grammar is not None:
        return grammars.lark(body.grammar)
    if body.json_schema is not None:
        return grammars.json_schema(body.json_schema, "json_schema")
    if kind == "text":
        return None
    if kind == "json_object":
        schema = form.get("schema")
        if schema is None:
            return grammars.json_object()
        if not isinstance(schema, (dict, bool)):
            raise bad_request("response_format.schema: expected a JSON schema", "response_format")
        return grammars.json_schema(schema)
    if kind == "json_schema":
        named = form.get("json_schema")
        schema = named.get("schema", True) if isinstance(named, dict) else None
        if not isinstance(schema, (dict, bool)):
            raise bad_request("response_format.json_schema.schema: expected a JSON schema", "response_format")
        return grammars.json_schema(schema)
    if kind in ("grammar", "regex") and isinstance(form.get(kind), str):
        return grammars.lark(form["grammar"]) if kind == "grammar" else grammars.regex(form["regex"])
    raise bad_request(
        f"response_format.type {kind!r}: use text, json_object, json_schema, regex or grammar", "response_format"
    )


def _bias(body: SamplingFields, model: ServedModel) -> tuple[tuple[int, float], ...]:
    if not body.logit_bias:
        return ()
    assert model.loaded is not None
    vocabulary = model.loaded.decoder.spec.vocab_size
    pairs = {}
    for key, value in body.logit_bias.items():
        token = int(key) if key.isdecimal() and len(key) < 12 else -1
        if not 0 <= token < vocabulary:
            raise bad_request(
                f"logit_bias: {key[:50]!r} is no token id of this model, which has 0 to {vocabulary - 1}", "logit_bias"
            )
        if not -100 <= value <= 100:
            raise bad_request(f"logit_bias: {value} for token {key}: expected a number from -100 to 100", "logit_bias")
        pairs[token] = value
    return tuple(sorted(pairs.items()))
