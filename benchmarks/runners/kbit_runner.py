"""kbit's engine as a runner (protocol.py), so that every thread count and instruction set has a process of its own.

    echo '{"do": "decode", "tokens": 128}' | python benchmarks/runners/kbit_runner.py smollm2-135m-instruct --threads 2
    KBIT_CPU_ISA=avx2 python benchmarks/runners/kbit_runner.py MODEL --threads 1 < /dev/null

Actions: decode(tokens, batch=1, depth=0), prefill(tokens), memory(). Times are of Decoder.forward alone: no sampling,
no text, as in llama-bench.
"""

from __future__ import annotations

import argparse
from time import perf_counter
from typing import Any

from protocol import FIRST_PROMPT, Startup, claim_stdout, resident_bytes, serve

WARM_UP = 3  # steps before the clock starts: the process may have been stopped for a while


class Runner:
    """A loaded model, and its caches by (batch, depth)."""

    def __init__(self, model: Any) -> None:
        import torch

        self.torch, self.decoder = torch, model.decoder
        self.random = torch.Generator().manual_seed(0)
        self._caches: dict[tuple[int, int], Any] = {}

    def ids(self, batch: int, tokens: int) -> Any:
        """Random token ids (B, T): what they say does not matter to the speed."""
        return self.torch.randint(0, self.decoder.spec.vocab_size, (batch, tokens), generator=self.random)

    def decode(self, tokens: int, batch: int = 1, depth: int = 0) -> dict[str, Any]:
        """`tokens` single-token steps of `batch` sequences that have `depth` tokens behind them."""
        cache = self._caches.get((batch, depth))
        if cache is None or cache.capacity < depth + WARM_UP + tokens:
            cache = self._caches[batch, depth] = self.decoder.new_cache(batch, depth + WARM_UP + tokens)
            if depth:
                self.decoder.forward(self.ids(batch, depth), cache, last_only=True)
        cache.truncate(depth)
        steps = self.ids(batch, WARM_UP + tokens).split(1, dim=1)
        for step in steps[:WARM_UP]:
            self.decoder.forward(step, cache, last_only=True)
        begin = perf_counter()
        for step in steps[WARM_UP:]:
            self.decoder.forward(step, cache, last_only=True)
        return {"seconds": perf_counter() - begin, "tokens": tokens * batch, "cache_bytes": cache.nbytes}

    def prefill(self, tokens: int) -> dict[str, Any]:
        """One pass over `tokens` tokens into an empty cache, logits of the last one."""
        cache = self._caches.get((1, -tokens))
        if cache is None:
            cache = self._caches[1, -tokens] = self.decoder.new_cache(1, tokens)
        cache.truncate(0)
        ids = self.ids(1, tokens)
        begin = perf_counter()
        self.decoder.forward(ids, cache, last_only=True)
        return {"seconds": perf_counter() - begin, "tokens": tokens, "cache_bytes": cache.nbytes}

    def bytes_per_token(self) -> int:
        """Bytes of weights that one decoded token reads: everything but an embedding that is only looked up in."""
        weights = self.decoder.weights
        return int(weights.nbytes - (0 if weights.head is weights.embedding else weights.embedding.nbytes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--compute", help="int8, bf16 or fp32; the engine's default if not given")
    parser.add_argument("--kv-bits", type=int, help="bits of the key/value cache; the engine's default if not given")
    arguments = parser.parse_args()
    out = claim_stdout()
    options = {"compute": arguments.compute, "kv_bits": arguments.kv_bits}

    startup = Startup()
    from kbit.cli.heavy import import_torch

    import_torch()  # as `kbit run` does
    import torch

    from kbit.engine.loader import load_model

    startup.imported()
    given = {name: value for name, value in options.items() if value is not None}
    model = load_model(arguments.model, device="cpu", threads=arguments.threads, **given)
    startup.loaded()
    prompt = torch.tensor([model.tokenizer.encode(FIRST_PROMPT)])
    model.decoder.forward(prompt, model.decoder.new_cache(1, prompt.shape[1] + 1), last_only=True)
    startup.first_token()

    runner = Runner(model)
    ready = {
        **startup.seconds,
        "backend": model.decoder.backend.describe(),
        "weights_bytes": model.decoder.weights.nbytes,
        "bytes_per_token": runner.bytes_per_token(),
    }
    serve(out, ready, {"decode": runner.decode, "prefill": runner.prefill, "memory": resident_bytes})


if __name__ == "__main__":
    main()
