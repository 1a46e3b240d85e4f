"""What a process costs before it has a model: `kbit run` on a decoder of one layer, made on the spot.

Its peak of resident memory, less what the planner says that such a model takes, is the constant of every other model;
and its time per token is nearly all Python's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kbit.host.errors import KbitError
from kbit.models.families import spec_from_config
from kbit.planner.memory import predict_memory
from kbit.planner.weights import planned_weights

PROMPT, TOKENS = 600, 200
_SHORT = 16  # tokens of the prompt that shows what any prompt costs
_FIGURES = ("peak_rss_bytes", "decode_tokens_per_second", "time_to_first_token_s")
# A probe that takes longer than this hangs.
_SECONDS = 120
_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Probe:
    """What a process without a model takes.

    Attributes:
        nbytes: of resident memory at its peak.
        token_seconds: per token.
        prompt_seconds: until the first token.
    """

    nbytes: int
    token_seconds: float
    prompt_seconds: float


def probe(threads: int, compute: str) -> Probe:
    """Run the smallest of models.

    Raises:
        KbitError: `kbit run` did not run it.
    """
    # Not in the current folder: it may hold a kbit/, which a Python started there would import.
    with tempfile.TemporaryDirectory(prefix="kbit-") as folder:
        model = Path(folder) / "model"
        model.mkdir()
        write_model(model)
        long = _run(model, threads, compute, PROMPT)
        short = _run(model, threads, compute, _SHORT)
    spec = spec_from_config(_CONFIG)
    kv = "fp32" if compute == "fp32" else "fp16"
    own = predict_memory(
        spec, planned_weights(spec, "fp16"), context=PROMPT + TOKENS, kv=kv, compute=compute, threads=threads
    )
    return Probe(
        max(int(long["peak_rss_bytes"]) - own.peak, 1),
        1 / long["decode_tokens_per_second"],
        short["time_to_first_token_s"],
    )


def _run(model: Path, threads: int, compute: str, tokens: int) -> dict[str, float]:
    """What `kbit run` reports of a prompt of so many tokens."""
    command = [sys.executable, "-m", "kbit", "run", "-", "--model", str(model), "--max-tokens", str(TOKENS)]
    command += ["--threads", str(threads), "--compute", compute, "--device", "cpu", "--json"]
    text = "x" * tokens
    try:
        done = subprocess.run(
            command, cwd=model.parent, input=text, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
        answer = json.loads(done.stdout)
        found = {name: float(answer[name]) for name in _FIGURES}
    except subprocess.TimeoutExpired:
        raise KbitError(f"the smallest of models took over {_SECONDS} s to run: is this machine busy?") from None
    except (ValueError, KeyError, TypeError):
        reason = (done.stderr.strip().splitlines() or ["kbit run printed nothing"])[-1][:200]
        raise KbitError(f"the smallest of models could not be run here: {reason}") from None
    if min(found.values()) <= 0:
        raise KbitError("the smallest of models ran, but this system does not tell its memory or time")
    return found


def write_model(folder: Path) -> None:
    """The model: zeros everywhere, so that it says the same token for ever, with a tokenizer of bytes."""
    import numpy as np
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    shapes = spec_from_config(_CONFIG).expected_tensors()
    save_file({name: np.zeros(shape, dtype=np.float16) for name, shape in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(_CONFIG), encoding="utf-8")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
