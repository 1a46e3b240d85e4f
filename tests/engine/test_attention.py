"""Maps of attention are the means of what transformers says its attentions were, of decoders and encoders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import encoder_cases
import encoder_decoder_cases
import numpy as np
import pytest
import torch

from kbit.cli.main import _run
from kbit.engine.attention import attention_map
from kbit.host.errors import UnsupportedError, UsageError
from kbit.models.opening import open_model
from kbit.text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "The cat sat because it was tired."


def assert_means(folder: Path, text: str, theirs: Any) -> None:
    """Of all layers and heads, of one, and of some. Shares are at most 1; float32 sums of up to 48 terms are behind them,
    in a few blocks one after another."""
    with open_model(str(folder)) as source:
        ids = Tokenizer.from_source(source).encode(text)
        with torch.no_grad():
            shares = torch.cat(theirs(torch.tensor([ids]), output_attentions=True).attentions).numpy()  # (L, H, T, T)
        last, whole = shares.shape[1] - 1, attention_map(source, text)
        assert len(whole.layers) == len(shares)  # of the layers that attend
        place = {layer: index for index, layer in enumerate(whole.layers)}
        for layers, heads in (((), ()), ((whole.layers[-1],), (last,)), (whole.layers[1::-1], ()), ((), (last, 0))):
            found = attention_map(source, text, layers=layers, heads=heads)
            of = shares[[place[layer] for layer in layers]] if layers else shares
            of = of[:, sorted(heads)] if heads else of
            assert found.shares.shape == (len(ids), len(ids))
            assert np.abs(found.shares - of.mean(axis=(0, 1))).max() < 2e-5
            assert found.layers == (tuple(sorted(layers)) or whole.layers)
            assert len(found.tokens) == len(ids)


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "gemma3", "gemma4-e", "ministral3", "gpt-oss", "bloom", "deepseek-v3", "qwen3-next"]
)
def test_decoders(published: Callable[[str], Path], name: str) -> None:
    """Windows, caps, rotations of two kinds, shared keys, queries with a temperature, sinks, slopes, latent keys; and
    layers that do not attend."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        published(name), attn_implementation="eager", experts_implementation="eager"
    )
    assert_means(published(name), TEXT, model.eval())


@pytest.mark.parametrize("family", ["Bert", "MPNet", "ModernBert"])
def test_encoders(tmp_path: Path, family: str) -> None:
    model = encoder_cases.model_of(family, attn_implementation="eager")
    encoder_cases.saved(model, tmp_path)
    assert_means(tmp_path, "the cat sat on the mat .", model)


def test_command(published: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(published("llama"))
    for kind in ("svg", "png", "json"):
        path = tmp_path / f"map.{kind}"
        assert _run(["attention", TEXT, "--model", model, "--layer", "1", "-o", str(path)], debug=True) == 0
        assert f"33 tokens, layer 1, mean of 6 heads: {path}" in capsys.readouterr().out
    assert (tmp_path / "map.svg").read_bytes().lstrip().startswith(b"<?xml")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "map.json").read_text(encoding="utf-8"))
    assert "".join(written["tokens"]) == TEXT
    assert np.allclose(np.array(written["shares"]).sum(axis=1), 1.0, atol=1e-5)
    assert _run(["attention", TEXT, "--model", model, "--layer", "1", "--json"], debug=True) == 0
    assert json.loads(capsys.readouterr().out) == {**written, "output": None}


def test_what_is_refused(published: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(published("llama"))
    for flags, message in (
        ([], "say where the picture goes"),
        (["-o", "map.pdf"], "has to end in .svg, .png or .json"),
        (["--json", "--layer", "3"], "--layer 3: the model has layers 0 to 2"),
        (["--json", "--head", "6"], "--head 6: the model has heads 0 to 5"),
    ):
        assert _run(["attention", TEXT, "--model", model, *flags], debug=False) == 2
        assert message in capsys.readouterr().err
    with open_model(model) as source, pytest.raises(UsageError, match="has 65 tokens, and this model reads at most 64"):
        attention_map(source, "x" * 65)
    with (
        open_model(str(published("qwen3-next"))) as source,
        pytest.raises(UsageError, match=r"--layer 0: the model has layers [1-9, ]+, which attend"),
    ):
        attention_map(source, TEXT, layers=[0])
    encoder_decoder_cases.saved(encoder_decoder_cases.model_of("t5"), tmp_path)
    with open_model(str(tmp_path)) as source, pytest.raises(UnsupportedError, match="t5 is an encoder-decoder, whose"):
        attention_map(source, TEXT)
