"""Tokenizers and chat templates."""

from __future__ import annotations

import json
from typing import Any

from fuzzing.config_targets import Described
from fuzzing.target import JsonTarget, Target
from kbit.engine.chat import render_chat
from kbit.text.backend import library_errors
from kbit.text.sentencepiece import SentencePieceModel
from kbit.text.token_table import build_table, open_table
from kbit.text.tokenizer import Tokenizer

_TEXT = "Hello, 12 worlds! \u00e9\U0001f600 <|im_end|>\n\n"


class TokenizerFiles(JsonTarget):
    """{"tokenizer.json": .., "tokenizer_config.json": .. and so on}: a text to ids and back, and the token table."""

    longest = 1 << 15
    values = ("BPE", "Unigram", "WordPiece", "WordLevel", "ByteLevel", "Sequence", "Metaspace", "ByteFallback", "<unk>")

    def run(self, data: bytes) -> None:
        try:
            files = json.loads(data)
        except (ValueError, RecursionError):
            files = {"tokenizer.json": None}
        if not isinstance(files, dict):
            return
        texts = {name: json.dumps(value).encode("utf-8", "surrogatepass") for name, value in files.items()}
        tokenizer = Tokenizer.from_source(Described({"model_type": "llama", "eos_token_id": 2}, texts))
        ids = tokenizer.encode(_TEXT)
        tokenizer.decode(ids)
        stream = tokenizer.stream()
        for token in ids:
            stream.push(token)
        stream.finish()
        table = build_table(texts["tokenizer.json"])
        if table is not None:
            open_table(memoryview(table), "the table").pairs.encode([0, 1, 2], [None, None, 1])


class SentencePiece(Target):
    """A SentencePiece model: parsed, and a text taken apart."""

    longest = 1 << 14

    def run(self, data: bytes) -> None:
        made = SentencePieceModel.parse(data, "source.spm").tokenizer()
        with library_errors("source.spm cannot encode this text"):
            made.encode(_TEXT)


_MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "You are."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi", "tool_calls": [{"function": {"name": "f", "arguments": {"a": [1, 2.5]}}}]},
    {"role": "user", "content": "Bye"},
]
_TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


class Template(Target):
    """A chat template: compiled, and a conversation rendered."""

    words = tuple(
        word.encode()
        for word in (
            *("{% for x in messages %}", "{% endfor %}", "{{ ", " }}", "{% if ", "{% endif %}", "{% set x = ", " %}"),
            *("range(99999)", "namespace(a=1)", "x ~ x", "x * 99", "|join", "|tojson", "|list", "|attr('a')", "self."),
            *("{% macro m(a) %}", "{% endmacro %}", "loop.cycle", "cycler(1)", "joiner('a')", ".__class__", "[::-1]"),
            *("raise_exception('a')", "strftime_now('%Y')", "'%s' % x", "'{}'.format(x)", "{% call m() %}", "2 ** 9"),
            *("|replace('a', x)", "|sum(start=[])", "|groupby('role')", "|batch(9)", "|slice(9)", "{% endcall %}"),
            *("{% filter upper %}", "{% endfilter %}", "|unique", "|sort", "|indent(9)", "|string", "{% break %}"),
            "|map(attribute='role')",
        )
    )

    def run(self, data: bytes) -> None:
        template = data.decode("utf-8", "replace")
        render_chat(template, _MESSAGES, special_tokens={"bos_token": "<s>"}, tools=_TOOLS)
