"""Files and batches, as OpenAI's clients know them: a file of requests goes up, one of answers
comes down, computed by what ``moe-gguf batch`` does when nobody else asks.

Files live in a folder that is gone with the server, under names of ours; nothing that a client
sends is a path.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, Response
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.types import Message

from ..api.calls import KINDS
from ..api.fields import Fields
from ..api.refusal import Refusal, refusal_of
from ..batch.answers import Answerer
from ..batch.figures import Figures
from ..batch.job import Batch as Job
from ..batch.lines import extent
from ..batch.output import Output
from ..engine.generation import Generation
from .answer import json_of, json_response, owner_of
from .report import failed
from .schemas import takes
from .service import Computes, Service

_PRIORITY = -1  # whoever waits for an answer goes first
_MOST_BATCHES = 1000  # that are remembered


@dataclass(frozen=True)
class File:
    id: str
    owner: str
    name: str
    purpose: str
    path: Path
    created: int

    def body(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.path.stat().st_size,
            "created_at": self.created,
            "filename": self.name,
            "purpose": self.purpose,
            "status": "processed",
        }


@dataclass(eq=False)
class Batch:
    """A batch on its way. ``stop`` ends it from any thread."""

    id: str
    owner: str
    source: File
    endpoint: str
    metadata: Mapping[str, Any]
    created: int
    window: str
    status: str = "validating"
    times: dict[str, int] = field(default_factory=dict)
    figures: Figures | None = None
    output: File | None = None
    errors: File | None = None
    failure: str | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)

    def become(self, status: str) -> None:
        self.status = status
        self.times[f"{status}_at"] = int(time.time())

    def body(self) -> dict[str, Any]:
        figures = self.figures
        names = ("in_progress", "finalizing", "completed", "failed", "cancelling", "cancelled")
        failure = {"code": "invalid_input", "message": self.failure, "line": None, "param": None}
        body = {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": {"object": "list", "data": [failure]} if self.failure else None,
            "input_file_id": self.source.id,
            "completion_window": self.window,
            "status": self.status,
            "output_file_id": self.output.id if self.output else None,
            "error_file_id": self.errors.id if self.errors else None,
            "created_at": self.created,
            **{f"{name}_at": self.times.get(f"{name}_at") for name in names},
            "request_counts": {
                "total": figures.n_asked if figures else 0,
                "completed": figures.n_answered if figures else 0,
                "failed": figures.n_refused + figures.n_failed if figures else 0,
            },
            "metadata": self.metadata,
        }
        return _there(body)


class Store:
    """The files and batches of one server, each for its owner only."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._files: dict[str, File] = {}
        self._batches: dict[str, Batch] = {}
        self._pool = ThreadPoolExecutor(1, "moe-gguf batch")
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        service.at_end.append(self.close)

    # -- files

    def file(self, id_: str, owner: str) -> File:
        found = self._files.get(id_)
        if found is None or found.owner != owner:
            raise Refusal(f"there is no file {id_[:100]}", status=404)
        return found

    def files(self, owner: str) -> list[File]:
        return [file for file in self._files.values() if file.owner == owner]

    def new(self, owner: str, name: str, purpose: str) -> File:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="moe-gguf-")
        id_ = f"file-{uuid.uuid4().hex}"
        path = Path(self._folder.name) / id_
        return File(id_, owner, name[:255], purpose, path, int(time.time()))

    def keep(self, file: File) -> File:
        most = self._service.settings.most_file_bytes_kept
        if (
            file.path.stat().st_size + sum(f.path.stat().st_size for f in self._files.values())
            > most
        ):
            file.path.unlink()
            raise Refusal(f"more than {most} bytes are not kept: delete files first", status=413)
        self._files[file.id] = file
        return file

    def delete(self, file: File) -> None:
        if any(b.source is file and b.status in _RUNNING for b in self._batches.values()):
            raise Refusal("a batch still reads this file: cancel it first", "file_id")
        del self._files[file.id]
        file.path.unlink(missing_ok=True)

    # -- batches

    def batch(self, id_: str, owner: str) -> Batch:
        found = self._batches.get(id_)
        if found is None or found.owner != owner:
            raise Refusal(f"there is no batch {id_[:100]}", status=404)
        return found

    def batches(self, owner: str) -> list[Batch]:
        return [batch for batch in reversed(self._batches.values()) if batch.owner == owner]

    def start(self, body: object, owner: str) -> Batch:
        fields = Fields(body)
        endpoint = fields.text("endpoint")
        if endpoint is None or endpoint not in KINDS:
            raise fields.wrong("endpoint", f"one of {', '.join(KINDS)}")
        id_ = fields.text("input_file_id")
        if id_ is None:
            raise fields.wrong("input_file_id", "a file's id")
        source = self.file(id_, owner)
        if len(self._batches) >= _MOST_BATCHES:
            raise Refusal("there are too many batches: start the server anew", status=429)
        batch = Batch(
            f"batch_{uuid.uuid4().hex}",
            owner,
            source,
            endpoint,
            fields.value("metadata") or {},
            int(time.time()),
            fields.text("completion_window") or "24h",
        )
        self._batches[batch.id] = batch
        self._pool.submit(self._run, batch)
        return batch

    def cancel(self, batch: Batch) -> None:
        if batch.status in ("validating", "in_progress"):
            batch.become("cancelling")
            batch.cancelled.set()

    def _run(self, batch: Batch) -> None:
        try:
            self._compute(batch)
        except Exception as error:
            refusal = refusal_of(error)
            failed(error, refusal)
            batch.failure = str(refusal)
            batch.become("failed")

    def _compute(self, batch: Batch) -> None:
        found = extent(batch.source.path)
        batch.figures = Figures(found.n_asked, 0)
        if not batch.cancelled.is_set():
            batch.become("in_progress")
        served = self._service.served
        engine = _Owned(served.engine, batch.owner)
        answerer = Answerer(engine, served.texts, served.name)
        whole = self.new(batch.owner, "all", "batch_output")
        output = Output(whole.path, batch.source.path, found.n_lines)
        try:
            job = Job(
                batch.source.path,
                output,
                answerer,
                batch.figures,
                2 * served.engine.parallel,
                lambda n_synced: None,
            )
            asyncio.run(_until(job.run(), batch.cancelled))
        finally:
            output.close()
        self._divide(batch, whole.path)
        batch.become("cancelled" if batch.cancelled.is_set() else "completed")

    def _divide(self, batch: Batch, whole: Path) -> None:
        """Answers into one file, errors into another, as clients expect."""
        outputs = self.new(batch.owner, f"{batch.id}_output.jsonl", "batch_output")
        errors = self.new(batch.owner, f"{batch.id}_error.jsonl", "batch_output")
        with (
            whole.open("rb") as lines,
            outputs.path.open("wb") as good,
            errors.path.open("wb") as bad,
        ):
            for line in lines:
                response = json.loads(line)["response"]
                (good if response and response["status_code"] == 200 else bad).write(line)
        whole.unlink()
        for file in (outputs, errors):
            if file.path.stat().st_size:
                self.keep(file)
            else:
                file.path.unlink()
        batch.output = outputs if outputs.id in self._files else None
        batch.errors = errors if errors.id in self._files else None

    def close(self) -> None:
        for batch in self._batches.values():
            batch.cancelled.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._folder is not None:
            self._folder.cleanup()


_RUNNING = ("validating", "in_progress", "cancelling")


async def _until(work: Any, ended: threading.Event) -> None:
    """``work``, or as far as it got when ``ended`` was set."""
    task = asyncio.create_task(work)
    while not task.done():
        await asyncio.wait({task}, timeout=0.1)
        if ended.is_set():
            task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


class _Owned:
    """An engine that computes for one owner, behind all who wait for an answer."""

    def __init__(self, engine: Computes, owner: str) -> None:
        self._engine, self._owner = engine, owner

    def submit(self, prompt: list[int], **settings: Any) -> Generation:
        settings |= {"owner": self._owner, "priority": _PRIORITY}
        return self._engine.submit(prompt, **settings)


# --- addresses ----------------------------------------------------------------------------------


def router(service: Service) -> APIRouter:
    routes, store = APIRouter(), Store(service)
    _files(routes, store, service)
    _batches(routes, store, service)
    return routes


def _page(items: list[dict[str, Any]], request: Request) -> Response:
    """A part of a list, as clients go through it."""
    query = request.query_params
    if after := query.get("after"):
        ids = [item["id"] for item in items]
        items = items[ids.index(after) + 1 :] if after in ids else []
    limit = query.get("limit", "")
    n = int(limit) if limit.isascii() and limit.isdigit() and len(limit) < 6 else 10_000
    some = items[:n]
    return json_response(
        {
            "object": "list",
            "data": some,
            "has_more": len(items) > len(some),
            "first_id": some[0]["id"] if some else None,
            "last_id": some[-1]["id"] if some else None,
        }
    )


def _there(body: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is not known: OpenAI's document has no null there."""
    return {name: value for name, value in body.items() if value is not None}


def _files(routes: APIRouter, store: Store, service: Service) -> None:
    @routes.post("/v1/files", openapi_extra=_UPLOAD)
    async def upload(request: Request) -> Response:
        return json_response((await _uploaded(request, store, service)).body())

    @routes.get("/v1/files")
    async def files(request: Request) -> Response:
        found = [file.body() for file in store.files(owner_of(request))]
        return _page(found, request)

    @routes.get("/v1/files/{id_}")
    async def file(request: Request, id_: str) -> Response:
        return json_response(store.file(id_, owner_of(request)).body())

    @routes.get("/v1/files/{id_}/content")
    async def content(request: Request, id_: str) -> Response:
        path = store.file(id_, owner_of(request)).path
        return FileResponse(path, media_type="application/octet-stream")

    @routes.delete("/v1/files/{id_}")
    async def delete(request: Request, id_: str) -> Response:
        store.delete(store.file(id_, owner_of(request)))
        return json_response({"id": id_, "object": "file", "deleted": True})


def _batches(routes: APIRouter, store: Store, service: Service) -> None:
    @routes.post("/v1/batches", openapi_extra=takes("/v1/batches"))
    async def create(request: Request) -> Response:
        body = await json_of(request, service)
        _ = service.served
        return json_response(store.start(body, owner_of(request)).body())

    @routes.get("/v1/batches")
    async def batches(request: Request) -> Response:
        return _page([batch.body() for batch in store.batches(owner_of(request))], request)

    @routes.get("/v1/batches/{id_}")
    async def batch(request: Request, id_: str) -> Response:
        return json_response(store.batch(id_, owner_of(request)).body())

    @routes.post("/v1/batches/{id_}/cancel")
    async def cancel(request: Request, id_: str) -> Response:
        found = store.batch(id_, owner_of(request))
        store.cancel(found)
        return json_response(found.body())


async def _uploaded(request: Request, store: Store, service: Service) -> File:
    most = service.settings.most_file_bytes
    n = 0

    async def receive() -> Message:
        nonlocal n
        message = await request.receive()
        n += len(message.get("body", b""))
        if n > most + (1 << 20):
            raise Refusal(f"a file may have at most {most} bytes", "file", status=413)
        return message

    try:
        async with Request(request.scope, receive).form(max_files=1, max_fields=20) as form:
            given, purpose = form.get("file"), form.get("purpose") or "batch"
            if not isinstance(given, UploadFile):
                raise Refusal("file is missing: it is required", "file")
            if purpose != "batch":
                raise Refusal("purpose must be batch", "purpose")
            file = store.new(owner_of(request), given.filename or "file", purpose)
            await asyncio.to_thread(_copy, given, file.path)
    except MultiPartException as error:
        raise Refusal(f"the body is no form ({error.message})") from None
    return store.keep(file)


def _copy(given: UploadFile, path: Path) -> None:
    with path.open("wb") as out:
        while part := given.file.read(1 << 20):
            out.write(part)


_UPLOAD: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"const": "batch"},
                    },
                }
            }
        },
    }
}
