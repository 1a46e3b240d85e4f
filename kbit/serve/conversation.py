"""From the messages of a chat to a prompt, and what its answer may be: templates, tools, forms."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kbit.engine.answers import ConstraintMaker, Request
from kbit.engine.chat import render_chat
from kbit.engine.conversation import require_template
from kbit.host.errors import KbitError
from kbit.serve.errors import bad_request
from kbit.serve.grammar import JSON_STYLE
from kbit.serve.message_parser import MessageParser, ToolFormat, thinks, tool_format, without_thoughts
from kbit.serve.models import ServedModel
from kbit.serve.requests import constraint_of, request_of
from kbit.serve.schemas import ChatBody, Tool

_ROLES = {"system", "developer", "user", "assistant", "tool", "function"}
_NO_TOOLS = "none"
_NOT_VARIABLES = ("messages", "tools", "template")  # of a template, but what it is about


@dataclass(frozen=True)
class Prepared:
    """A chat that is ready to be answered.

    Attributes:
        request: the engine's.
        text: the prompt.
        tools: how the model writes calls; None: it is offered no tools.
        names: of the tools.
        reasoning: whether answers begin with thoughts, which are told apart.
        thinking: whether the prompt ends within such a thought.
        calls: whether the answer must be a call.
    """

    request: Request
    text: str
    tools: ToolFormat | None
    names: tuple[str, ...]
    reasoning: bool
    thinking: bool

    def parser(self) -> MessageParser:
        """What reads an answer."""
        return MessageParser(self.tools, self.names, reasoning=self.reasoning, thinking=self.thinking)


def prepare_chat(body: ChatBody, model: ServedModel) -> Prepared:
    """Not on the event loop: rendering and encoding take a while.

    Raises:
        ApiError, KbitError: something that is wrong, or not known here.
    """
    _refuse_unknown(body)
    template = require_template(model.tokenizer, model.name)
    choice, tools = _chosen(body)
    form = tool_format(template)
    offered = bool(tools) and choice != _NO_TOOLS
    messages = plain_messages(body.messages)
    if offered and form is None:
        form, messages = "hermes", _told_of_tools(messages, tools)
        rendered_tools = None
    else:
        rendered_tools = [tool.model_dump(exclude_none=True) for tool in tools] if offered else None
    messages, prefill = _continued(body, messages)
    asks = prefill is not None or body.add_generation_prompt is not False
    text = render(model, messages, rendered_tools, body.chat_template_kwargs, asks)
    thinking = thinks(template) and text.rstrip().endswith("<think>")
    text += prefill or ""
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    constraint: ConstraintMaker | None = None
    if offered and choice not in ("auto", None):
        if constraint_of(body, model) is not None:
            raise bad_request("tool_choice: an answer that must be a call has no other form", "response_format")
        assert form is not None
        constraint = _forced_call(model, form, [t for t in tools if choice in ("required", t.function.name)])
    logprobs = None
    if body.logprobs:
        logprobs = body.top_logprobs or 0
    elif body.top_logprobs:
        raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
    limit = body.most_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if limit == 0:
        raise bad_request("max_completion_tokens: 0 generates nothing: give at least 1", "max_completion_tokens")
    request = request_of(
        body,
        model,
        ids,
        max_tokens=model.most_tokens(limit),
        logprobs=logprobs,
        continues_prompt=False,
        constraint=constraint,
        show_special=offered and form in ("mistral", "llama3", "pythonic"),
    )
    names = tuple(tool.function.name for tool in tools)
    apart = body.reasoning_format != "none"
    return Prepared(request, text, form if offered else None, names, apart and thinks(template), apart and thinking)


def render(
    model: ServedModel,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None,
    more: dict[str, Any] | None,
    add_generation_prompt: bool = True,
) -> str:
    """The prompt of a conversation in the model's template.

    Raises:
        ApiError: the template fails on these messages.
    """
    template = require_template(model.tokenizer, model.name)
    said = {} if model.options is None else model.options.template_variables
    more = {key: value for key, value in {**said, **(more or {})}.items() if key not in _NOT_VARIABLES}
    if "functions" in template:  # FireFunction's name for them, as text
        more.setdefault("functions", json.dumps(tools, indent=4) if tools else "")
    reasoning = "auto" if model.options is None else model.options.reasoning
    if reasoning != "auto":
        more.setdefault("enable_thinking", reasoning == "on")
    try:
        text = render_chat(
            template,
            messages,
            special_tokens=model.tokenizer.special_tokens,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            **{key: value for key, value in more.items() if key.isidentifier()},
        )
    except KbitError as error:
        raise bad_request(str(error), "messages") from None
    if add_generation_prompt and more.get("enable_thinking") is False:
        text += without_thoughts(template, text)
    return text


def _continued(body: ChatBody, messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str | None]:
    """(the messages before it, what the answer is to go on from): the last one's text, where that is the assistant's.

    Raises:
        ApiError: there is no such message, or two of them.
    """
    last = messages[-1]
    goes_on = body.continue_final_message
    if goes_on and body.add_generation_prompt:
        raise bad_request(
            "continue_final_message and add_generation_prompt: an answer goes on or is new: leave one out",
            "continue_final_message",
        )
    written = last["role"] == "assistant" and not last.get("tool_calls")
    if goes_on and not written:
        raise bad_request("continue_final_message: the last message is not the assistant's", "messages")
    if not written or goes_on is False or (goes_on is None and body.add_generation_prompt is not None):
        return messages, None
    if len(messages) > 1 and messages[-2]["role"] == "assistant":
        raise bad_request("messages: two of the assistant's at the end: put them into one", "messages")
    return (messages[:-1], last["content"]) if len(messages) > 1 else (messages, None)


def plain_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates know them: text in place of parts, arguments as objects.

    Raises:
        ApiError: a message without a role that is known, or with what is no text.
    """
    plain = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise bad_request(f"{where}.role {role!r}: use system, user, assistant or tool", "messages")
        each = {**message, "role": "system" if role == "developer" else role}
        each["content"] = _text(message.get("content"), where)
        calls = message.get("tool_calls")
        if calls is not None:
            each["tool_calls"] = [_with_arguments(call, where) for call in _list(calls, where)]
        plain.append(each)
    return plain


def _text(content: object, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = []
    for part in _list(content, where):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("text", "input_text", "output_text", "refusal"):
            texts.append(str(part.get("text", part.get("refusal", ""))))
        else:
            raise bad_request(f"{where}.content: a part of type {kind!r}: this server reads text only", "messages")
    return "".join(texts)


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise bad_request(f"{where}: expected text or a list", "messages")
    return value


def _with_arguments(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise bad_request(f"{where}.tool_calls: a call is a function with a name", "messages")
    arguments = function.get("arguments", "{}")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            raise bad_request(
                f"{where}.tool_calls: the arguments of {function['name']} are no JSON", "messages"
            ) from None
    return {**call, "function": {**function, "arguments": arguments}}


def _refuse_unknown(body: ChatBody) -> None:
    """What the API has and this server has not, where it is asked for."""
    audible = [kind for kind in body.modalities or ["text"] if kind != "text"]
    if audible:
        raise bad_request(f"modalities: {audible[0]!r}: this server answers with text only", "modalities")
    if body.functions and body.function_call != _NO_TOOLS:
        raise bad_request("functions: use tools, which took their place", "functions")
    if body.moderation is not None:
        raise bad_request("moderation: this server moderates nothing: leave it out", "moderation")
    if body.web_search_options is not None:
        raise bad_request("web_search_options: this server searches nothing: leave it out", "web_search_options")


def _chosen(body: ChatBody) -> tuple[str | None, list[Tool]]:
    """(tool_choice as a word or a tool's name, the tools)."""
    tools = body.tools or []
    names = [tool.function.name for tool in tools]
    choice = body.tool_choice
    if isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else choice.get("name")
        if name not in names:
            raise bad_request(f"tool_choice: there is no tool {name!r} in tools", "tool_choice")
        return str(name), tools
    if choice not in (None, "auto", "none", "required"):
        raise bad_request(f"tool_choice {choice!r}: use auto, none, required or a function", "tool_choice")
    if choice == "required" and not tools:
        raise bad_request("tool_choice: required, and there are no tools", "tool_choice")
    return choice, tools


def _told_of_tools(messages: list[dict[str, Any]], tools: list[Tool]) -> list[dict[str, Any]]:
    """For templates that know of no tools: a system message that tells of them, and calls and results as text."""
    listed = "\n".join(json.dumps(tool.function.model_dump(exclude_none=True), ensure_ascii=False) for tool in tools)
    told = (
        "You can call these functions, one JSON object a line:\n"
        f"{listed}\n"
        "To call one, write <tool_call>\n"
        '{"name": "its name", "arguments": {"its": "arguments"}}\n'
        "</tool_call>"
    )
    plain: list[dict[str, Any]] = []
    for message in messages:
        content = message["content"]
        for call in message.get("tool_calls") or []:
            call_text = {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
            content += f"<tool_call>\n{json.dumps(call_text, ensure_ascii=False)}\n</tool_call>"
        if message["role"] in ("tool", "function"):
            plain.append({"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"})
        else:
            plain.append({"role": message["role"], "content": content})
    if plain[0]["role"] == "system":
        return [{"role": "system", "content": f"{plain[0]['content']}\n\n{told}"}, *plain[1:]]
    return [{"role": "system", "content": told}, *plain]


def _forced_call(model: ServedModel, form: ToolFormat, tools: list[Tool]) -> ConstraintMaker:
    """An answer that is one call of one of these tools, with arguments by its schema."""
    assert model.grammars is not None
    key = "parameters" if form == "llama3" else "arguments"
    schemas = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                key: tool.function.parameters or {"type": "object"},
            },
            "required": ["name", key],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    schema: dict[str, Any] = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    if form == "llama3":
        return model.grammars.json_schema(schema, "tools")
    begin, end = _mark(model, "<tool_call>") + ' "\\n"', '"\\n" ' + _mark(model, "</tool_call>")
    if form in ("mistral", "pythonic"):
        begin, end = _mark(model, "[TOOL_CALLS]"), ""
        if form == "pythonic":  # models that write calls of Python read and write a list of JSON as well
            begin, end = _mark(model, "<|tool_call_start|>"), _mark(model, "<|tool_call_end|>")
        schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": 1}
    schema["x-guidance"] = dict(JSON_STYLE)
    return model.grammars.lark(f"start: {begin} call {end}\ncall: %json {json.dumps(schema)}\n", "tools")


def _mark(model: ServedModel, mark: str) -> str:
    """A mark in a Lark grammar: the token, if the model has it."""
    token = model.tokenizer.token_id(mark)
    return json.dumps(mark) if token is None else f"<[{token}]>"
