"""Reading a folder kbit wrote: packed weights beside whatever stayed in 16 bits, checked against the manifest.

What is on disk (all plain Hugging Face files plus one):

    config.json              the model's config, with quantization_config {"quant_method": "kbit", ...}
    model-....safetensors    for a quantized `X.weight`: X.weight.plane4, X.weight.scales, ... (Codec.parts)
    kbit-manifest.json       sha256 of every stored tensor and of every other file
    tokenizer.json, ...      copied from the source

quantization_config holds, next to quant_method and version: `format` (the default), `tensors` (name -> format and
shape) and `codebooks` (format -> the 2^k values; integers need none, quantile stores one per tensor). Of a nested model
with widths of its matrices' own it holds `order`, too (kbit.checkpoint.ladder).

What transformers saves with `kbit.transformers` is the same but for the manifest, and is marked (WRITTEN_BY); its
tensors are named and laid out as the family publishes them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbit.checkpoint.ladder import ORDER, Order
from kbit.checkpoint.readers.floats import to_float32
from kbit.checkpoint.readers.hf_folder import INDEX_NAME, HFFolder
from kbit.checkpoint.source import TensorInfo
from kbit.checkpoint.verified import VerifiedFiles
from kbit.formats.codec import Codec
from kbit.formats.nested import NestedFormat
from kbit.formats.registry import parse_format
from kbit.host.errors import CheckpointError, UnsupportedError, UsageError
from kbit.host.files import read_json_object

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kbit.formats.quant_tensor import QuantTensor
    from kbit.formats.stored import AnyStored, StoredMatrix

MANIFEST_NAME = "kbit-manifest.json"
LAYOUT_VERSION = 1
# Who wrote the folder, where that was not kbit itself: a key of quantization_config, and its only value.
WRITTEN_BY, TRANSFORMERS = "written_by", "transformers"

# What weights that stay unquantized are stored in.
_KEPT_DTYPES = ("F32", "F16", "BF16")
_MAX_FLOAT32 = 3.4028234663852886e38


class KbitFolder(HFFolder):
    """A quantized model folder. Tensor data is compared with the manifest's sha256 as it is read.

    Raises:
        CheckpointError: config, manifest and files disagree.
        UnsupportedError: the folder was written by a newer layout.
    """

    def __init__(self, path: Path) -> None:
        self._verified = VerifiedFiles()
        super().__init__(path)
        try:
            self._quantized, self._codebooks = self._read_quantization_config()
            self.manifest = self._read_manifest()
            self._infos = self._merge_parts()
        except BaseException:
            self.close()
            raise

    def _read_quantization_config(
        self,
    ) -> tuple[dict[str, tuple[Codec, tuple[int, int]]], dict[str, list[float]]]:
        where = f"{self.path}/config.json"
        section = self.config["quantization_config"]
        if section.get("version") != LAYOUT_VERSION:
            raise UnsupportedError(
                f"{where}: layout version {section.get('version')!r}; this kbit reads {LAYOUT_VERSION}: update kbit"
            )
        tensors, codebooks = section.get("tensors"), section.get("codebooks", {})
        if not isinstance(tensors, dict) or not isinstance(codebooks, dict):
            raise CheckpointError(f"{where}: quantization_config lacks its tensors or codebooks")
        quantized = {}
        for name, entry in tensors.items():
            if isinstance(entry, dict) and "parts" in entry:
                raise UnsupportedError(
                    f"{where}: {name} is several matrices in one, as transformers saves some models; kbit runs the "
                    "folder that this was loaded from"
                )
            try:
                format, shape = parse_format(entry["format"]), tuple(entry["shape"])
            except (UsageError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{where}: {name}: bad entry {str(entry)[:80]} ({error})") from None
            if len(shape) != 2 or not all(type(dim) is int and dim > 0 for dim in shape):
                raise CheckpointError(f"{where}: {name}: impossible shape {shape}")
            quantized[name] = (format, (shape[0], shape[1]))
        for key, values in codebooks.items():
            if not isinstance(values, list) or not all(
                isinstance(v, (int, float)) and abs(v) <= _MAX_FLOAT32 for v in values
            ):
                raise CheckpointError(f"{where}: codebook {key!r} is not a list of finite numbers")
        if ORDER in section:
            nested = {
                name: format.widths for name, (format, _) in quantized.items() if isinstance(format, NestedFormat)
            }
            try:
                Order.from_json(section[ORDER], nested)
            except ValueError as error:
                raise CheckpointError(f"{where}: the order of nested widths: {error}; copy or make it again") from None
        return quantized, codebooks

    def _read_manifest(self) -> dict[str, Any]:
        path = self.path / MANIFEST_NAME
        if not path.is_file() and self.config["quantization_config"].get(WRITTEN_BY) == TRANSFORMERS:
            return {"tensors": None, "files": {}}
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, so the folder is an incomplete copy; copy it again")
        manifest = read_json_object(path)
        if manifest.get("version") != LAYOUT_VERSION:
            raise UnsupportedError(
                f"{path}: version {str(manifest.get('version'))[:40]}; this kbit reads {LAYOUT_VERSION}: update kbit"
            )
        if not isinstance(manifest.get("tensors"), dict) or not isinstance(manifest.get("files"), dict):
            raise CheckpointError(f"{path}: lacks its tensors or files; copy it again")
        if "config.json" not in manifest["files"]:
            raise CheckpointError(f"{path}: no checksum of config.json; copy it again")
        for name in manifest["files"]:
            file = self.path / name
            if not is_inside(name) or not file.is_file():
                raise CheckpointError(f"{file}: missing, though the manifest lists it; copy the folder again")
        for name in ("config.json", INDEX_NAME):  # the others as they are read
            if name in manifest["files"]:
                _check_file(self.path, name, (self.path / name).read_bytes(), manifest)
        for name in manifest["tensors"].keys() ^ self._where.keys():
            where = "the manifest" if name in manifest["tensors"] else "the weight files"
            raise CheckpointError(f"{self.path}: {name} is in {where} only; convert or copy again")
        return manifest

    def _merge_parts(self) -> dict[str, TensorInfo]:
        """One entry per weight instead of one per stored part."""
        infos: dict[str, TensorInfo] = {}
        part_of = {}
        for name, (format, shape) in self._quantized.items():
            for suffix, part in format.parts(*shape).items():
                stored_name = f"{name}.{suffix}"
                if stored_name not in self._where:
                    raise CheckpointError(f"{self.path}: {stored_name} is missing; convert or copy again")
                stored = self.stored(stored_name)
                if (stored.dtype, stored.shape) != (part.dtype, part.shape):
                    raise CheckpointError(
                        f"{self.path}: {stored_name} is {stored.dtype} {stored.shape}; {format} stores {part.dtype} "
                        f"{part.shape}"
                    )
                part_of[stored_name] = name
        for stored_name, file in self._where.items():
            name = part_of.get(stored_name, stored_name)
            if name not in self._quantized:
                infos[name] = super().tensors[stored_name]
            elif name not in infos:
                format, shape = self._quantized[name]
                infos[name] = TensorInfo(name, shape, str(format), format.nbytes(*shape), file.path)
        return infos

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def _read_checked(self, stored_name: str) -> NDArray[Any]:
        """A stored array, compared with the manifest, if there is one; once, while the file is the same."""
        file = self._where[stored_name]
        if self.manifest["tensors"] is None:
            return file.read_array(stored_name)
        expected = self.manifest["tensors"].get(stored_name)
        if expected is None:
            raise CheckpointError(f"{self.path}/{MANIFEST_NAME}: no checksum of {stored_name}; convert or copy again")

        def check(data: bytearray) -> None:
            if self._verified.knows(file.path, stored_name, expected):
                return
            if hashlib.sha256(data).hexdigest() != expected:
                raise CheckpointError(f"{file.path}: {stored_name} is damaged (sha256 differs); copy the file again")
            self._verified.add(file.path, stored_name, expected)

        return file.read_array(stored_name, check=check)

    def read_array_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        if name in self._quantized:
            array: NDArray[np.float32] = self.read_quantized(name).dequantize()[start:stop].numpy()
            return array
        dtype = self.stored(name).dtype
        if dtype not in _KEPT_DTYPES:  # kbit wrote no such thing: a header with a flipped bit
            raise CheckpointError(f"{self.path}: {name} is {dtype}; copy the file again")
        values = to_float32(self._read_checked(name), dtype)  # all of it: the checksum is of the whole tensor
        return values[start:stop].copy() if values.ndim else values

    def sidecar_files(self) -> Mapping[str, bytes]:
        files = super().sidecar_files()
        for name, data in files.items():
            if name in self.manifest["files"]:
                _check_file(self.path, name, data, self.manifest)
        return files

    def read_stored(self, name: str) -> AnyStored:
        from kbit.formats.stored import KINDS, DenseMatrix

        if name in self._quantized:
            return self._read_packed(name)
        dtype = self.stored(name).dtype
        if dtype not in KINDS:
            raise CheckpointError(f"{self.path}: {name} is {dtype}; copy the file again")
        return DenseMatrix(self._read_checked(name), KINDS[dtype])

    def read_quantized(self, name: str) -> QuantTensor:
        """A packed weight, its checksums verified."""
        return self._read_packed(name).tensor()

    def read_narrowed(self, name: str, width: int) -> StoredMatrix:
        """What is stored of a packed weight up to a width, and no more, as a matrix of that format (`Codec.narrowed`).

        Raises:
            UsageError: the weight's format does not serve this width.
        """
        return self._read_packed(name, width)

    def _read_packed(self, name: str, width: int | None = None) -> StoredMatrix:
        import numpy as np

        from kbit.formats.stored import StoredMatrix

        stored_format, shape = self._quantized[name]
        format = stored_format if width is None else stored_format.narrowed(width)
        parts = {suffix: self._read_checked(f"{name}.{suffix}") for suffix in format.parts(*shape)}
        key = stored_format.codebook_key(shape[1])
        if "codebook" in parts:
            codebook = parts["codebook"]
        elif key is None:
            codebook = format.codebook(shape[1])
        else:
            values, size = self._codebooks.get(key), stored_format.codebook_size
            if values is None or len(values) != size:
                raise CheckpointError(f"{self.path}/config.json: no codebook of {size} values for {stored_format}")
            codebook = np.array(values[: format.codebook_size], dtype=np.float32)
        return StoredMatrix.checked(name, format, shape, parts, codebook)

    def verify(self) -> int:
        """Compares every stored tensor with its checksum, whatever was remembered; how many there were.

        Raises:
            CheckpointError: one differs.
        """
        self._verified = VerifiedFiles(forget=True)
        for stored_name in self._where:
            self._read_checked(stored_name)
        return len(self._where)

    def close(self) -> None:
        self._verified.save()
        super().close()


def is_inside(name: str) -> bool:
    """Whether a name is one of a file in a folder, or in a folder of that."""
    parts = name.split("/")
    return len(parts) <= 2 and all(part not in ("", ".", "..") and Path(part).name == part for part in parts)


def _check_file(folder: Path, name: str, data: bytes, manifest: Mapping[str, Any]) -> None:
    if hashlib.sha256(data).hexdigest() != manifest["files"][name]:
        raise CheckpointError(
            f"{folder / name}: changed since it was written (sha256 differs from {MANIFEST_NAME}); copy the folder "
            "again"
        )
