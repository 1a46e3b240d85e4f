"""What the tests of conversion share: short ways to convert, to stop half-way and to compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from kbit.checkpoint.readers.kbit_folder import KbitFolder
from kbit.formats.blockwise import quantize_blockwise
from kbit.formats.quant_tensor import SAFETENSORS_TO_TORCH, QuantTensor
from kbit.formats.registry import parse_format
from kbit.host.errors import KbitError
from kbit.models.opening import open_model
from kbit.quantizers.convert import Conversion, convert
from kbit.quantizers.plan import make_plan


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def quantize(model: Path, out: Path, format: str = "nf4-b64", *, plan: Any = None, **options: Any) -> Conversion:
    """One conversion. `plan`: keyword arguments of make_plan."""
    with open_model(str(model)) as source:
        return convert(source, make_plan(source, parse_format(format), **(plan or {})), out, **options)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_not_loadable(folder: Path) -> None:
    if folder.exists():
        with pytest.raises(KbitError):
            open_model(str(folder))


def rerun(model: Path, out: Path, **options: Any) -> Conversion:
    """The conversion that is interrupted and repeated: 11 tensors in several small files."""
    return quantize(model, out, "int3-b32-asym-dq", plan={"shard_bytes": 1200}, **options)


class Stopped(Exception):
    pass


def stop_after(model: Path, out: Path, tensors: int, **options: Any) -> None:
    seen: list[Any] = []

    def on_tensor(tensor: Any) -> None:
        seen.append(tensor)
        if len(seen) == tensors:
            raise Stopped

    with pytest.raises(Stopped):
        rerun(model, out, on_tensor=on_tensor, **options)


def check_exact(model: Path, out: Path, format: str, plan: Any = None) -> None:
    """Every stored array equals quantize_blockwise of the source; kept tensors equal the source."""
    with open_model(str(model)) as source, open_model(str(out)) as result:
        assert isinstance(result, KbitFolder)
        planned = make_plan(source, parse_format(format), **(plan or {}))
        assert set(result.tensors) == {t.source.name for t in planned.tensors}
        for tensor in planned.tensors:
            name = tensor.source.name
            original, read = source.read(name), result.read_weight(name)
            if tensor.format is None:
                assert isinstance(read, torch.Tensor)
                assert torch.equal(read, original.to(SAFETENSORS_TO_TORCH[tensor.keep_as]).float()), name
                continue
            assert isinstance(read, QuantTensor)
            expected = quantize_blockwise(original, tensor.format)
            assert (read.format, read.shape) == (expected.format, expected.shape)
            assert read.stored.keys() == expected.stored.keys()
            for suffix, array in expected.stored.items():
                assert torch.equal(read.stored[suffix], array), (name, suffix)
            assert torch.equal(read.codebook, expected.codebook), name
            assert torch.equal(result.read(name), expected.dequantize()), name
