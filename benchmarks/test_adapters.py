"""What LoRA adapters cost: milliseconds of a pass over one new token for each of some texts, by who has which.

    pytest benchmarks/test_adapters.py -s --full

The adapters are of rank 16, of every matrix of the layers; those compared take turns.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.full  # not of a plain `pytest benchmarks/`

RANK, ADAPTERS, ROUNDS, STEPS = 16, 4, 9, 8


def random_adapter(folder: Path, shapes: dict[str, tuple[int, int]], seed: int) -> str:
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, columns) in shapes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) * 1e-3
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 1e-3
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "base_model_name_or_path": "base", "r": RANK, "lora_alpha": RANK}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.mark.parametrize("texts", [1, 8])
def test_a_step(smollm2: Path, tmp_path: Path, texts: int) -> None:
    from kbit.backends.cpu.backend import NativeBackend
    from kbit.engine.loader import load_model
    from kbit.graph.batch import Batch
    from kbit.models.decoder import Decoder
    from kbit.models.opening import open_model

    with open_model(str(smollm2)) as source:
        layers = {
            name: info.shape for name, info in source.tensors.items() if ".layers." in name and len(info.shape) == 2
        }
    shapes = {name.removesuffix(".weight"): (shape[0], shape[1]) for name, shape in layers.items()}
    folders = {f"a{i}": random_adapter(tmp_path / f"a{i}", shapes, i) for i in range(ADAPTERS)}
    backend = NativeBackend(2)
    plain, adapted = (
        load_model(str(smollm2), backend=backend),
        load_model(str(smollm2), backend=backend, adapters=folders),
    )

    def milliseconds(decoder: Decoder, adapters: list[int] | None) -> float:
        cache = decoder.new_cache(texts, 128)
        decoder.run(Batch.of([[1] * 32] * texts, [0] * texts), cache)
        start = time.perf_counter()
        for step in range(STEPS):
            batch = Batch.of([[step + 2]] * texts, cache.lengths)
            decoder.run(batch if adapters is None else replace(batch, adapters=np.array(adapters)), cache)
        return (time.perf_counter() - start) / STEPS * 1e3

    cases: dict[str, tuple[Decoder, list[int] | None]] = {
        "no adapters loaded": (plain.decoder, None),
        f"{ADAPTERS} loaded, none used": (adapted.decoder, None),
        "all texts with one": (adapted.decoder, [0] * texts),
        "texts with different ones": (adapted.decoder, sorted(i % ADAPTERS for i in range(texts))),
    }
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(ROUNDS):
        for name, (decoder, adapters) in cases.items():
            found[name].append(milliseconds(decoder, adapters))
    base = median(found["no adapters loaded"])
    print(f"\n{texts} texts, {plain.backend_description}")
    for name, times in found.items():
        print(f"  {name:28} {median(times):7.2f} ms a step, {median(times) / base:.2f} times; best {min(times):.2f}")
