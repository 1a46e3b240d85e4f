"""Shared fixtures: where real data and the real model are, and a skip with a reason where they are not; and a model
small enough to be made on the spot.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

# Of several processes (`pytest -n auto`) each has its share of the cores. Before torch is imported, which reads it once.
if WORKERS := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // WORKERS))

# First of all of ours: it sets TRITON_INTERPRET, which must be set before anything imports triton.
from triton_cases import device as device

if TYPE_CHECKING:
    import torch

# No test asserts a time: a slow machine is not a failure. (Some name a deadline of minutes, against hanging.) And none
# draws other examples each time it runs, so that a failure has a cause in the change at hand. To look for more:
#     pytest --hypothesis-profile explore
PATIENT: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("kbit", derandomize=True, **PATIENT)
settings.register_profile("explore", **PATIENT)
settings.load_profile("kbit")

REPOSITORY = Path(__file__).resolve().parent.parent
WORKER_BYTES = 3 << 30  # memory that a test process and the processes it starts may need


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Processes of `pytest -n auto`: one a physical core, and no more than memory holds."""
    from kbit.host.cpu import default_threads
    from kbit.host.memory import available_memory

    return max(1, min(default_threads(), (available_memory() or WORKER_BYTES) // WORKER_BYTES))


@pytest.fixture(scope="session", autouse=True)
def away_from_the_checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run from another folder: a Python started in the checkout would import its kbit/, which has no compiled module."""
    before = Path.cwd()
    for variable in ("KBIT_DATA", "KBIT_CACHE"):  # may be relative
        if os.environ.get(variable):
            os.environ[variable] = str(before / os.environ[variable])
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    os.chdir(before)


@pytest.fixture(scope="session")
def common_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A temporary folder that all processes of this run share."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if WORKERS else own) / "common"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def make_once(common_folder: Path) -> Callable[[str, Callable[[Path], object]], Path]:
    """make_once(name, make) is a path on which make(path) was called by whichever process of this run came first.

    For what takes seconds to make. It is everybody's, so not to be changed.
    """

    def once(name: str, make: Callable[[Path], object]) -> Path:
        path, done = common_folder / name, common_folder / f"{name}.done"
        with FileLock(common_folder / f"{name}.lock"):
            if not done.exists():
                make(path)
                done.touch()
        return path

    return once


@pytest.fixture(scope="session", autouse=True)
def prepared_weights_elsewhere(common_folder: Path) -> Iterator[None]:
    """Hundreds of tiny models are loaded: what is prepared or measured of them is not for the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KBIT_PREPARED", str(common_folder / "prepared"))
        patch.setenv("KBIT_CALIBRATION", str(common_folder / "calibration"))
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """A token is hundreds of small products; on a busy machine the barriers between threads cost ten times the work."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of evaluation text and small real models: KBIT_DATA, else shared/data beside the checkout."""
    named = os.environ.get("KBIT_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if not (folder / "wikitext2" / "wiki.test.raw").is_file():
        pytest.skip(f"no evaluation data at {folder}: set KBIT_DATA to a folder with wikitext2/wiki.test.raw")
    return folder


@pytest.fixture(scope="session")
def novels_folder(data_dir: Path) -> str:
    """The small model trained on novels, as the commands name it."""
    return str(data_dir / "models" / "novels-2m")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The default model's file, downloaded into the cache on first use."""
    from kbit.checkpoint.pull import pull
    from kbit.host.errors import KbitError

    try:
        return pull("smollm2-135m-instruct")
    except KbitError as error:
        pytest.skip(f"the default model could not be fetched: {error}")


TINY_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def _write_model(
    folder: Path, *, dtype: torch.dtype | None = None, shards: int = 1, seed: int = 0, **config: Any
) -> Path:
    """A random Llama with a byte tokenizer, as a Hugging Face folder.

    Args:
        dtype: of the weights; float16 by default.
        shards: number of safetensors files.
        config: entries of config.json to change.
    """
    import torch
    from safetensors.torch import save_file

    from kbit.models.families import spec_from_config

    folder.mkdir(parents=True, exist_ok=True)
    settings = {**TINY_CONFIG, **config}
    (folder / "config.json").write_text(json.dumps(settings))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in spec_from_config(settings).expected_tensors().items():
        values = torch.randn(shape, generator=generator)
        tensors[name] = (0.1 * values + (1.0 if "norm" in name else 0.0)).to(dtype or torch.float16)
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
    else:
        weight_map = {
            name: f"model-{index % shards + 1:05d}-of-{shards:05d}.safetensors" for index, name in enumerate(names)
        }
        for shard in set(weight_map.values()):
            save_file({name: tensors[name] for name in names if weight_map[name] == shard}, folder / shard)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    _write_tokenizer(folder)
    return folder


def _write_tokenizer(folder: Path) -> None:
    """Of bytes, 256 in all."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def published(make_once: Callable[[str, Callable[[Path], object]], Path]) -> Callable[[str], Path]:
    """published(name): one of decoder_cases.CASES as transformers writes it, with a byte tokenizer. Not to be changed."""
    pytest.importorskip("transformers")
    from decoder_cases import saved_model

    def make(name: str, folder: Path) -> None:
        saved_model(name, folder, vocab_size=260, max_position_embeddings=64, intermediate_size=80, eos_token_id=259)
        _write_tokenizer(folder)

    return lambda name: make_once(f"published-{name}", lambda folder: make(name, folder))


@pytest.fixture(scope="session")
def write_model() -> Callable[..., Path]:
    """Writes a random tiny Llama into a folder; see _write_model."""
    return _write_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny Llama, float16, one file. Not to be changed: copy it, or write another."""
    return _write_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def packable_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny Llama whose matrices divide as other quantizers want them to. Not to be changed."""
    return _write_model(tmp_path_factory.mktemp("packable") / "model", hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]) -> Path:
    """As few tensors as a model can have."""
    folder = tmp_path_factory.mktemp("small") / "model"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    return write_model(folder, num_hidden_layers=1, vocab_size=257, **sizes)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> dict[str, bytes]:
    """The files of a conversion that nothing disturbed."""
    from conversion_cases import files_of, rerun

    out = tmp_path_factory.mktemp("undisturbed") / "out"
    rerun(small_model, out)
    return files_of(out)


@pytest.fixture
def interrupted(tmp_path: Path, small_model: Path) -> tuple[Path, Path]:
    """OUT and the partial folder of a run that stopped after six tensors."""
    from conversion_cases import stop_after

    out = tmp_path / "out"
    stop_after(small_model, out, 6)
    return out, tmp_path / "out.partial"


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, write_model: Callable[..., Path]) -> Path:
    """The models and files of error_cases.ZOO, and damaged conversions. Not to be changed: copy what changes."""
    from error_cases import SHARDED, ZOO, run_command

    folder = tmp_path_factory.mktemp("zoo")
    sharded = write_model(folder / "sharded", shards=2)
    for name, make in ZOO.items():
        if "." not in name:
            shutil.copytree(sharded if name in SHARDED else tiny_model, folder / name)
        make(folder / name)
    code, _, error = run_command(["quantize", str(folder / "good"), "--method", "rtn", "-o", str(folder / "done")])
    assert code == 0, error
    shutil.copytree(folder / "done", folder / "bit-rot")
    weights = bytearray((folder / "bit-rot" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "bit-rot" / "model.safetensors").write_bytes(weights)
    shutil.copytree(folder / "done", folder / "no-manifest")
    (folder / "no-manifest" / "kbit-manifest.json").unlink()
    shutil.copytree(folder / "done", folder / "newer-kbit")
    config = json.loads((folder / "newer-kbit" / "config.json").read_text())
    config["quantization_config"]["version"] = 7
    (folder / "newer-kbit" / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No hub, an empty cache and no KBIT_DEBUG."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("KBIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KBIT_DEBUG", raising=False)
