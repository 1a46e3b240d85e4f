"""GET /: a page to chat with the models, one or two at a time. One answer, no outside resource.

Its style and script lie in files of their own and are put into it; the policy names them by their hashes, so that
nothing else runs on the page.
"""

from __future__ import annotations

from base64 import b64encode
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, Response

from kbit.serve.errors import ApiError
from kbit.serve.state import server_of

router = APIRouter()


@router.get("/", include_in_schema=False)
async def page(http: HttpRequest) -> Response:
    """The page."""
    if "page" in server_of(http).without:
        raise ApiError(404, "there is no page here: this server was started with --without page")
    text, policy = _made()
    return HTMLResponse(
        text,
        headers={
            "Content-Security-Policy": policy,
            "X-Frame-Options": "DENY",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        },
    )


@lru_cache(maxsize=1)
def _made() -> tuple[str, str]:
    """The page, and its content security policy."""
    folder = Path(__file__).parent
    text, style, script = ((folder / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text.replace("{{style}}", style).replace("{{script}}", script), policy


def _hash(content: str) -> str:
    return f"sha256-{b64encode(sha256(content.encode()).digest()).decode()}"
