"""A GPU's first eight minutes: correctness, times, the model's estimates, tuning, speed, most valuable first.

    python tools/gpu_day.py --out results                 on a machine with a GPU
    python tools/gpu_day.py --device interpreter          the same steps in small, in Triton's interpreter: a rehearsal

Needs torch, triton, numpy, safetensors, tokenizers and this source tree; no network, nothing compiled. Every step runs
in a process of its own, with a time limit: one that crashes or hangs is written down and does not end the day. Results
are in OUT/gpu_day.json and OUT/gpu_day.md after every step. Exit code 1 if a check failed, 2 for wrong usage or no GPU.

Steps: 0 the machine; 1 every kernel, width and codec against the reference; 2 whole models, greedy tokens equal to the
reference's, with and without CUDA graphs, KV 16, 8 and 4; 3 what the GPU can do, times and shares of the roofline, and
other libraries; 4 the lint's estimates beside these times; 5 `kbit tune` on the three kernels furthest from their
floor; 6 tokens per second.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

TREE = Path(__file__).resolve().parent.parent
os.environ["KBIT_SOURCE_TREE"] = "1"  # this tree, compiled or not, whatever is installed
for folder in (TREE / "tests" / "cases", TREE / "benchmarks", TREE / "tools", TREE):
    if str(folder) in sys.path:
        sys.path.remove(str(folder))
    sys.path.insert(0, str(folder))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "interpreter"))
    parser.add_argument("--out", type=Path, default=Path("gpu_day"), help="folder of the results (default: gpu_day)")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument("--model", action="append", default=[], help="a model folder or .gguf file to run as well")
    parser.add_argument("--step", action="append", default=[], help="only this step, by name (may be repeated)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    if given.device == "interpreter":
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    from kbit.gpu_check import report
    from kbit.gpu_check.place import DRY, FULL, Place
    from kbit.gpu_check.runner import FAILED, Result, Step, run_steps
    from kbit.gpu_check.steps import correctness, performance

    dry = given.device == "interpreter"
    scale = DRY if dry else FULL
    times, tuned, speed = performance(scale)
    peers = Step("peers", "3. Times of others", "gpu_day_peers", 60)
    estimates = Step("estimates", "4. The lint's estimates", "gpu_day_estimates", 75, compiles=True)
    steps = [*correctness(scale), times, peers, estimates, tuned, speed]
    names = [step.name for step in steps]
    if wrong := set(given.step) - set(names):
        print(f"gpu_day.py: --step {', '.join(sorted(wrong))}: use {', '.join(names)}", file=sys.stderr)
        return 2
    steps = [step for step in steps if not given.step or step.name in (*given.step, "facts")]
    models = tuple(str(Path(model).resolve()) for model in given.model)
    place = Place("cpu" if dry else "cuda", scale, given.seed, models)
    given.out.mkdir(parents=True, exist_ok=True)
    started = time.time()

    def written(results: list[Result]) -> None:
        found = report.document(results, place, started, time.time())
        report.write(found, given.out / "gpu_day.json", given.out / "gpu_day.md")

    prepare = "triton_interpreter:install" if dry else ""
    say = lambda line: print(line, flush=True)  # noqa: E731
    results = run_steps(steps, place, seconds=60 * given.minutes, prepare=prepare, written=written, said=say)
    if results[0].outcome == FAILED:  # the machine: nothing else can have run
        print(f"gpu_day.py: {results[0].failures[-1]['error']}", file=sys.stderr)
        return 2
    print(f"{given.out / 'gpu_day.md'}: {'every check held' if report.all_right(results) else 'NOT every check held'}")
    return 1 if any(result.outcome == FAILED for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
