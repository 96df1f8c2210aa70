"""The boundary of a server: who comes in, and that everything that goes wrong inside is answered
in the form that its caller reads.

An ASGI layer around all endpoints. Whatever they raise ends here, of whatever type; inside a stream
that has begun its own layer has told of it already (``answer``).
"""

from __future__ import annotations

import time
from urllib.parse import urlsplit

from fastapi.responses import Response
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..api.anthropic import error_body
from ..api.refusal import Refusal, refusal_of
from .answer import ClientLeft, json_response
from .report import failed, note
from .service import Service

# Without a key: whether it is there, and the page, which asks for the key itself.
_OPEN = ("/health", "/v1/health", "/favicon.ico")
_LEFT = 499  # as others log it


def response_of(scope: Scope, error: BaseException) -> Response:
    """What is answered to a request that raised this."""
    refusal = _refusal(error)
    headers = {}
    if refusal.retry_s is not None:
        headers["retry-after"] = str(refusal.retry_s)
    if refusal.status == 401:
        headers["www-authenticate"] = "Bearer"
    if refusal.status in (408, 413):  # the rest of the body is not read
        headers["connection"] = "close"
    body = error_body(refusal) if _is_anthropics(scope) else refusal.body()
    return json_response(body, refusal.status, headers)


def _is_anthropics(scope: Scope) -> bool:
    """Other paths than messages are both protocols': who speaks Anthropic's says so."""
    return scope["path"].startswith("/v1/messages") or "anthropic-version" in Headers(scope=scope)


def _refusal(error: BaseException) -> Refusal:
    if isinstance(error, HTTPException):
        texts = {404: "there is nothing at this address", 405: "this address has another method"}
        return Refusal(texts.get(error.status_code, str(error.detail)), status=error.status_code)
    refusal = refusal_of(error)
    failed(error, refusal)
    return refusal


class Boundary:
    """``open_page``: paths that need no key beside those that never do."""

    def __init__(self, app: ASGIApp, service: Service, page: frozenset[str] = frozenset()) -> None:
        self._app, self._service, self._page = app, service, page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), 0

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        metrics = self._service.metrics
        metrics.in_progress.inc()
        try:
            self._let_in(scope)
            await self._app(scope, receive, sent)
        except ClientLeft:
            if not status:
                await json_response({}, _LEFT)(scope, receive, sent)  # to nobody
        except Exception as error:
            if status:  # too late for another answer: what is cut off is seen to be
                failed(error, refusal_of(error))
                raise _CutOff from error
            await response_of(scope, error)(scope, receive, sent)
        finally:
            metrics.in_progress.dec()
            metrics.calls.labels(_route(scope), str(status)).inc()
            self._tell(scope, status, time.monotonic() - start)

    def _let_in(self, scope: Scope) -> None:
        headers, settings = Headers(scope=scope), self._service.settings
        host = headers.get("host", "")
        if settings.hosts is not None and _name(host) not in settings.hosts:
            raise Refusal(
                "without keys this server answers only as localhost: start it with a key, or as "
                "insecure",
                status=403,
            )
        origin = headers.get("origin")
        if origin is not None and not self._is_ours(origin, host):
            raise Refusal(f"pages of {origin[:100]} may not ask this server", status=403)
        path = scope["path"]
        key = headers.get("x-api-key") or _bearer(headers.get("authorization", ""))
        owner = settings.owner(key)
        if owner is None:
            if path not in _OPEN and path not in self._page:
                raise Refusal("a valid API key is needed", status=401, code="invalid_api_key")
            owner = ""
        scope["moe_gguf.owner"] = owner

    def _is_ours(self, origin: str, host: str) -> bool:
        allowed = self._service.settings.origins
        return "*" in allowed or origin in allowed or urlsplit(origin).netloc == host

    def _tell(self, scope: Scope, status: int, seconds: float) -> None:
        log = self._service.settings.log
        if log == "failures":
            return
        client = (scope.get("client") or ["?"])[0]
        line = f"{client} {scope['method']} {scope['path']} {status} {seconds:.2f} s"
        body = scope.get("moe_gguf.body")
        note(line if body is None else f"{line} {body[:100_000].decode(errors='replace')}")


class _CutOff(Exception):
    """An answer that cannot be finished; the connection is closed, and no one else is told."""


def _bearer(authorization: str) -> str | None:
    scheme, _, key = authorization.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None


def _name(host: str) -> str:
    return (urlsplit(f"//{host}").hostname or "").lower() if "@" not in host else ""


def _route(scope: Scope) -> str:
    """The address as it is declared: made-up ones are one."""
    route = scope.get("route")
    return str(getattr(route, "path", "other"))
