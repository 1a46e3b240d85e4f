"""Build or install the engines that kbit is compared with, into a folder of their own.

    python tools/peers/install.py                      # all of them: about 10 minutes on 2 cores, 2 GB
    python tools/peers/install.py llama.cpp gguf       # only these
    python tools/peers/install.py --list               # what is there

llama.cpp     llama-bench and its companions, built natively from the source distribution of llama-cpp-python, with a
              compiler barrier added that its AMX code needs with GCC 12; a second time without AMX where the CPU has it
gguf          the default model as F16, Q4_0, Q8_0, Q2_K, Q3_K_M and Q4_0 throughout (needs llama.cpp)
openvino      OpenVINO GenAI, from its wheels
onnxruntime   onnxruntime-genai, from its wheels, and the default model in ONNX at 4 and 8 bits

The folder is KBIT_PEERS, or `peers` in kbit's cache folder; peers.json in it says what is there, and
benchmarks/peers.py reads that. Finished steps are skipped, interrupted ones go on, so run it again at will. Run it with
the Python that kbit is installed in (with its `test` extra: the ONNX model builder needs transformers). Exits with 1
when a peer could not be had, after trying the others.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from common import PeerError, Record, peers_dir, say
from llama_cpp import install as install_llama_cpp
from llama_cpp import make_ggufs
from runtimes import install_onnxruntime, install_openvino

PEERS = ("llama.cpp", "gguf", "openvino", "onnxruntime")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"{', '.join(PEERS)}; all of them by default")
    parser.add_argument("--folder", type=Path, help="instead of KBIT_PEERS or the cache folder")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compiler processes at once")
    parser.add_argument("--force", action="store_true", help="make anew what is there")
    parser.add_argument("--list", action="store_true", help="say what is there, and install nothing")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.peers if name not in PEERS]
    if unknown:
        parser.error(f"{unknown[0]}: no such peer; use one of {', '.join(PEERS)}")
    if arguments.jobs < 1:
        parser.error(f"--jobs {arguments.jobs}: use at least 1")
    try:
        folder = arguments.folder.expanduser().absolute() if arguments.folder else peers_dir()
        folder.mkdir(parents=True, exist_ok=True)
        record = Record(folder)
    except (OSError, PeerError) as error:
        say(f"error: {error}")
        return 1
    if arguments.list:
        for name in PEERS:
            entry = record.entry(name)
            say(f"{name:<14}{entry.get('version', 'missing')}")
            for path in entry.get("paths", {}).values():
                say(f"{'':<14}{path}{'' if Path(path).exists() else '  (gone)'}")
        return 0
    steps: dict[str, Callable[[], None]] = {
        "llama.cpp": lambda: install_llama_cpp(folder, record, jobs=arguments.jobs, force=arguments.force),
        "gguf": lambda: make_ggufs(folder, record, force=arguments.force),
        "openvino": lambda: install_openvino(folder, record, force=arguments.force),
        "onnxruntime": lambda: install_onnxruntime(folder, record, force=arguments.force),
    }
    failed = []
    for name in (peer for peer in PEERS if peer in (arguments.peers or PEERS)):
        try:
            steps[name]()
        except (PeerError, OSError) as error:
            say(f"{name}: error: {error}")
            failed.append(name)
    if failed:
        say(f"missing: {', '.join(failed)}; run this again once the cause is removed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
