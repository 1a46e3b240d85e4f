"""What the tensors of a checkpoint are for: as the blocks of a known family declare them, by their names elsewhere."""

from __future__ import annotations

from kbit.checkpoint.source import CheckpointSource, TensorInfo
from kbit.checkpoint.surplus import harmless
from kbit.host.errors import KbitError
from kbit.models.families import spec_from_config
from kbit.models.params import parameters

_DECLARED = {"embedding": "embedding", "head": "head", "linear": "linear", "norm": "other", "bias": "other"}
_DECLARED |= dict.fromkeys(("router", "rows", "distances", "taps", "task"), "other")
_DECLARED["table"] = "table"


def roles_of(source: CheckpointSource) -> dict[str, str]:
    """Of every tensor by name: "embedding", "table" (another one that tokens are looked up in), "head", "linear" (a
    matrix inside a layer), "other", or "ignored" for what no model needs (`kbit.checkpoint.surplus`).

    A model that kbit does not run can be converted, too: of an architecture or a configuration that is none of its
    families', and of tensors that a family does not declare, the role is what the name suggests (`role_by_name`).
    """
    declared = _declared(source)
    return {
        name: "ignored" if name not in declared and harmless(info) else _checked(declared.get(name), info)
        for name, info in source.tensors.items()
    }


def role_by_name(info: TensorInfo) -> str:
    """The role of a tensor that follows the names of Hugging Face's Llama."""
    if len(info.shape) != 2 or not info.name.endswith(".weight"):
        return "other"  # (LFM2 calls its last norm embedding_norm)
    if "embed" in info.name:
        return "embedding"
    return "head" if info.name.startswith("lm_head.") else "linear"


def _checked(declared: str | None, info: TensorInfo) -> str:
    """A damaged checkpoint may have something else under a matrix's name, which converts as what it is."""
    if declared is None or (declared == "linear" and len(info.shape) != 2):
        return role_by_name(info)
    return declared


def _declared(source: CheckpointSource) -> dict[str, str]:
    try:
        spec = spec_from_config(source.config)
    except KbitError:
        return {}
    # A tied head is no parameter, but some checkpoints hold the matrix under that name, too.
    roles = {f"{spec.names.head}.weight": "head"}
    roles |= {parameter.name: _DECLARED[parameter.role] for parameter in parameters(spec)}
    return roles
