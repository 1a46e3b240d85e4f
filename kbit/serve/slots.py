"""llama.cpp's /slots/{number}: what was last answered for a slot is saved to a file, restored, or forgotten."""

from __future__ import annotations

import asyncio
from pathlib import Path
from time import perf_counter
from typing import Literal

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from kbit.engine.slot_file import read_slot, write_slot
from kbit.graph.pages import OutOfPagesError
from kbit.host.errors import CheckpointError
from kbit.serve.errors import ApiError, bad_request
from kbit.serve.requests import check_slot
from kbit.serve.schemas import Body
from kbit.serve.state import server_of

router = APIRouter()


class SlotBody(Body):
    """POST /slots/{number}."""

    filename: str | None = None
    model: str | None = None


@router.post("/slots/{number}")
async def slot(
    number: int, action: Literal["save", "restore", "erase"], http: HttpRequest, body: SlotBody | None = None
) -> Response:
    """Saves, restores or erases a slot."""
    server = server_of(http)
    folder = server.models.options.slot_folder
    if folder is None:
        raise ApiError(
            501, f"{http.url.path}: this server keeps no slots: start it with --slot-save-path", code="not_supported"
        )
    body = body or SlotBody()
    model = await server.models.ready(body.model)
    engine = model.generating()
    check_slot(number, server.models.options)
    name = engine.adapter_index(model.adapter), number
    call = server.bridge.thread.call
    if action == "erase":
        erased = await asyncio.wrap_future(call(lambda: engine.slots.erase(name)))
        return JSONResponse({"id_slot": number, "n_erased": erased})
    start = perf_counter()
    path = folder / _file_name(body.filename)
    shown = {"id_slot": number, "filename": path.name}
    if action == "save":
        saved = await asyncio.wrap_future(call(lambda: engine.slots.save(name)))
        written = await asyncio.to_thread(write_slot, path, saved, model.fingerprint, engine.slots.store().kind)
        shown |= {"n_saved": len(saved.ids), "n_written": written}
        return JSONResponse({**shown, "timings": {"save_ms": 1e3 * (perf_counter() - start)}})
    store = engine.slots.store()
    given = path, model.fingerprint, store.kind, store.page_bytes, engine.context
    try:
        text, read = await asyncio.to_thread(read_slot, *given)
    except CheckpointError as error:
        raise bad_request(str(error).replace(str(path), path.name), "filename") from None
    try:
        await asyncio.wrap_future(call(lambda: engine.slots.restore(name, text)))
    except OutOfPagesError as error:
        raise ApiError(503, str(error), code="no_room", headers={"Retry-After": "10"}) from None
    shown |= {"n_restored": len(text.ids), "n_read": read}
    return JSONResponse({**shown, "timings": {"restore_ms": 1e3 * (perf_counter() - start)}})


def _file_name(given: str | None) -> str:
    """
    Raises:
        ApiError: it is none, or has a folder or a name that is kept for others.
    """
    name = given or ""
    hidden = name.startswith(".") or name.endswith(".tmp")  # (the latter is what a file is called while it is written)
    plain = name.isprintable() and name == Path(name).name and not set(name) & set("/\\:") and not hidden
    if not name or not plain or len(name.encode()) > 200:
        raise bad_request(
            f"filename {name[:80]!r}: give a file's name, without a folder, a dot before or .tmp behind it", "filename"
        )
    return name
