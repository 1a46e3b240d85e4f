"""kbit: k-bit quantized inference. Convert, run and measure language models at 2 to 8 bits per weight.

Importing this package imports nothing else, no torch, no GPU: what it offers is imported when it is first asked for.
docs/python.md shows how to use it, docs/structure.md says what is in which folder.
"""

import os
import sys
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kbit.api.calls import AsyncStream, Stream
    from kbit.api.model import Model, load
    from kbit.api.quantize import Quantized, quantize
    from kbit.api.results import Completion, Settings, Token
    from kbit.host.errors import CheckpointError, KbitError, UnsupportedError, UsageError
    from kbit.modules.convert import quantize_

__version__ = "0.1.0"

# The names of the package, and where they are.
_OFFERED = {
    "AsyncStream": "kbit.api.calls",
    "CheckpointError": "kbit.host.errors",
    "Completion": "kbit.api.results",
    "KbitError": "kbit.host.errors",
    "Model": "kbit.api.model",
    "Quantized": "kbit.api.quantize",
    "Settings": "kbit.api.results",
    "Stream": "kbit.api.calls",
    "Token": "kbit.api.results",
    "UnsupportedError": "kbit.host.errors",
    "UsageError": "kbit.host.errors",
    "load": "kbit.api.model",
    "quantize": "kbit.api.quantize",
    "quantize_": "kbit.modules.convert",
}
__all__ = [
    "AsyncStream",
    "CheckpointError",
    "Completion",
    "KbitError",
    "Model",
    "Quantized",
    "Settings",
    "Stream",
    "Token",
    "UnsupportedError",
    "UsageError",
    "load",
    "quantize",
    "quantize_",
]


def __getattr__(name: str) -> object:
    if name not in _OFFERED:
        raise AttributeError(f"module 'kbit' has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_OFFERED[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_OFFERED})


def _is_compiled(folder: str) -> bool:
    return any(os.path.exists(os.path.join(folder, f"_native{suffix}")) for suffix in EXTENSION_SUFFIXES)


# Python started inside a checkout finds this folder before the installed package, but has neither the compiled module
# nor kbit.kernels here. Then all of kbit comes from the installed package. Where there is none, the kernels that need
# no compiler (torch's and Triton's) are the checkout's, and one line says so where the compiled module is wanted. So it
# is too with KBIT_SOURCE_TREE, whatever is installed.
if not _is_compiled(__path__[0]):
    _entries = [] if os.environ.get("KBIT_SOURCE_TREE") else sys.path
    _installed = [os.path.join(entry or ".", "kbit") for entry in _entries]
    __path__[:] = [os.path.abspath(folder) for folder in _installed if _is_compiled(folder)][:1] or __path__[:1]

    if not _is_compiled(__path__[0]):

        class _NotCompiled:
            """Asked last for every module: finds a checkout's kernels, and says what to do where one is wanted that
            only an installation has."""

            @staticmethod
            def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
                if name not in ("kbit._native", "kbit.kernels"):
                    return None
                from importlib.util import spec_from_file_location

                kernels = os.path.join(os.path.dirname(os.path.abspath(__path__[0])), "kernels")
                file = os.path.join(kernels, "__init__.py")
                if name == "kbit.kernels" and os.path.isfile(os.path.join(kernels, "reference.py")):
                    return spec_from_file_location(name, file, submodule_search_locations=[kernels])
                raise ImportError(
                    f"kbit was imported from {__path__[0]}, where it is not compiled, and is not installed: "
                    "run pip install . (or pip install -e . to work on it)",
                    name=name,
                )

        sys.meta_path.append(_NotCompiled)
