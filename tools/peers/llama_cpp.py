"""llama.cpp, built for this machine from the tree inside the sdist of llama-cpp-python, and its GGUF files."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import sys
import tarfile
from pathlib import Path

from common import PeerError, Record, run, say

VERSION = "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"  # of the sdist of that version
TOOLS = (
    "llama-bench",
    "llama-batched-bench",
    "llama-completion",
    "llama-perplexity",
    "llama-quantize",
    "llama-imatrix",
)
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
)
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
# Name -> arguments of llama-quantize. "-pure" has the tied embedding and head at the same width as the rest, where
# llama.cpp otherwise keeps them at 8 bits in a model of this size.
GGUFS = {
    "Q4_0": ["Q4_0"],
    "Q8_0": ["Q8_0"],
    "Q2_K": ["Q2_K"],
    "Q3_K_M": ["Q3_K_M"],
    "Q4_0-pure": ["--pure", "Q4_0"],
}
_LOAD_CONFIG = re.compile(r"^([ \t]*)_tile_loadconfig\(&(\w+)\);[ \t]*$", re.MULTILINE)
_BARRIER = (
    "{indent}// GCC 12 declares only 8 bytes of the configuration as input and may drop the stores above.\n"
    '{indent}asm volatile("" : : "r"(&{name}) : "memory");\n'
    "{indent}_tile_loadconfig(&{name});"
)


def install(folder: Path, record: Record, *, jobs: int, force: bool) -> None:
    """Download, patch, build. Each step is skipped where its result is there."""
    # A build without AMX is the peer of a kbit without AMX; elsewhere it would be the same program twice.
    variants = {"native": "", **({"no-amx": NO_AMX} if has_amx() else {})}
    key = f"llama-cpp-python {VERSION}; barrier; {' '.join(OPTIONS)}; {' '.join(TOOLS)}; {' '.join(variants)}"
    if not force and record.finished("llama.cpp", key):
        say("llama.cpp: already there")
        return
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            raise PeerError(f"{tool} is not on the PATH; install it, for example with apt-get install cmake g++")
    home = folder / "llama.cpp"
    source = fetch(home, force=force)
    add_barrier(source, home / "logs")
    paths = {
        name: build(source, home / f"build-{name}", flags, home / "logs", jobs=jobs, force=force)
        for name, flags in variants.items()
    }
    record.write("llama.cpp", key, paths, version=f"llama-cpp-python {VERSION}")
    say(f"llama.cpp: {', '.join(str(path) for path in paths.values())}")


def fetch(home: Path, *, force: bool) -> Path:
    """The source tree, downloaded through pip and unpacked; its folder."""
    source = home / f"source-{VERSION}"
    if source.is_dir() and not force:
        return source
    downloads = home / "downloads"
    archive = downloads / f"llama_cpp_python-{VERSION}.tar.gz"
    if not archive.is_file() or _sha256(archive) != SHA256:
        say(f"llama.cpp: downloading llama-cpp-python {VERSION} (77 MB)")
        wanted = ["--no-deps", "--no-binary", "llama-cpp-python", "--dest", downloads, f"llama-cpp-python=={VERSION}"]
        run([sys.executable, "-m", "pip", "download", *wanted], home / "logs" / "download.log")
        if not archive.is_file() or _sha256(archive) != SHA256:
            raise PeerError(
                f"{archive}: not the source distribution expected (sha256 differs); delete it and try again"
            )
    say("llama.cpp: unpacking")
    inside = f"llama_cpp_python-{VERSION}/vendor/llama.cpp/"
    partial = home / "source.partial"
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(archive) as tar:
        members = [member for member in tar.getmembers() if member.name.startswith(inside)]
        if not members:
            raise PeerError(f"{archive}: holds no {inside}; this version of llama-cpp-python has another layout")
        if not hasattr(tarfile, "data_filter"):
            raise PeerError("this Python unpacks archives unsafely; use 3.10.12, 3.11.4 or later")
        tar.extractall(partial, members=members, filter="data")
    shutil.rmtree(source, ignore_errors=True)
    (partial / inside).rename(source)
    shutil.rmtree(partial)
    return source


def add_barrier(source: Path, logs: Path) -> None:
    """Put a compiler barrier before every load of an AMX tile configuration, and see that the result compiles.

    Without it GCC 12 may remove the stores that fill the structure, and the load faults.

    Raises:
        PeerError: there is no such load, or the patched file does not compile.
    """
    files = [path for path in sorted((source / "ggml/src/ggml-cpu/amx").glob("*.[ch]*")) if _loads(path)]
    if not files:
        raise PeerError(f"{source}/ggml/src/ggml-cpu/amx: no _tile_loadconfig(&...) to put the AMX barrier before")
    for path in files:
        text = path.read_text()
        patched = _LOAD_CONFIG.sub(_with_barrier, text)
        if patched == text:
            continue
        path.write_text(patched)
        say(f"llama.cpp: AMX barrier put into {path.name}")
    if platform.machine() == "x86_64":
        include = [f"-I{source / 'ggml' / part}" for part in ("include", "src", "src/ggml-cpu")]
        flags = ["-std=gnu++17", "-march=sapphirerapids", "-fsyntax-only", *include]
        for path in files:
            run(["c++", *flags, path], logs / f"check-{path.stem}.log")


def _loads(path: Path) -> bool:
    return "_tile_loadconfig(&" in path.read_text()


def _with_barrier(match: re.Match[str]) -> str:
    before = match.string[: match.start()].rstrip().rsplit("\n", 1)[-1]
    if "asm volatile" in before:  # patched by an earlier run
        return match[0]
    return _BARRIER.format(indent=match[1], name=match[2])


def build(source: Path, target: Path, flags: str, logs: Path, *, jobs: int, force: bool) -> Path:
    """Configure and build the tools in `target` (make goes on where it was stopped); the folder they are in."""
    if force:
        shutil.rmtree(target, ignore_errors=True)
    say(f"llama.cpp: building {target.name} with {jobs} jobs (about 5 minutes on 2 cores)")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    extra = [f"-DCMAKE_C_FLAGS={flags}", f"-DCMAKE_CXX_FLAGS={flags}"] if flags else []
    run(["cmake", "-S", source, "-B", target, *generator, *OPTIONS, *extra], logs / f"configure-{target.name}.log")
    command = ["cmake", "--build", target, "--parallel", str(jobs), "--target", *TOOLS]
    run(command, logs / f"{target.name}.log", progress=True)
    return target / "bin"


def make_ggufs(folder: Path, record: Record, *, force: bool) -> None:
    """The default model as F16 and in llama.cpp's own formats, each made from the F16 file."""
    from kbit.checkpoint.pull import DEFAULT_MODEL, pull

    quantize = Path(record.entry("llama.cpp").get("paths", {}).get("native", "")) / "llama-quantize"
    if not quantize.is_file():
        raise PeerError("llama-quantize is not there; install the peer llama.cpp first")
    key = f"{DEFAULT_MODEL}; {record.entry('llama.cpp')['version']}; {GGUFS}"
    if not force and record.finished("gguf", key):
        say("gguf: already there")
        return
    source, home = pull(DEFAULT_MODEL), folder / "gguf"
    home.mkdir(parents=True, exist_ok=True)
    stale = force or record.entry("gguf").get("key", key) != key
    paths = {name: home / f"{DEFAULT_MODEL}-{name}.gguf" for name in ("F16", *GGUFS)}
    for name, path in paths.items():
        if path.is_file() and not stale:
            continue
        say(f"gguf: {path.name}")
        partial = path.with_suffix(".partial")
        given, arguments = (source, ["F16"]) if name == "F16" else (paths["F16"], GGUFS[name])
        *options, kind = arguments
        words = [quantize, "--allow-requantize", *options, given, partial, kind, str(os.cpu_count() or 1)]
        run(words, home / "logs" / f"{name}.log")
        partial.replace(path)
    record.write("gguf", key, paths, version=record.entry("llama.cpp")["version"])
    say(f"gguf: {home}")


def has_amx() -> bool:
    """Whether this machine has AMX tiles (Linux on x86-64; elsewhere none is assumed)."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and " amx_tile" in cpuinfo.read_text()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
