"""Asking a server that runs: its address, its key, its answers."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from kbit.host.errors import KbitError, UsageError, one_line

DEFAULT_URL = "http://127.0.0.1:8080"
_PATIENCE = 10.0

KeyOption = Annotated[
    str | None, typer.Option("--api-key", metavar="KEY", help="The server's key. [default: KBIT_API_KEY]")
]


def server_address(url: str) -> str:
    """A server's address without a path.

    Raises:
        UsageError: it is none.
    """
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"{url}: expected an address such as {DEFAULT_URL}")
    return url.rstrip("/").removesuffix("/v1")


def server_key(given: str | None) -> str | None:
    """The key that was given, or the environment's."""
    return given or os.environ.get("KBIT_API_KEY") or None


def fetched(address: str, key: str | None) -> str:
    """What a server answers to GET.

    Raises:
        KbitError: nobody answers, or with an error.
    """
    from urllib.error import HTTPError, URLError
    from urllib.parse import urlsplit
    from urllib.request import ProxyHandler, Request, build_opener

    here = urlsplit(address).hostname in ("127.0.0.1", "localhost", "::1")
    opener = build_opener(*([ProxyHandler({})] if here else []))  # no proxy leads back to this machine
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with opener.open(Request(address, headers=headers), timeout=_PATIENCE) as answer:
            text: str = answer.read().decode("utf-8")
            return text
    except HTTPError as error:
        remedy = ": give its --api-key" if error.code == 401 else ""
        raise KbitError(f"{address}: answers {error.code} {error.reason}{remedy}") from None
    except URLError as error:
        reason = one_line(error.reason, 100)
        raise KbitError(f"{address}: nobody answers ({reason}): start kbit serve, or name its address") from None
    except (OSError, UnicodeDecodeError) as error:
        raise KbitError(f"{address}: {one_line(error, 100)}") from None
