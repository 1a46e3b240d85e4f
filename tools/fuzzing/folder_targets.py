"""Model folders: kbit's own, with manifest and parts, and those that other quantizers have packed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from random import Random
from typing import Any

import torch  # read() needs it: not to be imported, and counted, in the middle of the first input

from fuzzing.file_targets import mutate_safetensors
from fuzzing.mutations import mutate_json
from fuzzing.target import Target, join_head, split_head
from kbit.checkpoint.resolve import open_model
from kbit.checkpoint.source import StoredSource

_FORMATS = ("nf4-b64", "int3-b32-asym-dq", "lloyd2-row", "float8-b16", "trellis3", "int4-b0", "", "nf99-b64")


class Folder(Target):
    """A folder of config.json and model.safetensors: opened, every tensor read in each way that there is.

    Its inputs are a line of JSON, the files beside the weights by name, then the weights.
    """

    longest = 1 << 17
    values: tuple[Any, ...] = ()

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        os.environ["KBIT_CACHE"] = str(scratch / "cache")
        self.folder = scratch / "model"
        self.folder.mkdir(exist_ok=True)

    def run(self, data: bytes) -> None:
        files, weights = split_head(data)
        if not isinstance(files, dict):
            return
        self.write(files, weights)
        with open_model(str(self.folder)) as source:
            for name in source.tensors:
                assert isinstance(source.read(name), torch.Tensor)
                if isinstance(source, StoredSource):
                    source.read_stored(name)

    def write(self, files: dict[str, Any], weights: bytes) -> None:
        """Makes the folder of an input."""
        (self.folder / "model.safetensors").write_bytes(weights)
        (self.folder / "config.json").write_text(json.dumps(files.get("config.json", {})))

    def mutate(self, data: bytes, random: Random) -> bytes:
        files, weights = split_head(data)
        if random.random() < 0.6:
            return join_head(mutate_json(files, random, self.values), weights)
        return join_head(files, mutate_safetensors(weights, random))


class Packed(Folder):
    """A layer as another quantizer writes it."""

    values = (2, 4, 8, 32, 128, "gptq", "awq", "bitsandbytes", "gemm", "gptq_v2", "NVFP4", "int4", "float", "group")


class Manifest(Folder):
    """A folder that kbit wrote.

    Where the line of JSON says "repair", checksums are made right again first: damage then has to be found by what
    reads the parts, and not by their sums alone.
    """

    values = (*_FORMATS, 2, 3, 4, 8)

    def write(self, files: dict[str, Any], weights: bytes) -> None:
        super().write(files, weights)
        manifest = files.get("kbit-manifest.json", {})
        if files.get("repair") and isinstance(manifest, dict):
            manifest = self.repaired(manifest, weights)
        (self.folder / "kbit-manifest.json").write_text(json.dumps(manifest))

    def repaired(self, manifest: dict[str, Any], weights: bytes) -> dict[str, Any]:
        """The manifest that these files would have."""
        listed = dict.fromkeys(("config.json",), self._sum((self.folder / "config.json").read_bytes()))
        length = int.from_bytes(weights[:8], "little")
        sums = {}
        try:
            header = json.loads(weights[8 : 8 + length])
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                sums[name] = self._sum(weights[8 + length + begin : 8 + length + end])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
            return manifest
        return {**manifest, "files": listed, "tensors": sums}

    @staticmethod
    def _sum(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()
