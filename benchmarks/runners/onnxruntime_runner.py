"""onnxruntime-genai as a runner (protocol.py), for the Python of its own environment.

    echo '{"do": "decode", "tokens": 128}' | PEERS/onnxruntime/venv/bin/python \\
        benchmarks/runners/onnxruntime_runner.py PEERS/onnxruntime/smollm2-135m-instruct-int4 --threads 2

Actions: decode(tokens, depth=8), prefill(tokens), memory(). Its times include greedy sampling, which takes next to
nothing.
"""

from __future__ import annotations

import argparse
import json
import random
from time import perf_counter
from typing import Any

from protocol import FIRST_PROMPT, Startup, claim_stdout, resident_bytes, serve


class Runner:
    """A loaded model."""

    def __init__(self, model: Any, vocabulary: int = 49152) -> None:
        import numpy
        import onnxruntime_genai

        self.numpy, self.genai = numpy, onnxruntime_genai
        self.model, self.vocabulary, self.random = model, vocabulary, random.Random(0)

    def _generator(self, prompt: int, tokens: int) -> tuple[Any, Any]:
        """A generator with room for prompt and tokens, and random ids for the prompt."""
        parameters = self.genai.GeneratorParams(self.model)
        # min_length: an end-of-text token must not end the measurement.
        room = prompt + tokens + 1
        parameters.set_search_options(max_length=room, min_length=room, do_sample=False)
        ids = [self.random.randrange(100, self.vocabulary) for _ in range(prompt)]
        return self.genai.Generator(self.model, parameters), self.numpy.array(ids, dtype=self.numpy.int32)

    def decode(self, tokens: int, depth: int = 8) -> dict[str, Any]:
        """`tokens` steps after the first token of a prompt of `depth` tokens."""
        generator, ids = self._generator(max(depth, 1), tokens + 1)
        generator.append_tokens(ids)
        generator.generate_next_token()
        begin = perf_counter()
        for _ in range(tokens):
            generator.generate_next_token()
        return {"seconds": perf_counter() - begin, "tokens": tokens}

    def prefill(self, tokens: int) -> dict[str, Any]:
        """The time to the first token of a prompt of `tokens` tokens."""
        generator, ids = self._generator(tokens, 1)
        begin = perf_counter()
        generator.append_tokens(ids)
        generator.generate_next_token()
        return {"seconds": perf_counter() - begin, "tokens": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder with genai_config.json")
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    out = claim_stdout()

    startup = Startup()
    import onnxruntime_genai

    startup.imported()
    config = onnxruntime_genai.Config(arguments.model)
    session = {"intra_op_num_threads": arguments.threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    model = onnxruntime_genai.Model(config)
    tokenizer = onnxruntime_genai.Tokenizer(model)
    startup.loaded()
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=32, do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(tokenizer.encode(FIRST_PROMPT))
    generator.generate_next_token()
    startup.first_token()
    del generator
    ready = {
        **startup.seconds,
        "backend": f"onnxruntime-genai {onnxruntime_genai.__version__}",
    }
    runner = Runner(model)
    serve(out, ready, {"decode": runner.decode, "prefill": runner.prefill, "memory": resident_bytes})


if __name__ == "__main__":
    main()
