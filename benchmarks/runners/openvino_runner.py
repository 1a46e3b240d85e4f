"""OpenVINO GenAI as a runner (protocol.py), for the Python of its own environment.

    echo '{"do": "decode", "tokens": 128}' | PEERS/openvino/venv/bin/python \\
        benchmarks/runners/openvino_runner.py PEERS/gguf/smollm2-135m-instruct-Q4_0.gguf --threads 2

Actions: decode(tokens, depth=8), prefill(tokens), memory(). Prefix caching is off, and no prompt comes twice. Its times
include greedy sampling, which takes next to nothing.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

from protocol import FIRST_PROMPT, Startup, claim_stdout, resident_bytes, serve


class Runner:
    """A loaded pipeline."""

    def __init__(self, pipeline: Any, vocabulary: int = 49152) -> None:
        import numpy
        import openvino
        import openvino_genai

        self.numpy, self.openvino, self.genai = numpy, openvino, openvino_genai
        self.pipeline, self.vocabulary, self.random = pipeline, vocabulary, random.Random(0)

    def _generate(self, prompt: int, tokens: int) -> Any:
        """The metrics of generating `tokens` tokens after a random prompt."""
        ids = self.numpy.array([[self.random.randrange(100, self.vocabulary) for _ in range(prompt)]])
        mask = self.numpy.ones_like(ids)
        config = self.genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = tokens, True, False
        inputs = self.genai.TokenizedInputs(self.openvino.Tensor(ids), self.openvino.Tensor(mask))
        metrics = self.pipeline.generate(inputs, config).perf_metrics
        assert metrics.get_num_generated_tokens() == tokens, "generation stopped early"
        return metrics

    def decode(self, tokens: int, depth: int = 8) -> dict[str, Any]:
        """`tokens` steps after the first token of a prompt of `depth` tokens."""
        metrics = self._generate(max(depth, 1), tokens + 1)
        return {"seconds": metrics.get_tpot().mean / 1e3 * tokens, "tokens": tokens}

    def prefill(self, tokens: int) -> dict[str, Any]:
        """The time to the first token of a prompt of `tokens` tokens."""
        return {"seconds": self._generate(tokens, 1).get_ttft().mean / 1e3, "tokens": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a .gguf file")
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    out = claim_stdout()

    startup = Startup()
    import openvino_genai

    startup.imported()
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    pipeline = openvino_genai.LLMPipeline(
        arguments.model, "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=arguments.threads
    )
    startup.loaded()
    pipeline.generate(FIRST_PROMPT, max_new_tokens=1)
    startup.first_token()
    ready = {
        **startup.seconds,
        "backend": f"OpenVINO GenAI {openvino_genai.__version__}",
    }
    runner = Runner(pipeline)
    serve(out, ready, {"decode": runner.decode, "prefill": runner.prefill, "memory": resident_bytes})


if __name__ == "__main__":
    main()
