"""Whole models on a GPU: decoding and prefill of kbit at several widths, beside transformers and bitsandbytes.

    pytest benchmarks/test_gpu_engine.py --device cuda -s
    KBIT_BENCH_MODEL=path/to/hf-folder pytest benchmarks/test_gpu_engine.py --device cuda -s -k decode

These have not run on a GPU here: there is none. The model is the default one, or the Hugging Face folder that
KBIT_BENCH_MODEL names (which the other libraries then run too); it is converted once per width and kept in the cache.
Before anything is timed, logits are compared with the reference's on the CPU. Nothing is asserted about time.
`share_of_bandwidth` is tokens/s times the bytes of weights and cache read per token, over the measured copy bandwidth.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import bandwidth, facts, timed
from measuring import ROUNDS, Contestant, report, take_turns

# Every width of the default model; of a larger one fewer, since all that are compared are in memory at once.
BITS = (2, 3, 4, 8) if os.environ.get("KBIT_BENCH_MODEL") else tuple(range(2, 9))
DECODE, WARM_UP = 128, 8  # tokens
DEPTHS = (0, 4096)
ROUNDED = ("int8", "fp8")  # --compute with activations in 8 bits, which are for prompts
PROMPT = 2048
TEXT = list(range(1, 65))  # ids that every vocabulary has
LONG_TEXT = list(range(1, 121))  # more than ROUNDED_TOKENS, so that int8 and fp8 round
# Mean nats per token between the reference's predictions and ours for the same weights: rounding to half precision
# should stay far below this, a wrong kernel far above. 8-bit activations cost 0.005 to 0.02 on WikiText-2.
MOST_KL = {"fp16": 0.01, "int8": 0.2, "fp8": 0.2}


@pytest.fixture(scope="session")
def models(converted: Callable[[int, int], Path]) -> Callable[[int], Path]:
    """A function from bits to the converted model's folder."""
    named = os.environ.get("KBIT_BENCH_MODEL")
    if not named:
        return lambda bits: converted(bits, bits)
    source = Path(named).resolve()

    def convert(bits: int) -> Path:
        from kbit.host.cache_folder import cache_dir

        folder = cache_dir() / "benchmarks" / f"{source.name}-{bits}bit"
        command = [
            "-m",
            "kbit.cli.main",
            "quantize",
            source,
            "--bits",
            bits,
            "--method",
            "rtn",
            "--embedding-bits",
            bits,
            "-o",
            folder,
        ]
        if not (folder / "config.json").is_file():
            words = [str(word) for word in (sys.executable, *command, "--force")]
            subprocess.run(words, check=True, capture_output=True, cwd=Path.home())
        return folder

    return convert


class Model:
    """A loaded model and what is measured of it.

    Args:
        folder: the converted model.
        kv_bits: of the cache.
        compute: "fp16", "int8" or "fp8".
    """

    def __init__(self, folder: Path, kv_bits: int, compute: str = "fp16") -> None:
        from kbit.engine.loader import load_model

        self.compute = compute
        self.decoder = load_model(str(folder), device="cuda", kv_bits=kv_bits, compute=compute).decoder
        weights = self.decoder.weights
        tied = weights.head is weights.embedding
        self.bytes_per_token = weights.nbytes - (0 if tied else weights.embedding.nbytes)
        self._caches: dict[int, Any] = {}

    def ids(self, tokens: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, self.decoder.spec.vocab_size, (1, tokens), generator=generator)

    def decode(self, depth: int) -> float:
        """Tokens per second of DECODE single-token steps after `depth` tokens."""
        cache = self._caches.get(depth)
        if cache is None:
            cache = self._caches[depth] = self.decoder.new_cache(1, depth + WARM_UP + DECODE)
            if depth:
                self.decoder.forward(self.ids(depth), cache, last_only=True)
        cache.truncate(depth)
        steps = self.ids(WARM_UP + DECODE).split(1, dim=1)
        for step in steps[:WARM_UP]:
            self.decoder.forward(step, cache, last_only=True)
        with timed() as seconds:
            for step in steps[WARM_UP:]:
                self.decoder.forward(step, cache, last_only=True).argmax(
                    -1
                ).cpu()  # sampling needs every token's logits
        return DECODE / seconds[0]

    def prefill(self) -> float:
        """Tokens per second of a prompt of PROMPT tokens."""
        cache = self._caches.get(-1)
        if cache is None:
            cache = self._caches[-1] = self.decoder.new_cache(1, PROMPT)
        cache.truncate(0)
        ids = self.ids(PROMPT)
        with timed() as seconds:
            self.decoder.forward(ids, cache, last_only=True).cpu()
        return PROMPT / seconds[0]

    def cache_bytes(self, depth: int) -> int:
        """Bytes of keys and values that a token at that depth reads."""
        return int(self.decoder.new_cache(1, max(1, depth)).nbytes) if depth else 0


def assert_right(folder: Path, model: Model) -> float:
    """Mean KL divergence from the reference, on the CPU, for the same weights: of a prompt's logits, then of decoding.

    Raises:
        AssertionError: more than rounding explains.
    """
    from kbit.engine.loader import load_model

    reference = load_model(str(folder), device="cpu", backend="reference").decoder
    text = TEXT if model.compute == "fp16" else LONG_TEXT
    ids = torch.tensor([text])
    expected = reference.forward(ids, reference.new_cache(1, len(text))).double().log_softmax(-1)
    cache = model.decoder.new_cache(1, len(text))
    parts = ids.split([len(text) - 8, *[1] * 8], dim=1)
    found = torch.cat([model.decoder.forward(part, cache).cpu() for part in parts], dim=1).double().log_softmax(-1)
    divergence = float((expected.exp() * (expected - found)).sum(-1).mean())
    assert divergence < MOST_KL[model.compute], f"{folder.name}: KL {divergence:.2e} from the reference"
    return divergence


def kbit_contestants(
    models: Callable[[int], Path], measure: Callable[[Model], float], kv: tuple[int, ...], depth: int
) -> list[Contestant]:
    contestants = []
    for bits in BITS:
        folder = models(bits)
        for kv_bits in kv:
            model = Model(folder, kv_bits)
            about = {"bytes_per_token": model.bytes_per_token + model.cache_bytes(depth)}
            if kv_bits == 16:  # codes in the cache are a loss of their own, which kbit eval measures
                about["kl"] = assert_right(folder, model)
            name = f"kbit {bits} bits, {kv_bits}-bit KV"
            contestants.append(Contestant("kbit", name, lambda model=model: measure(model), about))
    return contestants


def rounded_contestants(models: Callable[[int], Path]) -> tuple[list[Contestant], list[str]]:
    """Prefill with activations in 8 bits, where the GPU and the model's formats allow it, and why not elsewhere."""
    from kbit.host.errors import UnsupportedError

    contestants, refused = [], []
    for compute in ROUNDED:
        for bits in BITS:
            name = f"kbit {bits} bits, --compute {compute}"
            try:
                model = Model(models(bits), 16, compute)
            except UnsupportedError as error:
                refused.append(f"{name}: {error}")
                continue
            about = {"bytes_per_token": model.bytes_per_token, "kl": assert_right(models(bits), model)}
            contestants.append(Contestant("kbit", name, model.prefill, about))
    return contestants, refused


def peers(measure: str, depth: int) -> tuple[list[Contestant], list[str]]:
    """transformers in fp16, and with bitsandbytes' nf4; and why any of them is missing."""
    found, missing = [], []
    folder = os.environ.get("KBIT_BENCH_MODEL")
    for name, package in (("transformers fp16", "transformers"), ("bitsandbytes nf4", "bitsandbytes")):
        if folder is None:
            missing.append(f"{name}: needs KBIT_BENCH_MODEL, a Hugging Face folder (the default model is a GGUF file)")
        elif find_spec("transformers") is None or find_spec(package) is None:
            missing.append(f"{name}: not installed; to install it: pip install transformers accelerate {package}")
        else:
            try:
                run = transformers_run(folder, package == "bitsandbytes", measure, depth)
                run()
                found.append(Contestant(name.split()[0], name, run))
            except Exception as error:  # another library's: of any kind
                missing.append(f"{name}: {(str(error) or type(error).__name__).splitlines()[0][:200]}")
    missing.append("llama.cpp, vLLM: engines of their own; run llama-bench and vllm bench latency beside this")
    return found, missing


def transformers_run(folder: str, quantized: bool, measure: str, depth: int) -> Callable[[], float]:
    """Tokens per second of transformers' model, eager, with its own cache."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {}
    if quantized:
        kind = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float16}
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, **kind)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, device_map="cuda", **options)
    ids = torch.randint(0, model.config.vocab_size, (1, max(PROMPT, depth, DECODE)), device="cuda")

    @torch.no_grad()
    def prefill() -> float:
        with timed() as seconds:
            model(ids[:, :PROMPT], logits_to_keep=1).logits.cpu()
        return PROMPT / seconds[0]

    @torch.no_grad()
    def decode() -> float:
        cache = model(ids[:, : max(1, depth)], use_cache=True, logits_to_keep=1).past_key_values
        for index in range(WARM_UP):
            model(ids[:, index : index + 1], past_key_values=cache, use_cache=True)
        with timed() as seconds:
            for index in range(DECODE):
                model(ids[:, index : index + 1], past_key_values=cache, use_cache=True).logits.argmax(-1).cpu()
        return DECODE / seconds[0]

    return decode if measure == "decode" else prefill


@pytest.mark.parametrize("depth", DEPTHS)
def test_decode(benchmark: Any, gpu: torch.device, models: Callable[[int], Path], depth: int) -> None:
    """Tokens per second, one sequence, CUDA graphs, every token's logits reduced and its id brought to the host."""
    contestants = kbit_contestants(models, lambda model: model.decode(depth), (16, 4) if depth else (16,), depth)
    others, missing = peers("decode", depth)
    take_turns(benchmark, [*contestants, *others], ROUNDS)
    for one in contestants:
        one.about["share_of_bandwidth"] = one.median * one.about["bytes_per_token"] / bandwidth()
    report(
        benchmark,
        "decode",
        "tokens/s",
        [*contestants, *others],
        missing=missing,
        goal="70 % of the bandwidth at 4 bits on a model of 7B or more",
        columns={"share_of_bandwidth": ".0%", "kl": ".1e"},
        depth=depth,
        **facts(),
    )


def test_prefill(benchmark: Any, gpu: torch.device, models: Callable[[int], Path]) -> None:
    """Tokens per second of one prompt."""
    contestants = kbit_contestants(models, Model.prefill, (16,), 0)
    rounded, refused = rounded_contestants(models)
    contestants += rounded
    others, missing = peers("prefill", 0)
    missing += refused
    take_turns(benchmark, [*contestants, *others], ROUNDS)
    report(
        benchmark,
        "prefill",
        "tokens/s",
        [*contestants, *others],
        missing=missing,
        goal="the rate of fp16 products, 70 % of it",
        columns={"kl": ".1e"},
        prompt=PROMPT,
        **facts(),
    )
