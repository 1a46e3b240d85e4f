"""Bytes that are not UTF-8: where they cease to be, and a command that converts them."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from kbit.host.errors import UsageError
from kbit.host.utf8 import decode

TEXT = "It costs 3 €, “naïvely”."


def test_utf8() -> None:
    assert decode(TEXT.encode(), "x") == TEXT
    assert decode(TEXT.encode("utf-8-sig"), "x", "utf-8-sig") == TEXT


@pytest.mark.parametrize(("encoding", "byte"), [("utf-16", 0), ("cp1252", 11)])
def test_the_conversion_that_is_named_works(encoding: str, byte: int) -> None:
    data = TEXT.encode(encoding)
    with pytest.raises(UsageError, match=f"x.txt is not UTF-8 at byte {byte}: convert it") as caught:
        decode(data, "x.txt")
    command = re.search(r"iconv [^)]*", str(caught.value))
    assert command is not None
    if shutil.which("iconv") is None:
        pytest.skip("no iconv")
    converted = subprocess.run(command[0].split(), input=data, capture_output=True, check=True).stdout
    assert decode(converted, "x.txt").lstrip("\ufeff") == TEXT
