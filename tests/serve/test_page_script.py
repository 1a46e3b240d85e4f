"""The page's script puts an answer's text on the page token by token, however text and tokens arrive. Run by Node."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kbit.serve.page

SCRIPT = Path(kbit.serve.page.__file__).with_name("page.js").read_text()
# As much of a document as the class needs; reads cases, a line each, and writes what is on the page after each.
HARNESS = """
const document = { createTextNode: (data) => ({ data }) };
const make = (kind, name, text) => ({ kind, text, dataset: {} });
class Element {
  children = [];
  appendChild(child) { this.children.push(child); return child; }
  insertBefore(child, before) { this.children.splice(this.children.indexOf(before), 0, child); }
}
require("readline").createInterface({ input: process.stdin }).on("line", (line) => {
  const element = new Element(), tokens = new Tokens(element);
  for (const [text, told] of JSON.parse(line)) tokens.push(text, told);
  const spans = element.children.slice(0, -1).map((span) => [span.text, JSON.parse(span.dataset.token)[0], span.className]);
  console.log(JSON.stringify({ spans, rest: tokens.rest.data }));
});
"""


@pytest.fixture(scope="module")
def node() -> Any:
    if shutil.which("node") is None:
        pytest.skip("no Node here to run the page's script")
    found = re.search(r"^class Tokens \{.*?^\}", SCRIPT, re.DOTALL | re.MULTILINE)
    assert found is not None
    command = ["node", "-e", found[0] + HARNESS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def shown(node: Any, chunks: list[tuple[str, list[dict[str, Any]]]]) -> dict[str, Any]:
    node.stdin.write(json.dumps(chunks) + "\n")
    node.stdin.flush()
    return dict(json.loads(node.stdout.readline()))


def token(data: bytes, logprob: float = -0.1) -> dict[str, Any]:
    text = data.decode("utf-8", "replace")
    return {
        "token": text,
        "bytes": list(data),
        "logprob": logprob,
        "top_logprobs": [{"token": text, "logprob": logprob}],
    }


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_whatever_the_pieces(node: Any, data: st.DataObject) -> None:
    text = data.draw(st.text(alphabet="ab \n€𝄞é", min_size=1, max_size=12))
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(raw) - 1)), max_size=6)))
    edges = [0, *[cut for cut in cuts if cut < len(raw)], len(raw)]
    tokens = [token(raw[a:b]) for a, b in itertools.pairwise(edges)]
    tokens.append(token(b"<|im_end|>"))  # has no text
    # Text comes in chunks of its own, each no sooner than the tokens it is of; it may be held back.
    chunks: list[tuple[str, list[dict[str, Any]]]] = [("", [each]) for each in tokens]
    sent = 0
    for index in range(len(tokens)):
        told = len(raw[: edges[min(index + 1, len(edges) - 1)]].decode("utf-8", "ignore"))
        upto = len(text) if index == len(tokens) - 1 else data.draw(st.integers(sent, max(sent, told)))
        chunks[index] = (text[sent:upto], chunks[index][1])
        sent = upto
    found = shown(node, chunks)
    assert "".join(span[0] for span in found["spans"]) + found["rest"] == text
    assert found["rest"] == ""


def test_the_least_probable_token_of_a_character_marks_it(node: Any) -> None:
    euro = "€".encode()
    tokens = [token(euro[:1], -3.0), token(euro[1:], -0.01), token(b"x", -0.5), token(b"y", -1.5)]
    found = shown(node, [("€xy", tokens)])
    assert [(text, mark) for text, _, mark in found["spans"]] == [("€", "t3"), ("x", "t1"), ("y", "t2")]


def test_text_without_probabilities_is_plain(node: Any) -> None:
    assert shown(node, [("Hello ", []), ("there", [])]) == {"spans": [], "rest": "Hello there"}


def test_thoughts_and_a_first_space_do_not_confuse_it(node: Any) -> None:
    tokens = [token(b"<think>"), token(b"hm"), token(b"</think>"), token(b" Yes"), token(b".")]
    found = shown(
        node, [("", tokens[:1]), ("", tokens[1:2]), ("", tokens[2:3]), ("Yes", tokens[3:4]), (".", tokens[4:])]
    )
    assert ([span[0] for span in found["spans"]], found["rest"]) == (["Yes", "."], "")
