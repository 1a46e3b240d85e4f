"""The log-probabilities of the next token after each text: python llama_logprobs.py FILE '[[ids], [ids]]'.

Prints a JSON list of lists, in the order of ids. Runs in an environment with xllamacpp, and needs nothing else.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    import xllamacpp

    path, texts = sys.argv[1], json.loads(sys.argv[2])
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = 64
    params.n_parallel = 1
    params.cpuparams.n_threads = 1
    params.warmup = False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    answers = []
    for ids in texts:
        request = {"prompt": ids, "n_predict": 1, "n_probs": 1 << 20, "temperature": 0.0, "cache_prompt": False}
        answer = server.handle_completions(request)
        if "choices" not in answer:
            raise SystemExit(f"llama.cpp answers {answer}")
        chosen = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        by_id = {entry["id"]: entry["logprob"] for entry in chosen}
        answers.append([by_id[index] for index in range(len(by_id))])
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
