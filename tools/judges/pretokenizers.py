"""How words are split, by every name of a pre-tokenizer that kbit knows: its ids beside llama.cpp's.

    KBIT_DATA=data python tools/judges/pretokenizers.py

GPT-2's vocabulary (ggml-vocab-gpt-2.gguf of KBIT_DATA) under each name, texts that tell tokenizers apart. Lists the
texts that become other ids, and the names that llama.cpp's source has and kbit refuses. Differences are known where
llama.cpp has another regular expression than the models' tokenizer.json, which kbit follows (`DIFFERS`); exits with 1
where there are others.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "peers")]

from common import PeerError, make_venv, peers_dir  # noqa: E402
from gguf_families import XLLAMACPP  # noqa: E402
from llama_cpp import fetch  # noqa: E402

# Name: why llama.cpp's ids are others.
_NFC = "llama.cpp does not bring text into normal form C"
DIFFERS = dict.fromkeys(("modern-bert", "qwen2", "stablelm2", "f2llmv2", "qwen35"), _NFC)
DIFFERS["deepseek-llm"] = "llama.cpp has runs of digits, tokenizer.json each by itself"


def main() -> int:
    from tokenizers import Tokenizer

    from kbit.checkpoint.gguf.header import read_header
    from kbit.checkpoint.gguf.pretokenizers import PRE_TOKENIZERS
    from kbit.checkpoint.gguf.tokenizer import sidecars_from_header
    from kbit.checkpoint.gguf.tokenizer_out import PROBES
    from kbit.checkpoint.gguf.writing import GGUFWriter

    vocabulary = Path(os.environ.get("KBIT_DATA", "no-such-folder")) / "tokenizers" / "ggml-vocab-gpt-2.gguf"
    if not vocabulary.is_file():
        print(f"error: {vocabulary} is not there (KBIT_DATA)", file=sys.stderr)
        return 1
    home, texts, bad = peers_dir(), [text for text in PROBES if text], 0
    try:
        source = fetch(home / "llama.cpp", force=False)
        python = make_venv(home / "xllamacpp", [XLLAMACPP], home / "xllamacpp.log")
    except (OSError, PeerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    header = read_header(vocabulary)
    keys = {key: header.typed(key) for key in header if key != "general.alignment"}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{index}.gguf" for index, name in enumerate(PRE_TOKENIZERS)}
        for name, path in files.items():
            with GGUFWriter(path, {**keys, "tokenizer.ggml.pre": name}, []) as writer:
                writer.finish()
        command = [str(python), str(HERE / "llama_tokens.py"), json.dumps([*map(str, files.values())])]
        done = subprocess.run([*command, json.dumps(texts)], capture_output=True, text=True)
        if done.returncode:
            print(done.stderr[-2000:], file=sys.stderr)
            return 1
        theirs = json.loads(done.stdout.splitlines()[-1])
        for (name, path), found in zip(files.items(), theirs, strict=True):
            ours = Tokenizer.from_buffer(sidecars_from_header(read_header(path), 2048)["tokenizer.json"])
            mine = [ours.encode(text, add_special_tokens=False).ids for text in texts]
            other = ["all: llama.cpp does not open it"] if found is None else []
            other += [text for text, one, two in zip(texts, mine, found or mine, strict=True) if one != two]
            bad += bool(other) and name not in DIFFERS
            print(f"{name:<26}{len(other):>3} of {len(texts)}  {DIFFERS.get(name, '')}{other if other else ''}")
    known = re.findall(r'tokenizer_pre == "([^"]+)"', (source / "src" / "llama-vocab.cpp").read_text())
    refused = [name for name in dict.fromkeys(known) if name not in PRE_TOKENIZERS]
    print(f"llama.cpp knows {len(set(known))} names; kbit refuses {len(refused)}: {', '.join(refused)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
