"""kbit: k-bit quantized inference. Convert, run and measure language models at 2 to 8 bits per weight.

Importing this package imports nothing else: no torch, no GPU. docs/structure.md says what is in which folder.
"""

import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES

__version__ = "0.1.0"


def _is_compiled(folder: str) -> bool:
    return any(os.path.exists(os.path.join(folder, f"_native{suffix}")) for suffix in EXTENSION_SUFFIXES)


# Python started inside a checkout finds this folder before the installed package, but has neither the compiled module
# nor kbit.kernels here. Then all of kbit comes from the installed package; where there is none, one line says so.
if not _is_compiled(__path__[0]):
    _installed = [os.path.join(entry or ".", "kbit") for entry in sys.path]
    __path__[:] = [os.path.abspath(folder) for folder in _installed if _is_compiled(folder)][:1] or __path__[:1]

    if not _is_compiled(__path__[0]):

        class _NotInstalled:
            """Asked last for every module: says what to do where one is wanted that only an installation has."""

            @staticmethod
            def find_spec(name: str, path: object = None, target: object = None) -> None:
                if name in ("kbit._native", "kbit.kernels"):
                    raise ImportError(
                        f"kbit was imported from {__path__[0]}, where it is not compiled, and is not installed: "
                        "run pip install . (or pip install -e . to work on it)",
                        name=name,
                    )

        sys.meta_path.append(_NotInstalled)
