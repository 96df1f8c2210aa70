"""How a call is answered over HTTP: its body read, computed, and its answer sent, whole or as
events. A client that leaves ends its call at once, whatever it waits for.

Knows no endpoint; a protocol is a ``Kind`` of calls.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from ..api.calls import Kind
from ..api.fields import Fields
from ..api.refusal import Refusal, refusal_of
from ..api.stream import Call, Piece, Stream
from ..api.usage import Stamp
from .report import failed
from .run import Run
from .service import Service

T = TypeVar("T")
_COMMENT = b": keep-alive\n\n"


class ClientLeft(Exception):
    """Nobody is there to be answered."""


async def body_of(request: Request, most: int, timeout_s: float) -> bytes:
    """The bytes of a body. Refusal for more than are taken, or that do not come."""
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
        raise _too_large(most)
    parts, n = [], 0
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                parts.append(part)
                n += len(part)
                if n > most:
                    raise _too_large(most)
    except TimeoutError:
        raise Refusal(f"the body did not come within {timeout_s:g} s", status=408) from None
    except ClientDisconnect:
        raise ClientLeft from None
    return b"".join(parts)


def _too_large(most: int) -> Refusal:
    return Refusal(f"the body is larger than the {most} bytes that are taken", status=413)


def parsed(body: bytes) -> Any:
    """JSON. Refusal for what is none, or is nested too deeply."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        why = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
        raise Refusal(f"the body is not JSON ({why})") from None


async def json_of(request: Request, service: Service) -> Any:
    settings = service.settings
    body = await body_of(request, settings.most_body_bytes, settings.body_timeout_s)
    if settings.log == "bodies":
        request.scope["moe_gguf.body"] = body
    return parsed(body) if len(body) < 1 << 16 else await service.prepare(parsed, body)


def owner_of(request: Request) -> str:
    return str(request.scope.get("moe_gguf.owner", ""))


async def answer(request: Request, service: Service, kind: Kind) -> Response:
    """The answer to a body of this kind."""
    body = await json_of(request, service)
    fields = Fields(body)
    served = service.served
    for name in kind.required:
        if fields.value(name) is None and (name != "model" or service.settings.require_model):
            raise Refusal(f"{name} is missing: it is required", name)
    model = fields.text("model") or served.name
    stamp = Stamp(kind.prefix + uuid.uuid4().hex, int(time.time()), model[:256])
    streams = fields.flag("stream")
    call_ = service.call()
    call_.__enter__()  # left by whoever answers, which for a stream is not this function
    try:
        if streams:
            call = await while_there(request, service.prepare(kind.read, body, served.texts))
            run = await while_there(request, _begun(Run(service, call.requests, owner_of(request))))
            return EventStream(service, run, call.stream(stamp), call_)
        whole = _whole(service, kind, body, owner_of(request), stamp)
        found = await while_there(request, whole)
    except BaseException as error:
        call_.__exit__(type(error), error, error.__traceback__)
        raise
    call_.__exit__(None, None, None)
    return json_response(found)


async def _begun(run: Run) -> Run:
    return await run.__aenter__()


async def _whole(
    service: Service, kind: Kind, body: Any, owner: str, stamp: Stamp
) -> dict[str, Any]:
    async with within(service.settings.timeout_s):
        call: Call = await service.prepare(kind.read, body, service.served.texts)
        async with Run(service, call.requests, owner) as run:
            return await service.prepare(call.response, await run.results(), stamp)


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    data = json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Response(data.encode("utf-8", "replace"), status, headers, "application/json")


class within:
    """``asyncio.timeout`` whose end is a Refusal; 0: none."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._timeout = asyncio.timeout(seconds or None)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, *error: Any) -> None:
        try:
            await self._timeout.__aexit__(*error)
        except TimeoutError:
            raise Refusal(
                f"the answer was not finished within {self._seconds:g} s", status=504
            ) from None


async def while_there(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What comes of ``work``, which ends when the client leaves: ClientLeft."""
    return await _raced(work, request.receive)


async def _raced(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """An answer as server-sent events, with a comment now and then while nothing comes."""

    def __init__(self, service: Service, run: Run, stream: Stream, call: Any) -> None:
        super().__init__(
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )
        del self.headers["content-length"]
        self._service, self._run, self._stream, self._call = service, run, stream, call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            start = {"status": self.status_code, "headers": self.raw_headers}
            await send({"type": "http.response.start", **start})
            await _raced(self._send_all(send), receive)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._run.__aexit__(None, None, None)
            self._call.__exit__(None, None, None)

    async def _send_all(self, send: Send) -> None:
        async def write(data: bytes) -> None:
            if data:
                await send({"type": "http.response.body", "body": data, "more_body": True})

        try:
            async with within(self._service.settings.timeout_s):
                await write(_encoded(self._stream.begin()))
                async for data in self._bytes():
                    await write(data)
        except Exception as error:
            refusal = refusal_of(error)
            failed(error, refusal)
            await write(_encoded(self._stream.fail(refusal)))

    async def _bytes(self) -> AsyncIterator[bytes]:
        batches = self._run.batches()
        coming = asyncio.ensure_future(anext(batches, None))
        try:
            while True:
                ready, _ = await asyncio.wait({coming}, timeout=self._service.settings.keep_alive_s)
                if not ready:
                    yield _COMMENT
                    continue
                batch = coming.result()
                if batch is None:
                    break
                coming = asyncio.ensure_future(anext(batches, None))
                yield await self._service.prepare(self._pushed, batch)
            yield _encoded(await self._service.prepare(self._stream.end))
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)

    def _pushed(self, batch: Any) -> bytes:
        return b"".join(_encoded(self._stream.push(i, events)) for i, events in batch)


def _encoded(pieces: list[Piece]) -> bytes:
    parts = []
    for data, name in pieces:
        if not isinstance(data, str):
            data = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        event = f"event: {name}\n" if name else ""
        parts.append(f"{event}data: {data}\n\n".encode("utf-8", "replace"))
    return b"".join(parts)
