"""Runs openai-python's own tests of its client against a running `kbit serve`, and says which failures have no reason.

    kbit serve NAME=MODEL --port 8433 --any-model                # a model with a chat template
    python -m venv judges
    judges/bin/pip install 'openai[aiohttp]==3.51.0' pytest pytest-asyncio time-machine inline-snapshot rich respx
    pip download --no-deps --no-binary openai openai==3.51.0 && tar xzf openai-3.51.0.tar.gz
    judges/bin/python tools/judges/openai_sdk.py openai-3.51.0 http://127.0.0.1:8433

The tests send odd but legal parameters and check the types of answers. Exit code 1: a failure that is not listed below.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter

FILES = ("chat/test_completions", "test_completions", "test_models", "test_responses")
# What a failed test was told (a regular expression), and why that is right.
REASONS = {
    r"GET is not what /v1/chat/completions takes": "nothing is stored, so nothing can be listed",
    r"there is no /v1/chat/completions/completion_id": "nothing is stored, so nothing can be fetched",
    r"there is no /v1/responses/(resp_|compact)": "nothing is stored, so nothing can be fetched or cancelled",
    r"(DELETE is not what|there is no) /v1/models/": "models are not deleted over HTTP",
    r"suffix: this server does not fill in texts": "refused by name: not implemented",
    r"web_search_options: this server searches nothing": "refused by name: there is no search",
    r"moderation: this server moderates nothing": "refused by name: there is no moderation",
    r"access_programs: this server does not know": "refused by name: of OpenAI's accounts",
    r"input: there is none": "a response to nothing: the tests leave the input out",
}


def main() -> int:
    """Runs the tests; prints the counts."""
    folder, address = sys.argv[1:3]
    files = [f"tests/api_resources/{name}.py" for name in FILES]
    environment = {**os.environ, "TEST_API_BASE_URL": f"{address}/v1", "PYTHONPATH": "src"}
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "--tb=short", "-rf", *files]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    print(lines[-1])
    told = [line for line in lines if re.match(r"E +\S*(Error|Exception|assert)", line)]
    counts: Counter[str] = Counter()
    unexplained = []
    for line in told:
        reason = next((why for pattern, why in REASONS.items() if re.search(pattern, line)), None)
        counts[reason or "no reason"] += 1
        if reason is None:
            unexplained.append(line)
    for reason, count in counts.most_common():
        print(f"{count:4d} failed: {reason}")
    print(*sorted(set(unexplained)), sep="\n")
    return 1 if unexplained or (done.returncode and not told) else 0


if __name__ == "__main__":
    sys.exit(main())
