"""Decoders with a table of positions, or with slopes: as long as these reach, and no longer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from decoder_cases import saved_model

from kbit.backends.cpu.backend import NativeBackend
from kbit.backends.reference.backend import ReferenceBackend
from kbit.host.errors import UsageError
from kbit.models.load import load_decoder
from kbit.models.opening import open_model

pytestmark = pytest.mark.usefixtures("one_thread")
pytest.importorskip("transformers")


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom"])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_a_text_ends_with_the_table(tmp_path: Path, name: str, backend: str) -> None:
    saved_model(name, tmp_path)
    with open_model(str(tmp_path)) as source:
        decoder = load_decoder(
            source, ReferenceBackend() if backend == "reference" else NativeBackend(1, compute="fp32", kv="fp32")
        )
    ids = torch.arange(1, 66)[None] % 100
    cache = decoder.new_cache(1, 80)
    whole = decoder.forward(ids[:, :64], cache)
    assert bool(torch.isfinite(whole).all())
    with pytest.raises(UsageError, match="a text of 65 tokens is longer than the 64 positions"):
        decoder.forward(ids[:, 64:], cache)
    with pytest.raises(UsageError, match="a text of 65 tokens is longer than the 64 positions"):
        decoder.extend([5], cache)
    assert cache.lengths.tolist() == [64]
    other = decoder.new_cache(1, 80)
    with pytest.raises(UsageError, match="a text of 65 tokens"):
        decoder.forward(ids, other)
    assert other.lengths.tolist() == [0]
