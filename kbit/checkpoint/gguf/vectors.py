"""How hidden states become a vector, in GGUF files and as sentence-transformers has it: pooling, and layers after it.

Whether a vector is divided by its length no file says (llama.cpp's server always does).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from kbit.checkpoint.gguf.names import DENSE_MODULES

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kbit.checkpoint.gguf.metadata import GGUFHeader, GGUFTensor

# Poolings by pooling_type (llama.h): the names of sentence-transformers. 0 is none, 4 a classifier's.
POOLINGS = {1: "mean_tokens", 2: "cls_token", 3: "lasttoken"}
_IDENTITY = "torch.nn.modules.linear.Identity"
_MODULES = "sentence_transformers.models."


def sentence_files(
    header: GGUFHeader, hidden: int, read: Callable[[str], tuple[GGUFTensor, npt.NDArray[np.float32]] | None]
) -> dict[str, bytes]:
    """sentence-transformers' files for what a file says; none where it names no pooling.

    Args:
        header: of the file.
        hidden: the model's width.
        read: one of DENSE_MODULES: what it is and its values; None: the file has it not.

    Raises:
        CheckpointError: layers that do not fit.
    """
    number = header.integer(f"{header.string('general.architecture')}.pooling_type") or 0
    if number not in POOLINGS:
        return {}
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    pooling = {"word_embedding_dimension": hidden}
    pooling |= {f"pooling_mode_{name}": each == number for each, name in POOLINGS.items()}
    found: dict[str, bytes] = {"1_Pooling/config.json": json.dumps(pooling, indent=2).encode()}
    width = hidden
    for name in DENSE_MODULES:
        stored = read(name)
        if stored is None:
            continue
        tensor, values = stored
        if len(tensor.shape) != 2 or tensor.shape[1] != width:
            header.fail(f"tensor '{name}' has the shape {tensor.shape}, expected {width} columns")
        from safetensors.numpy import save

        folder, width = f"{len(modules)}_Dense", tensor.shape[0]
        about = {"in_features": tensor.shape[1], "out_features": width, "bias": False, "activation_function": _IDENTITY}
        found[f"{folder}/config.json"] = json.dumps(about, indent=2).encode()
        found[f"{folder}/model.safetensors"] = save({"linear.weight": values})
        modules.append((folder, "Dense"))
    listed = [
        {"idx": index, "name": str(index), "path": path, "type": _MODULES + kind}
        for index, (path, kind) in enumerate(modules)
    ]
    return {"modules.json": json.dumps(listed, indent=2).encode(), **found}
