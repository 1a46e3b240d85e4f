"""What `kbit info` says of GPUs, from folders as the drivers make them."""

from __future__ import annotations

from pathlib import Path

import pytest

from kbit.backends.gpu import gpu_kernels, gpu_summary

pytest.importorskip("triton")


def test_no_gpu(tmp_path: Path) -> None:
    assert gpu_summary(tmp_path / "nvidia", tmp_path / "amd") is None


def test_names(tmp_path: Path) -> None:
    for name, text in (
        ("nvidia/0000:01:00.0/information", "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 61\n"),
        ("nvidia/0000:02:00.0/information", "IRQ: 62\n"),
        ("amd/0/name", "\n"),
        ("amd/1/name", "gfx942\n"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert gpu_summary(tmp_path / "nvidia", tmp_path / "amd") == "NVIDIA H100 80GB HBM3, NVIDIA GPU, gfx942"


def test_kernels_named_are_there() -> None:
    """What `kbit info` names are functions of the modules of that name, and the limits are those of the dispatch."""
    from importlib import import_module

    from kbit.kernels import triton as triton_kernels
    from kbit.kernels.triton.product.limits import DECODE_TOKENS, GEMV_TOKENS

    kernels = gpu_kernels(float_weights=False)
    for name in kernels.values():
        if name.isidentifier():
            file = {"rms_norm": "norm", "attention_decode": "decode", "attention_prefill": "prefill"}.get(name, name)
            (path,) = Path(triton_kernels.__path__[0]).glob(f"*/{file}.py")
            module = import_module(f"kbit.kernels.triton.{path.parent.name}.{file}")
            assert callable(getattr(module, name, None) or getattr(module, f"{name}_paged"))
    assert f"products, up to {GEMV_TOKENS} tokens" in kernels
    assert f"attention, up to {DECODE_TOKENS} new tokens a row" in kernels
    assert gpu_kernels(float_weights=True)["float weights"] == "torch.matmul"


def test_without_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kbit.backends.gpu.find_spec", lambda name: None)
    assert gpu_summary(tmp_path, tmp_path) is None
