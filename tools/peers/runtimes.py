"""OpenVINO GenAI and onnxruntime-genai from their wheels, each in a virtual environment of its own."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sysconfig
from pathlib import Path

from common import PeerError, Record, make_venv, run, say

OPENVINO = ("openvino-genai==2026.4.1.0",)
# onnx and onnx_ir are for the model builder, which also imports torch and transformers: those it finds in the
# environment of kbit, so that they are not installed twice.
ONNXRUNTIME = ("onnxruntime-genai==0.18.0", "onnx==1.23.2", "onnx_ir==1.1.0")
_BUILDER = """
import runpy, sys
sys.path.append({shared!r})
sys.argv = ["builder", *{arguments!r}]
runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
"""


def install_openvino(folder: Path, record: Record, *, force: bool) -> None:
    """OpenVINO GenAI, which reads the GGUF files as they are."""
    key = " ".join(OPENVINO)
    if not force and record.finished("openvino", key):
        say("openvino: already there")
        return
    home = folder / "openvino"
    say(f"openvino: installing {key}")
    python = make_venv(home / "venv", OPENVINO, home / "logs" / "pip.log")
    run([python, "-c", "import openvino_genai"], home / "logs" / "import.log")
    record.write("openvino", key, {"python": python}, version=key)
    say(f"openvino: {python}")


def install_onnxruntime(folder: Path, record: Record, *, force: bool) -> None:
    """onnxruntime-genai, and the default model in ONNX at 4 and 8 bits, made by its own model builder."""
    from kbit.checkpoint.pull import DEFAULT_MODEL

    key = f"{DEFAULT_MODEL}; {' '.join(ONNXRUNTIME)}"
    if not force and record.finished("onnxruntime", key):
        say("onnxruntime: already there")
        return
    for module in ("transformers", "torch"):
        if importlib.util.find_spec(module) is None:
            raise PeerError(f"the ONNX model builder needs {module} beside kbit; run pip install {module}")
    home = folder / "onnxruntime"
    say(f"onnxruntime: installing {' '.join(ONNXRUNTIME)}")
    python = make_venv(home / "venv", ONNXRUNTIME, home / "logs" / "pip.log")
    checkpoint = home / "checkpoint"
    write_hugging_face_folder(DEFAULT_MODEL, checkpoint)
    paths = {"python": python}
    for bits in (4, 8):
        paths[f"int{bits}"] = target = home / f"{DEFAULT_MODEL}-int{bits}"
        if (target / "genai_config.json").is_file() and not force:
            continue
        say(f"onnxruntime: building {target.name}")
        partial = home / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        # hf_token=false: the builder asks for a token even where nothing is to be downloaded.
        arguments = ["-m", checkpoint, "-i", checkpoint, "-o", partial, "-c", home / "builder-cache"]
        arguments += ["-p", f"int{bits}", "-e", "cpu", "--extra_options", "hf_token=false"]
        shared = sysconfig.get_path("purelib")
        code = _BUILDER.format(shared=shared, arguments=[str(word) for word in arguments])
        run([python, "-c", code], home / "logs" / f"int{bits}.log")
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    shutil.rmtree(checkpoint)
    shutil.rmtree(home / "builder-cache", ignore_errors=True)
    record.write("onnxruntime", key, paths, version=ONNXRUNTIME[0])
    say(f"onnxruntime: {home}")


def write_hugging_face_folder(model: str, folder: Path) -> None:
    """A model as a Hugging Face folder in fp16, for tools that read nothing else. For models that fit memory."""
    from safetensors.torch import save_file

    from kbit.models.opening import open_model

    folder.mkdir(parents=True, exist_ok=True)
    with open_model(model) as source:
        tensors = {name: source.read(name).half() for name in source.tensors}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        for name, content in source.sidecar_files().items():
            (folder / name).write_bytes(content)
        (folder / "config.json").write_text(json.dumps({**source.config, "dtype": "float16"}, indent=1))
