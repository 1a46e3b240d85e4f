"""Conversations to prompts, by the chat template a checkpoint brings.

The result equals that of transformers' `apply_chat_template(tokenize=False)`; see template_sandbox for what a template
may do.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kbit.host.errors import CheckpointError, UsageError, one_line

if TYPE_CHECKING:
    from jinja2 import Template

MAX_TEMPLATE_CHARACTERS = 1 << 20

Message = Mapping[str, Any]


def render_chat(
    template: str,
    messages: Sequence[Message],
    *,
    special_tokens: Mapping[str, str] | None = None,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> str:
    """The prompt for a conversation.

    Encode it with `add_special_tokens=False`: templates write BOS and the like themselves.

    Args:
        template: the Jinja source (`Tokenizer.chat_template`).
        messages: at least one, each {"role": ..., "content": ...} of plain JSON values. Keys set to None are left out,
            as templates would print them.
        special_tokens: strings by name, for templates that write `{{ bos_token }}` (`Tokenizer.special_tokens`).
        add_generation_prompt: end with the header of the assistant's turn.
        tools: JSON schemas of functions, for templates that list them.
        variables: more names a template may know, for example `enable_thinking=False`.

    Raises:
        UsageError: no message, or messages this template refuses (it says why: a role it does not know, for example).
        CheckpointError: the template is broken, or does what a template must not.
    """
    from kbit.text.template_sandbox import TemplateRefusal, render

    if not messages:
        raise UsageError("the conversation is empty: give at least one message")
    plain = [{key: _plain(value) for key, value in message.items() if value is not None} for message in messages]
    compiled = _compile(template)
    names: dict[str, Any] = {**(special_tokens or {}), **{key: _plain(value) for key, value in variables.items()}}
    names.update(
        messages=plain,
        tools=None if tools is None else [_plain(tool) for tool in tools],
        documents=None,
        add_generation_prompt=add_generation_prompt,
    )
    try:
        return render(compiled, names)
    except TemplateRefusal as error:
        raise UsageError(f"the model's chat template refuses these messages: {one_line(error)}") from None
    except Exception as error:  # whatever a template runs into: it is the checkpoint's program, not ours
        raise CheckpointError(f"the model's chat template failed: {one_line(error)}") from None


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> Template:
    from jinja2 import TemplateSyntaxError

    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise CheckpointError(
            f"the model's chat template has {len(template)} characters, more than {MAX_TEMPLATE_CHARACTERS}"
        )
    try:
        compiled: Template = _environment().compile_chat(template)
    except TemplateSyntaxError as error:
        raise CheckpointError(f"the model's chat template, line {error.lineno}: {one_line(error.message)}") from None
    except Exception as error:  # RecursionError from deep nesting, SecurityError, compile errors of generated code
        raise CheckpointError(f"the model's chat template cannot be compiled: {one_line(error)}") from None
    return compiled


@functools.lru_cache(maxsize=1)
def _environment() -> Any:
    from kbit.text.template_sandbox import ChatEnvironment

    return ChatEnvironment()


def _plain(value: Any) -> Any:
    """A copy made of plain JSON types: a template can call methods, and only these types' are known to be harmless."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    raise UsageError(f"a chat message holds a {type(value).__name__}: use text, numbers, lists and objects only")
