"""How an encoder-decoder is told from which language into which to translate.

t5          words before the text, which config.json has for each pair (task_specific_params)
m2m_100     a token before the text, and the first that is written (NLLB likewise, with its own codes)
mbart       likewise for mBART-50; of mBART-25 one behind the text, and the token that the translation begins with
marian      nothing, where the model knows one language; else a token before the text (">>fra<<")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kbit.host.errors import CheckpointError, UsageError
from kbit.text.tokenizer import Tokenizer

_LISTED = 12


@dataclass(frozen=True)
class Prompted:
    """What stands around a text, and what a generated one begins with.

    Attributes:
        words: before the text.
        before, after: tokens around it, in place of those that the tokenizer puts there; None: the tokenizer's.
        generation: keys of generation_config.json.
    """

    words: str = ""
    before: tuple[int, ...] | None = None
    after: tuple[int, ...] | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)


def task_of(config: Mapping[str, Any], task: str, where: str) -> Mapping[str, Any]:
    """A task of config.json's task_specific_params: its keys, or none where it is not there.

    Raises:
        CheckpointError: it is no object, or its prefix no text.
    """
    tasks = config.get("task_specific_params") or {}
    found = tasks.get(task, {}) if isinstance(tasks, Mapping) else None
    if not isinstance(found, Mapping) or not isinstance(found.get("prefix", ""), str):
        raise CheckpointError(f"{where}: task_specific_params should be an object of tasks, with a prefix of text each")
    return found


def prompted_for_task(config: Mapping[str, Any], task: str, where: str) -> Prompted:
    """As a task says: words before the text, and how to generate.

    Raises:
        CheckpointError: see `task_of`.
    """
    keys = dict(task_of(config, task, where))
    return Prompted(words=keys.pop("prefix", ""), generation=keys)


def prompted_for_languages(
    family: str,
    tokenizer: Tokenizer,
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
    source: str | None,
    target: str | None,
    where: str,
) -> Prompted:
    """To translate.

    Args:
        family: model_type.
        tokenizer: the model's.
        config: config.json.
        settings: tokenizer_config.json.
        source, target: languages as the model writes them, or the beginning of that; None: what the files say.
        where: the checkpoint, for errors.

    Raises:
        UsageError: a language that the model does not have, or does not need; one that is missing.
        CheckpointError: a file is not what its name says.
    """
    if family in ("t5", "mt5", "umt5"):
        return _by_words(config, source, target, where)
    if family == "marian":
        return _marian(tokenizer, settings, source, target, where)
    if family not in ("m2m_100", "mbart"):
        if source is not None or target is not None:
            raise UsageError(f"{where}: a {family} model knows no languages: leave out --from and --to")
        return Prompted()
    tokens = tokenizer.tokens()
    write = "__{}__".format if any(t.startswith("__") and t.endswith("__") for t in tokens) else str
    named: list[int] = []
    for flag, code, key in (("--from", source, "src_lang"), ("--to", target, "tgt_lang")):
        code = code or settings.get(key)
        if not isinstance(code, str):
            raise UsageError(f"{where}: {flag} is missing; this model has {_some(_codes(tokens, write))}")
        named.append(_language(code, flag, tokens, write, where))
    spoken, written = named
    end = tokenizer.token_id(tokenizer.special_tokens.get("eos_token", "</s>"))
    if end is None:
        raise CheckpointError(f"{where}: the tokenizer has no eos_token, which stands at the end of a text")
    if family == "mbart" and not _is_mbart_50(settings, config, end):
        return Prompted(before=(), after=(end, spoken), generation={"decoder_start_token_id": written})
    old = settings.get("legacy_behaviour") is True  # of NLLB's tokenizer
    before, after = ((), (end, spoken)) if old else ((spoken,), (end,))
    return Prompted(before=before, after=after, generation={"forced_bos_token_id": written})


def _is_mbart_50(settings: Mapping[str, Any], config: Mapping[str, Any], end: int) -> bool:
    """Whether the language stands before a text: by the tokenizer's name, else by what translations begin with."""
    name = str(settings.get("tokenizer_class") or config.get("tokenizer_class"))
    return "MBart50" in name or ("MBart" not in name and config.get("decoder_start_token_id") == end)


def _by_words(config: Mapping[str, Any], source: str | None, target: str | None, where: str) -> Prompted:
    tasks = config.get("task_specific_params") or {}
    pairs = [name for name in tasks if str(name).startswith("translation_")] if isinstance(tasks, Mapping) else []
    name = f"translation_{source}_to_{target}"
    if name not in pairs:
        known = ", ".join(str(pair).removeprefix("translation_").replace("_to_", " to ") for pair in pairs) or "none"
        raise UsageError(
            f"{where}: --from {source} --to {target}: config.json describes no such translation, but {known}; with "
            'kbit run, the instruction is part of the text: "translate English to German: ..."'
        )
    return prompted_for_task(config, name, where)


def _marian(
    tokenizer: Tokenizer, settings: Mapping[str, Any], source: str | None, target: str | None, where: str
) -> Prompted:
    codes = {token[2:-2]: token for token in tokenizer.tokens() if token.startswith(">>") and token.endswith("<<")}
    for flag, given, key in (("--from", source, "source_lang"), ("--to", target, "target_lang")):
        if given is None or (key == "target_lang" and codes):
            continue
        if settings.get(key) != given:
            raise UsageError(f"{where}: {flag} {given}: this model translates {flag[2:]} {settings.get(key)} only")
    if not codes:
        return Prompted()
    if target is None and len(codes) > 1:
        raise UsageError(f"{where}: --to is missing; this model writes {_some(sorted(codes))}")
    if target is not None and target not in codes:
        raise UsageError(f"{where}: --to {target}: this model writes {_some(sorted(codes))}")
    return Prompted(words=codes[target] + " " if target is not None else "")


def _codes(tokens: Mapping[str, int], write: Callable[[str], str]) -> list[str]:
    """The languages there are."""
    if write is not str:
        return sorted(token[2:-2] for token in tokens if token.startswith("__") and token.endswith("__"))
    # "en_XX", "eng_Latn".
    parts = ((token, token.partition("_")) for token in tokens)
    return sorted(
        token
        for token, (code, _, rest) in parts
        if code.islower()
        and len(code) in (2, 3)
        and rest.isalpha()
        and rest[0].isupper()
        and len(rest) in (2, 4)
        and code.isascii()
    )


def _language(code: str, flag: str, tokens: Mapping[str, int], write: Callable[[str], str], where: str) -> int:
    if write(code) in tokens:
        return tokens[write(code)]
    codes = _codes(tokens, write)
    fitting = [known for known in codes if known.startswith(f"{code}_")]
    if len(fitting) != 1:
        what = f"is {' or '.join(fitting)}" if fitting else f"is no language of this model, which has {_some(codes)}"
        raise UsageError(f"{where}: {flag} {code}: {what}")
    return tokens[fitting[0]]


def _some(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
