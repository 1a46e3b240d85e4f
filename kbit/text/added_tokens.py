"""Tokens that stand beside tokenizer.json: in added_tokens.json, tokenizer_config.json and special_tokens_map.json.

Which file counts, in which order tokens are added and which of them are special follows transformers 5 with a
tokenizer.json (`PreTrainedTokenizerBase._from_pretrained`, `TokenizersBackend.__init__`):

- `added_tokens_decoder` of tokenizer_config.json, where there is one, is all; else special_tokens_map.json stands
  before tokenizer_config.json, added_tokens.json adds its tokens, and those of tokenizer.json stand before both.
- They are added in the order of their ids, which the library gives anew: one after the other behind the vocabulary.
- Named tokens ("eos_token") and extra special ones that are no added tokens by then are added as special ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kbit.host.errors import CheckpointError, one_line
from kbit.host.notes import note

if TYPE_CHECKING:
    import tokenizers

# Names under which chat templates and tokenizer_config.json know special tokens.
SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def add_tokens_of_files(backend: tokenizers.Tokenizer, files: Mapping[str, bytes], where: str) -> bool:
    """Completes the tokenizer of a tokenizer.json with the tokens of the files beside it.

    Args:
        backend: the library's tokenizer; it is changed.
        files: a checkpoint's sidecar files.
        where: the checkpoint, for errors.

    Returns:
        Whether anything had to be added or changed.

    Raises:
        CheckpointError: a file is not what its name says.
    """
    settings = token_settings(files, where)
    own = backend.get_added_tokens_decoder()
    present = {repr(token) for token in own.values()}
    listed = _listed_tokens(files, settings, own, where)
    named = {str(token.content): token for token in _named_tokens(settings, listed, where)}
    wanted = [token for _, token in sorted(listed.items(), key=lambda entry: entry[0])]
    for token in wanted:
        token.special = token.special or token.content in named
    known = {token.content for token in (*own.values(), *wanted)}
    for token in (*named.values(), *_extra_tokens(settings, where)):
        if token.content not in known:
            known.add(token.content)
            wanted.append(token)
    missing = [token for token in wanted if repr(token) not in present]
    if not missing:
        return False
    backend.add_tokens(missing)
    for index, token in listed.items():
        found = backend.token_to_id(token.content)
        if found != index:
            note(
                f"{where}: token {one_line(token.content, 60)!r} has id {index} in the tokenizer's files, but the "
                f"vocabulary gives it {found}, which is used, as transformers does"
            )
    return True


def token_settings(files: Mapping[str, bytes], where: str) -> dict[str, Any]:
    """tokenizer_config.json, with special_tokens_map.json merged into it where that counts.

    Extra special tokens of tokenizer_config.json are `extra_special_tokens`, whatever the file calls them.

    Raises:
        CheckpointError: one of them is not a JSON object.
    """
    settings = read_json(files, "tokenizer_config.json", where)
    extra, old = "extra_special_tokens", "additional_special_tokens"  # what transformers 5 and 4 call them
    if old in settings and not settings.get(extra):
        settings[extra] = settings.pop(old)
    if "added_tokens_decoder" in settings:
        return settings
    others = read_json(files, "special_tokens_map.json", where)
    if isinstance(others.get(extra), list) and isinstance(settings.get(extra), list):
        others[extra] = [*settings[extra], *others[extra]]
    return {**settings, **others}


def token_strings(settings: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name; each is a string or an object with "content". Unset ones (null) are left out."""
    found = {}
    for name in SPECIAL_TOKEN_NAMES:
        text = _text(settings.get(name))
        if text:
            found[name] = text
    return found


def read_json(files: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    """A sidecar file that holds a JSON object; {} where there is none.

    Raises:
        CheckpointError: it holds something else.
    """
    data = files.get(name)
    if data is None:
        return {}
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise CheckpointError(f"{where}: {name} is not valid JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: {name} holds a {type(value).__name__}, not an object")
    return value


def _listed_tokens(
    files: Mapping[str, bytes], settings: Mapping[str, Any], own: Mapping[int, Any], where: str
) -> dict[int, Any]:
    """AddedToken by the id that the files give it."""
    if "added_tokens_decoder" in settings:
        decoder = settings["added_tokens_decoder"]
        place = f"{where}: added_tokens_decoder of tokenizer_config.json"
        if not isinstance(decoder, dict):
            raise CheckpointError(f"{place} is {one_line(decoder, 60)}, not an object of tokens by id")
        return {_id(index, place): _token(entry, f"{place}: {index}") for index, entry in decoder.items()}
    found = {}
    special = {*token_strings(settings).values(), *map(_text, _list(settings.get("extra_special_tokens")))}
    for text, index in read_json(files, "added_tokens.json", where).items():
        place = f"{where}: added_tokens.json: {one_line(text, 60)!r}"
        flag = text in special
        found[_id(index, place)] = _token({"content": text, "normalized": not flag, "special": flag}, place)
    return {**found, **own} if found else dict(own)


def _named_tokens(settings: Mapping[str, Any], listed: Mapping[int, Any], where: str) -> list[Any]:
    """Tokens that have a name ("eos_token", and what a model calls a token of its own: "image_token")."""
    by_text = {token.content: token for token in listed.values()}
    own_names = [name for name in settings if name.endswith("_token") and name not in SPECIAL_TOKEN_NAMES]
    values = {name: settings.get(name) for name in (*SPECIAL_TOKEN_NAMES, *own_names)}
    if isinstance(settings.get("extra_special_tokens"), dict):
        values |= settings["extra_special_tokens"]
    found = []
    for name, value in values.items():
        text = _text(value)
        if text:
            found.append(by_text.get(text) or _special(value, text, f"{where}: {name}"))
    return found


def _extra_tokens(settings: Mapping[str, Any], where: str) -> list[Any]:
    """Tokens that are special without a name."""
    key = "extra_special_tokens" if "extra_special_tokens" in settings else "additional_special_tokens"
    values = _list(settings.get(key))
    return [_special(value, text, f"{where}: {key}") for value in values if (text := _text(value))]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _special(value: Any, text: str, place: str) -> Any:
    flags = value if isinstance(value, dict) else {}
    return _token({"normalized": False, **flags, "content": text, "special": True}, place)


def _token(entry: Any, place: str) -> Any:
    """The library's token of a JSON object."""
    from tokenizers import AddedToken

    text = entry.get("content") if isinstance(entry, dict) else None
    if not isinstance(text, str) or not text:
        raise CheckpointError(f"{place} is {one_line(entry, 60)}: expected an object with the token as content")
    flags = {flag: entry[flag] for flag in _FLAGS if flag in entry}
    wrong = next((flag for flag, value in flags.items() if not isinstance(value, bool)), None)
    if wrong is not None:
        raise CheckpointError(f"{place}: {wrong} is {one_line(flags[wrong], 60)}, expected true or false")
    return AddedToken(text, **flags)


def _id(value: Any, place: str) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31:
        return value
    raise CheckpointError(f"{place}: {one_line(value, 60)} is not a token id")
