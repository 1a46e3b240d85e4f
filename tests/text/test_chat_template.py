"""Chat templates: equal to transformers on the well-known ones, and harmless on hostile ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kbit.checkpoint.gguf.source import GGUFSource
from kbit.engine.chat import render_chat
from kbit.host.errors import CheckpointError, KbitError, UsageError
from kbit.text.tokenizer import Tokenizer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

# Written after the published templates of these models: the constructs are theirs (namespaces, slices, loop variables,
# whitespace control, raise_exception, filters, tests), which is what must render alike.
TEMPLATES = {
    "chatml": """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
""",
    "smollm2": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
        "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if loop.index0 == 0 and system_message != false %}"
        "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
        "+ message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "mistral": """\
{%- set user_messages = messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {{- "[INST] " + message.content + "[/INST]" }}
        {%- set ns.index = ns.index + 1 %}
    {%- elif message.role == "assistant" %}
        {{- " " + message.content|trim + eos_token}}
    {%- else %}
        {{- message.role|upper ~ ":" ~ ns.index ~ "/" ~ message.content|length ~ ";" }}
    {%- endif %}
{%- endfor %}
""",
    # As Qwen's and Llama's write calls, and every way in which published templates ask whether there is text.
    "tools": """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role }}
    {%- if message.content is string %}{{- '\n' + message.content }}{%- endif %}
    {%- if message.content is none %}{{- '[null]' }}{%- endif %}
    {%- if message.content is defined and message.content is not none %}{{- '[text]' }}{%- endif %}
    {%- if 'content' in message %}{{- '[has]' }}{%- endif %}
    {%- if message['reasoning_content'] is defined %}{{- '[reasoning]' }}{%- endif %}
    {%- if 'tool_calls' in message and message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}
        {%- endfor %}
    {%- elif message.tool_calls is not none and message.tool_calls is not undefined %}{{- '[calls]' }}{%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}""",
    "many constructs": """\
{%- macro header(role, n=1) -%}
<|{{ role }}|>{{ n }}
{% endmacro -%}
{%- set ns = namespace(seen=[], last='') -%}
{%- for message in messages recursive_off if message.role != 'nobody' -%}
{%- endfor -%}
""".replace(" recursive_off", "")
    + """\
{%- for message in messages %}
    {%- if message.content is not defined %}{% continue %}{% endif %}
    {{- header(message.role, n=loop.revindex) }}
    {%- generation %}
    {{- message.content.split(' ')[-1] | replace('a', 'A') | default('x', true) }}
    {%- endgeneration %}
    {{- loop.cycle('odd', 'even') }} {{ loop.length }} {{ loop.previtem.role if loop.previtem else '' }}
    {%- if '{{' in message.content or loop.index > 8 %}{% break %}{% endif %}
    {%- set ns.last = ns.last ~ message.role[0] %}
{% endfor %}
{%- filter upper %}{{ ns.last }}{% endfilter %}
{%- set block %}{{ messages | map(attribute='role') | unique | join(', ') }}{% endset %}
{{ block }} {{ '%s-%05.2f' % ('a', 3.14159) }} {{ '{}:{x:>4}'.format(1, x=2) }} {{ [1, 'two', none, {'k': "<&'>"}] | tojson }}
{{ {'b': 1, 'a': [1, 2]} | tojson(indent=2, sort_keys=true) }} {{ 'x' * 3 }} {{ 2 ** 10 }} {{ 7 // 2 }} {{ range(2, 9, 3) | list }}
{{ messages[0].content | indent(4) }} {{ dict(a=1).items() | list }} {{ strftime_now('%%') }} {{ undefined_name }}|{{ bos_token }}
{{ 'lower' | title }} {{ ['b', 'a'] | sort }} {{ (1, 2) }} {{ not true }} {{ [3, 1] | max }} {{ "a,b" | safe | escape }}
""",
}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Hello, is it  a good day? {{ 1 }} <b>\u4f60\u597d</b>\n"}],
    "turns": [
        {"role": "user", "content": " hi there "},
        {"role": "assistant", "content": "\nHello!\n\nHow are you? "},
        {"role": "user", "content": "fine\nthanks a"},
    ],
    "system": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Go"},
        {"role": "assistant", "content": "Gone", "tool_calls": None},
        {"role": "user", "content": ""},
    ],
}

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1, "y": None}}, "id": "abcdefghi"}
# Turns that call tools have no content; what stands beside it may be null as well.
CONVERSATIONS["calls"] = [
    {"role": "system", "content": "Use tools.", "name": None},
    {"role": "user", "content": "Go"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "7", "name": "f", "tool_call_id": "abcdefghi"},
    {"role": "assistant", "content": None, "reasoning_content": None, "tool_calls": None},
    {"role": "user", "content": "And?"},
]
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "n": [1]}}}


def transformers_render(template: str, messages: list[dict[str, Any]], generation_prompt: bool, tools: Any) -> str:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.WordLevel({"<s>": 0, "</s>": 1, "x": 2}, unk_token="x"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)
    return str(
        tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=generation_prompt
        )
    )


class TestAgainstTransformers:
    @pytest.mark.parametrize("tools", [None, [TOOL, TOOL]])
    @pytest.mark.parametrize("generation_prompt", [True, False])
    @pytest.mark.parametrize("conversation", CONVERSATIONS)
    @pytest.mark.parametrize("name", TEMPLATES)
    def test_equal(self, name: str, conversation: str, generation_prompt: bool, tools: Any) -> None:
        template, messages = TEMPLATES[name], CONVERSATIONS[conversation]
        options: dict[str, Any] = {
            "special_tokens": SPECIAL,
            "add_generation_prompt": generation_prompt,
            "tools": tools,
        }
        try:
            theirs = transformers_render(template, messages, generation_prompt, tools)
        except Exception:  # a template that joins its text to null, for example
            assert conversation == "calls"
            with pytest.raises(KbitError, match="the model's chat template"):
                render_chat(template, messages, **options)
            return
        ours = render_chat(template, messages, **options)
        assert ours == theirs
        assert len(ours) > 10

    def test_smollm2(self, smollm2_gguf: Path) -> None:
        with GGUFSource(smollm2_gguf) as gguf:
            tokenizer = Tokenizer.from_source(gguf)
        assert tokenizer.chat_template is not None
        for name in ("one", "turns", "system"):
            messages = CONVERSATIONS[name]
            ours = render_chat(tokenizer.chat_template, messages, special_tokens=tokenizer.special_tokens)
            assert ours == transformers_render(tokenizer.chat_template, messages, True, None)
        ids = tokenizer.encode(ours, add_special_tokens=False)
        assert ids[0] == 1
        assert tokenizer.decode(ids, skip_special_tokens=False) == ours

    def test_long_conversation_is_within_the_budget(self) -> None:
        messages = [{"role": ("user", "assistant")[i % 2], "content": "word " * 400} for i in range(2001)]
        ours = render_chat(TEMPLATES["mistral"], messages, special_tokens=SPECIAL)
        assert ours.count("[INST]") == 1001
        assert len(ours) > 4_000_000


BIG = "{% set x = 'a' * 1000000 %}"
DOUBLE = "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}BODY{% endfor %}"
NEST = "{% set ns = namespace(s=['a']) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}"

ESCAPES = {
    "class": "{{ ''.__class__.__mro__ }}",
    "subclasses": "{{ ().__class__.__base__.__subclasses__() }}",
    "item access": "{{ messages['__class__'].__name__ }}",
    "attr filter": "{{ (''|attr('__class__')).__mro__ }}",
    "map attribute": "{{ messages | map(attribute='__class__') | map(attribute='__name__') | list }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "format_map": "{{ '{x.__class__.__name__}'.format_map({'x': messages}) }}",
    "globals of a helper": "{{ raise_exception.__globals__['sys'] }}",
    "cycler": "{{ cycler.__init__.__globals__.os }}",
    "namespace attribute": "{{ namespace(__class__=1) }}",
    "namespace set": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "dict class": "{{ dict.mro()[1] }}",
    "template self": "{{ self.__init__.__globals__.os }}",
    "mutation": "{{ messages.append(1) }}",
    "file": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    # Published ways out of Jinja's sandbox, whatever version of it is installed.
    "CVE-2016-10745": "{{ '{0.__class__.__base__}'.format(1) }}",
    "CVE-2019-10906": "{{ '{a.__class__.__base__}'.format_map({'a': 1}) }}",
    "CVE-2019-8341": "{{ config.__class__.__init__.__globals__['os'].popen('id').read() }}",
    "CVE-2024-22195": "{{ {'a onload=x': 1} | xmlattr }}",
    "CVE-2024-56326": "{% set f = '{0.__class__.__base__}'.format %}{{ [f] | map('call') | list }}{{ f(1) }}",
    "CVE-2025-27516": "{{ ('{0.__class__.__base__}' | attr('format'))(1) }}",
    "globals of cycler": "{{ cycler('a').__init__.__globals__ }}",
    "globals of joiner": "{{ joiner.__init__.__globals__.os.system('id') }}",
    "globals of loop": "{% for i in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m.__globals__ }}{{ m._func.__globals__ }}",
    "code of a macro": "{% macro m() %}{% endmacro %}{{ m._func.__code__ }}",
    "frame of a generator": "{{ ([1] | map('string')).gi_frame.f_back.f_globals }}",
    "traceback of an undefined": "{{ nothing._undefined_exception.__init__.__globals__ }}",
    "environment of a context": "{{ self._TemplateReference__context.environment }}",
    "sort": "{{ messages | sort(attribute='__class__.__name__') }}{{ messages[0].__class__ }}",
    "reject by a test": "{{ [''.__class__] | selectattr('__name__') | list }}",
    "CVE-2025-27516, by map": (
        "{% set f = ['{0.__class__.__base__}'] | map(attribute='format') | list %}{{ f[0](messages) }}"
    ),
    "str.format in a loop": "{% for f in ['{0.__init__.__globals__}'.format] %}{{ f(cycler) }}{% endfor %}",
}

# What these ask for is nothing to a template.
UNSEEN = {
    "map": ("{{ [1] | map(attribute='real.__class__') | list }}", "[Undefined]"),
    "groupby": ("{{ [1] | groupby('__class__') }}", "[(Undefined, [1])]"),
    "attribute": ("{{ messages | map(attribute='__class__') | first }}", ""),
}

EXHAUSTION = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "range of a constant": "{{ range(10**12) | list }}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loop over filters": "{% for i in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
    "recursive loop": "{% for a in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive tree": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "repeat": "{{ 'a' * 10**10 }}",
    "repeat a list": "{{ [0] * 10**10 }}",
    "repeat reversed": "{{ 10**10 * 'a' }}",
    "double by ~": DOUBLE.replace("BODY", "{% set ns.s = ns.s ~ ns.s %}"),
    "double by +": DOUBLE.replace("BODY", "{% set ns.s = ns.s + ns.s %}"),
    "double by %": DOUBLE.replace("BODY", "{% set ns.s = '%s%s' % (ns.s, ns.s) %}"),
    "double by format": DOUBLE.replace("BODY", "{% set ns.s = '{}{}'.format(ns.s, ns.s) %}"),
    "double by join": DOUBLE.replace("BODY", "{% set ns.s = [ns.s, ns.s] | join %}"),
    "double by str.join": DOUBLE.replace("BODY", "{% set ns.s = ''.join([ns.s, ns.s]) %}"),
    "double by block": DOUBLE.replace("BODY", "{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}"),
    "double by replace": DOUBLE.replace("BODY", "{% set ns.s = ns.s | replace('a', 'aa') %}"),
    "square an integer": DOUBLE.replace("BODY", "{% set ns.n = (ns.n or 3) * (ns.n or 3) %}"),
    "power": "{{ 10 ** (10 ** 10) }}",
    "nested lists printed": NEST + "{{ ns.s }}",
    "nested lists as JSON": NEST + "{{ ns.s | tojson }}",
    "nested lists as string": NEST + "{{ ns.s | string | length }}",
    "nested lists in %": NEST + "{{ '%s' % (ns.s,) }}",
    "replace": BIG + "{{ x | replace('a', x) }}",
    "str.replace": BIG + "{{ x.replace('a', x) }}",
    "join": BIG + "{{ x | join(x) }}",
    "str.join": BIG + "{{ x.join(x) }}",
    "indent": "{% set x = 'a\n' * 1000000 %}{{ x | indent('b' * 10000) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "center": "{{ 'a' | center(10**10) }}",
    "batch": "{{ [1] | batch(10**10, 'x') | list }}",
    "slice": "{{ [1] | slice(10**10) | list }}",
    "format width": "{{ '{:>9999999999}'.format(1) }}",
    "computed format width": "{{ '{:>{}}'.format(1, 10**10) }}",
    "% width": "{{ '%09999999999d' % 1 }}",
    "computed % width": "{{ '%*d' % (10**10, 1) }}",
    "format filter": "{{ '%09999999999d' | format(1) }}",
    "to_bytes": "{{ (1).to_bytes(10**10, 'big') }}",
    "expandtabs": "{{ '\t'.expandtabs(10**10) }}",
    "lipsum": "{{ lipsum(n=10**7) }}",
    "wordwrap": BIG + "{{ x | wordwrap(1, true, x) }}",
}

BROKEN = {
    "syntax": "{% if %}",
    "unclosed": "{% for a in messages %}",
    "unknown filter": "{{ 1 | nosuchfilter }}",
    "unknown tag": "{% nosuchtag %}",
    "missing key": "{{ messages[5].content.x }}",
    "type": "{{ 1 + 'a' }}",
    "division": "{{ 1 / 0 }}",
    "not callable": "{{ messages() }}",
    "deep": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "deep if": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "too long": "a" * ((1 << 20) + 1),
}


class TestHostile:
    @pytest.mark.parametrize("name", ESCAPES)
    def test_escape(self, name: str) -> None:
        with pytest.raises(CheckpointError) as caught:
            render_chat(ESCAPES[name], CONVERSATIONS["one"])
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("name", UNSEEN)
    def test_unseen(self, name: str) -> None:
        template, rendered = UNSEEN[name]
        assert render_chat(template, CONVERSATIONS["one"]) == rendered

    @pytest.mark.parametrize("name", EXHAUSTION)
    def test_exhaustion(self, name: str) -> None:
        """Each ends with the budget, a few seconds of work at worst; without it, it takes hours, or all memory."""
        with pytest.raises(CheckpointError) as caught:
            render_chat(EXHAUSTION[name], CONVERSATIONS["one"])
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400

    @pytest.mark.parametrize("name", BROKEN)
    def test_broken(self, name: str) -> None:
        with pytest.raises(CheckpointError, match="the model's chat template") as caught:
            render_chat(BROKEN[name], CONVERSATIONS["one"])
        assert "\n" not in str(caught.value)

    def test_syntax_error_names_the_line(self) -> None:
        with pytest.raises(CheckpointError, match="line 3"):
            render_chat("a\nb\n{% if %}", CONVERSATIONS["one"])

    def test_messages_are_untouched(self) -> None:
        messages = [{"role": "user", "content": ["a", {"b": 1}]}]
        render_chat("{% set m = messages[0] %}{{ m.content }}", messages)
        assert messages == [{"role": "user", "content": ["a", {"b": 1}]}]


class TestUsage:
    def test_refusal_by_the_template(self) -> None:
        """raise_exception is about the messages, not about the checkpoint: a wrong request, exit code 2."""
        messages = [{"role": "assistant", "content": "first"}]
        with pytest.raises(UsageError, match="refuses these messages: Conversation roles must alternate"):
            render_chat(TEMPLATES["llama2"], messages, special_tokens=SPECIAL)

    def test_no_messages(self) -> None:
        with pytest.raises(UsageError, match="empty"):
            render_chat(TEMPLATES["chatml"], [])

    def test_objects_are_refused(self) -> None:
        with pytest.raises(UsageError, match="PosixPath|WindowsPath"):
            render_chat(TEMPLATES["chatml"], [{"role": "user", "content": Path("x")}])

    def test_variables(self) -> None:
        assert render_chat("{{ enable_thinking }}", CONVERSATIONS["one"], enable_thinking=False) == "False"
