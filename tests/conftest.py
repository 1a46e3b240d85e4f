"""Shared fixtures: where real data and the real model are, and a skip with a reason where they are not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of evaluation text and small real models: KBIT_DATA, else shared/data beside the checkout."""
    named = os.environ.get("KBIT_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if not (folder / "wikitext2" / "wiki.test.raw").is_file():
        pytest.skip(f"no evaluation data at {folder}: set KBIT_DATA to a folder with wikitext2/wiki.test.raw")
    return folder


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The default model's file, downloaded into the cache on first use."""
    from kbit.checkpoint.pull import pull
    from kbit.errors import KbitError

    try:
        return pull("smollm2-135m-instruct")
    except KbitError as error:
        pytest.skip(f"the default model could not be fetched: {error}")
