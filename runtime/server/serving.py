"""A server's life: listening before the model is open, serving, and a stop that lets calls finish.

HTTP runs in a thread of its own, so that the main one opens the model, and hears of signals.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import UserError, option, reason
from .app import make_app
from .report import note
from .service import Served, Service

_MOST_HEADER_BYTES = 64 << 10
_IDLE_S = 75  # a connection without a request
_HEADERS_S = 30.0  # until a request's headers are whole


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 is any that is free. UserError when the address cannot be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}:{port} ({reason(error)}): give another {option('host')} or "
            f"{option('port')}"
        ) from None
    return listener


class Server:
    """HTTP over ``service`` on a socket, from now until ``stop``."""

    def __init__(self, service: Service, listener: socket.socket) -> None:
        self._service, self._listener = service, listener
        self._server = _Uvicorn(
            uvicorn.Config(
                make_app(service),
                http=_Http,
                ws="none",
                h11_max_incomplete_event_size=_MOST_HEADER_BYTES,
                timeout_keep_alive=_IDLE_S,
                timeout_graceful_shutdown=1,
                log_level="critical",  # the boundary tells of failures
                lifespan="off",
                server_header=False,
                backlog=1024,
            ),
            service,
        )
        self._thread = threading.Thread(target=self._run, name="moe-gguf http", daemon=True)
        self._failure: BaseException | None = None
        self._ended = threading.Event()
        self._thread.start()

    def _run(self) -> None:
        try:
            self._server.run(sockets=[self._listener])
        except BaseException as error:
            self._failure = error
        finally:
            self._ended.set()

    @property
    def url(self) -> str:
        host, port = self._listener.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"

    @property
    def is_ready(self) -> bool:
        return bool(self._server.started)

    @property
    def is_alive(self) -> bool:
        return not self._ended.is_set()

    def wait(self, seconds: float) -> None:
        """Until it has ended, at most that long; raises what ended it."""
        # Not join: one that a signal interrupts takes the thread for ended.
        self._ended.wait(seconds)
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Take no more, and end when what is in progress has ended, or its grace."""
        self._server.should_exit = True


class _Http(H11Protocol):
    """h11, whose headers have a bound, and here a time to come in: a connection that says a word
    now and then would be kept for ever."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._watch(over=True)

    def _watch(self, over: bool = False) -> None:
        if over or self.conn.their_state is not h11.IDLE:
            if self._late is not None:
                self._late.cancel()
                self._late = None
        elif self._late is None:
            self._late = self.loop.call_later(_HEADERS_S, self.transport.close)


class _Uvicorn(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        await self._service.stop(self._service.settings.grace_s)
        await super().shutdown(sockets)


def serve(service: Service, listener: socket.socket, open_model: Callable[[], Served]) -> None:
    """Serve what ``open_model`` opens, and what is told of it until then, until SIGINT or SIGTERM.

    Raises what opening raises; a signal meanwhile is KeyboardInterrupt.
    """
    server = Server(service, listener)
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        served = open_model()
        service.open(served)
        try:
            note(f"serving {served.name} at {server.url} (Ctrl-C stops)")
            _wait(server)
        except KeyboardInterrupt:
            pass
    finally:
        _stop(server, service)


def _wait(server: Server) -> None:
    while server.is_alive:
        server.wait(1.0)


def _stop(server: Server, service: Service) -> None:
    """With the grace that is granted; a second signal ends that."""
    server.stop()

    def at_once(number: int, frame: FrameType | None) -> None:
        service.hurry()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, at_once)
    _wait(server)
    service.close()
