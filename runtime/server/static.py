"""The page at ``/``: files that any browser gets without a key, ours or another front end's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse

from ..errors import UserError

_OURS = Path(__file__).parent / "page"
_HEADERS = {"cache-control": "no-cache", "x-content-type-options": "nosniff"}
# Ours asks its own server and nobody else, and runs no script but its files. What another front end
# needs, its builders know.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


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
    headers = _HEADERS if ui else {**_HEADERS, "content-security-policy": _POLICY}
    for address, path in found.items():
        app.add_route(address, _sender(path, headers), methods=["GET"], include_in_schema=False)
    return frozenset(found)


def _sender(path: Path, headers: dict[str, str]) -> Callable[[Request], Awaitable[FileResponse]]:
    async def send(request: Request) -> FileResponse:
        return FileResponse(path, headers=headers)

    return send
