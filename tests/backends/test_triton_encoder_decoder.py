"""Encoder-decoders on the Triton backend against the reference, in Triton's interpreter or on a GPU."""

from __future__ import annotations

from pathlib import Path

import encoder_decoder_cases as cases
import numpy as np
import pytest
import sound_cases as sounds

from kbit.backends.reference.backend import ReferenceBackend
from kbit.graph.batch import Batch
from kbit.host.errors import UnsupportedError

pytest.importorskip("triton")

from kbit.backends.triton.backend import TritonBackend

pytestmark = pytest.mark.usefixtures("one_thread")

# Products round both sides to 11 significant bits: 2^-11 each, whose sums' errors grow with the root of some 15 products
# one after another, and with the norms between by at most tenfold.
RELATIVE = 10 * 15**0.5 * 2.0**-11


@pytest.mark.parametrize("name", ["bart", "m2m_100", "marian"])
def test_logits(device: str, name: str, tmp_path: Path) -> None:
    """A ragged batch of sources; several tokens, and then one each of rows that share theirs."""
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
    cases.saved(cases.model_of(name, **sizes), tmp_path)
    sources, texts = cases.ids_of(70, 3), cases.ids_of(5, 5, seed=5)
    found = []
    for backend in (TritonBackend(device), ReferenceBackend()):
        ours = cases.loaded(tmp_path, backend)
        cache = ours.encode(sources, 8)
        first = ours.run(Batch.of(texts, cache.lengths, "all"), cache)
        cache.select([1, 1, 0])
        found.append(np.concatenate([first, ours.run(Batch.of([[7], [8], [9]], cache.lengths), cache)]))
    assert float(np.abs(found[0] - found[1]).max()) <= RELATIVE * float(np.abs(found[1]).max())


def test_sound(device: str, tmp_path: Path) -> None:
    """Frames through both convolutions and a layer, and texts of two sounds."""
    model = sounds.whisper(encoder_layers=1, decoder_layers=1, max_source_positions=70)
    sounds.saved_whisper(model, tmp_path)
    heard, texts = sounds.features(140, 140), cases.ids_of(5, 5, seed=5)
    found = []
    for backend in (TritonBackend(device), ReferenceBackend()):
        ours = cases.loaded(tmp_path, backend)
        cache = ours.encode_sounds(heard, 8)
        found.append(ours.run(Batch.of(texts, cache.lengths, "all"), cache))
    assert float(np.abs(found[0] - found[1]).max()) <= RELATIVE * float(np.abs(found[1]).max())


def test_scores_that_depend_on_the_distance_are_refused(device: str, tmp_path: Path) -> None:
    cases.saved(cases.model_of("t5", d_kv=16), tmp_path)
    with pytest.raises(UnsupportedError, match="no attention with scores that depend on the distance"):
        cases.loaded(tmp_path, TritonBackend(device))
