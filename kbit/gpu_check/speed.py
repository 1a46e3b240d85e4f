"""Step 6: tokens per second of whole models: those that were named, and one of 8 billion random weights at 4 bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from kbit.gpu_check.measuring import bandwidth, timed
from kbit.gpu_check.models import FORMAT, Changed
from kbit.gpu_check.place import DRY, SHORT, Place, Row
from kbit.gpu_check.synthetic import EIGHT_BILLION, TINY, RandomModel
from kbit.gpu_check.times import NO_TIME
from kbit.host.errors import one_line
from kbit.models.decoder import Decoder
from kbit.models.load import load_decoder
from kbit.models.opening import open_model

DECODED, WARM_UP = 64, 4  # tokens
PROMPT = 1024
LARGE, SMALL = "random Llama of 8 billion weights", "random 2-layer Llama"


def items(place: Place) -> Sequence[str]:
    """The models, the large one first; where time is short or means nothing, a small one."""
    return [*((LARGE,) if place.scale not in (DRY, SHORT) else ()), *(place.models or (SMALL,))]


def run(place: Place, item: str) -> list[Row]:
    """{"case", "decode_tokens_per_s", "prefill_tokens_per_s", "share_of_bandwidth"} for caches of 16 and 4 bits."""
    from kbit.backends.triton.backend import TritonBackend
    from kbit.tuning.stored import use_tuned

    rows: list[Row] = []
    for kv in ("16", "4") if place.timed else ("4",):
        row: Row = {"case": item, "format": FORMAT, "kv": kv}
        rows.append(row)
        try:
            if place.timed:
                use_tuned(torch.device("cuda", torch.cuda.current_device()))
            decoder = _load(item, TritonBackend(place.device, kv=kv), place)
            weights = decoder.weights
            tied = weights.head is weights.embedding
            row["bytes_per_token"] = weights.nbytes - (0 if tied else weights.embedding.nbytes)
            if not place.timed:
                decode(decoder, 2)
                row["why"] = NO_TIME
                continue
            room = decoder.spec.context_length
            prompt, count = min(PROMPT, room // 2), min(DECODED, room // 2 - WARM_UP)
            row["decode_tokens_per_s"] = rate = decode_rate(decoder, count)
            row["prefill_tokens_per_s"], row["prompt"] = prefill_rate(decoder, prompt), prompt
            row["share_of_bandwidth"] = rate * row["bytes_per_token"] / bandwidth()
        except Exception as error:  # of the compiler or the driver, of any kind
            row["error"] = f"{type(error).__name__}: {one_line(error)}"
            place.survive(error)
    return rows


def _load(name: str, backend: object, place: Place) -> Decoder:
    from kbit.backends.triton.backend import TritonBackend

    assert isinstance(backend, TritonBackend)
    if name in (LARGE, SMALL):
        config = EIGHT_BILLION if name == LARGE else TINY
        return load_decoder(RandomModel(config, FORMAT, place.device, place.seed), backend)
    with open_model(str(Path(name).expanduser())) as source:
        return load_decoder(Changed(source), backend)


def decode(decoder: Decoder, count: int) -> None:
    """Greedy tokens one after the other, each brought to the host, as generation does."""
    cache, token = decoder.new_cache(1, count + 1), 1
    for _ in range(count):
        token = int(decoder.extend([token], cache).argmax())


def decode_rate(decoder: Decoder, count: int) -> float:
    """Tokens per second of decoding from an empty cache, a few before that aside."""
    cache, token = decoder.new_cache(1, WARM_UP + count), 1
    for _ in range(WARM_UP):
        token = int(decoder.extend([token], cache).argmax())
    with timed() as seconds:
        for _ in range(count):
            token = int(decoder.extend([token], cache).argmax())
    return count / seconds[0]


def prefill_rate(decoder: Decoder, count: int) -> float:
    """Tokens per second of one prompt; the second run of it."""
    ids = torch.randint(0, decoder.spec.vocab_size, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    decoder.extend(ids, decoder.new_cache(1, count))
    cache = decoder.new_cache(1, count)
    with timed() as seconds:
        decoder.extend(ids, cache)
    return count / seconds[0]
