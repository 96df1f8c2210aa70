"""The page at ``/``: files that any browser gets without a key, ours or another front end's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse

from ..errors import UserError

_OURS = Path(__file__).parent / "page"
_HEADERS = {"cache-control": "no-cache", "x-content-type-options": "nosniff"}


def mount(app: FastAPI, ui: Path | None) -> frozenset[str]:
    """Serve the files of the page, each at an address of its own; these addresses. UserError for a
    folder that holds none."""
    folder = ui or _OURS
    if not (folder / "index.html").is_file():
        raise UserError(f"there is no index.html in {folder}: give the folder of a built front end")
    found = {
        f"/{path.relative_to(folder).as_posix()}": path
        for path in folder.rglob("*")
        if path.is_file()
    }
    found["/"] = folder / "index.html"
    for address, path in found.items():
        app.add_route(address, _sender(path), methods=["GET"], include_in_schema=False)
    return frozenset(found)


def _sender(path: Path) -> Callable[[Request], Awaitable[FileResponse]]:
    async def send(request: Request) -> FileResponse:
        return FileResponse(path, headers=_HEADERS)

    return send
