"""What the default chat says to ten ordinary questions, and how it ends: the first impression, measured.

    python benchmarks/ten_questions.py                        # the default model, three seeds
    python benchmarks/ten_questions.py out/ --seeds 1 --quiet # figures only
    python benchmarks/ten_questions.py --transformers         # and the first token's distribution beside transformers'

Every question begins a conversation of its own, sampled as `kbit chat` does where no flag says otherwise. Figures: how
answers end (by themselves, at the limit of tokens, or stopped since they only repeated themselves), their length, and
the share of 4-grams of tokens that were in the answer before. --transformers takes a .gguf file (the default model's):
transformers dequantizes it by itself and computes in float32, so equal prompts and equal distributions mean that an odd
answer is the model's.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

QUESTIONS = (
    "What is the capital of France?",
    "Hello! How are you?",
    "What is 7 times 8?",
    "Write a haiku about rivers.",
    "Why is the sky blue?",
    "Give me three tips to sleep better.",
    "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet?",
    "How do I boil an egg?",
    "What can you help me with?",
)
MAX_TOKENS = 512


def repeated_share(ids: Sequence[int], length: int = 4) -> float:
    """The share of an answer's pieces of `length` tokens that were in it before; 0 of a shorter answer."""
    pieces = [tuple(ids[i : i + length]) for i in range(len(ids) - length + 1)]
    return 1 - len(set(pieces)) / len(pieces) if pieces else 0.0


def answers(loaded: Any, sampling: Any, question: str, seed: int) -> Any:
    """What a new conversation answers to a question."""
    from kbit.engine.conversation import Conversation

    conversation = Conversation(loaded.decoder, loaded.tokenizer, loaded.name)
    params = replace(sampling, seed=seed)
    return conversation.reply(question, params, max_tokens=MAX_TOKENS, stop_repetition=True).run()


def first_tokens(loaded: Any) -> list[tuple[list[int], NDArray[np.float64]]]:
    """Of every question the prompt, and log-probabilities of the answer's first token (V,)."""
    from kbit.engine.conversation import chat_prompt

    found = []
    for question in QUESTIONS:
        ids = chat_prompt(loaded.tokenizer, [{"role": "user", "content": question}], loaded.name)
        logits = loaded.decoder.extend(ids, loaded.decoder.new_cache(1, len(ids)))[0].astype(np.float64)
        found.append((ids, logits - np.logaddexp.reduce(logits)))
    return found


def of_transformers(file: Path) -> list[tuple[list[int], NDArray[np.float64]]]:
    """`first_tokens` by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    found = []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, -1].double()
        found.append((ids, torch.log_softmax(logits, -1).numpy()))
    return found


def compare(model: str, loaded: Any) -> None:
    """Prints both distributions of every question's first token."""
    from kbit.checkpoint.resolve import locate

    file = locate(model)
    if file is None or file.suffix != ".gguf":
        sys.exit(f"{model}: --transformers reads a .gguf file: name one, or leave MODEL out")
    ours, theirs = first_tokens(loaded), of_transformers(file)
    print("\nfirst token of the answer, probabilities by kbit / by transformers in float32:")
    for question, (ids, own), (their_ids, other) in zip(QUESTIONS, ours, theirs, strict=True):
        divergence = float(np.sum(np.exp(other) * (other - own)))
        top = np.argsort(-other)[:4]
        words = ", ".join(
            f"{loaded.tokenizer.decode([int(i)])!r} {np.exp(own[i]):.3f} / {np.exp(other[i]):.3f}" for i in top
        )
        same = "same prompt" if ids == their_ids else f"PROMPTS DIFFER ({len(ids)} and {len(their_ids)} tokens)"
        print(f"  {question:<40} {same}, KL {divergence:.5f}: {words}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--seeds", type=int, default=3, help="conversations for every question")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--compute", help="int8, bf16 or fp32; the engine's default if not given")
    parser.add_argument("--quiet", action="store_true", help="no answers, only figures")
    parser.add_argument("--transformers", action="store_true", help="compare the first token with transformers")
    arguments = parser.parse_args()
    from kbit.engine.loader import load_model
    from kbit.engine.sampling_defaults import sampling_defaults

    chosen: list[Any] = []
    loaded = load_model(
        arguments.model,
        "cpu",
        arguments.threads,
        compute=arguments.compute,
        check=lambda tokenizer, source: chosen.append(sampling_defaults(source, arguments.model)),
    )
    print(f"{loaded.name}: {loaded.backend_description}; {chosen[0]}")
    ends: Counter[str] = Counter()
    lengths, shares = [], []
    for question in QUESTIONS:
        for seed in range(1, arguments.seeds + 1):
            result = answers(loaded, chosen[0].params, question, seed)
            ends[result.finish_reason] += 1
            lengths.append(result.completion_tokens)
            shares.append(repeated_share(result.ids))
            if not arguments.quiet:
                print(f"\n> {question}  (seed {seed}: {result.finish_reason}, {result.completion_tokens} tokens)")
                print(result.text.strip())
    total = sum(ends.values())
    named = {"stop": "ended by themselves", "length": f"cut at {MAX_TOKENS} tokens", "repetition": "stopped repeating"}
    print(f"\n{total} answers: " + ", ".join(f"{count} {named.get(end, end)}" for end, count in ends.most_common()))
    middle, longest = np.median(lengths), max(lengths)
    print(f"tokens: median {middle:.0f}, longest {longest}; 4-grams said before: {np.mean(shares):.1%} on average")
    if arguments.transformers:
        compare(arguments.model, loaded)


if __name__ == "__main__":
    main()
