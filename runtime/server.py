"""The OpenAI API over one open model: llama-cpp-python's routes, served by uvicorn.

The routes, their validation and their one-request-at-a-time lock are llama_cpp.server's. Ours is
that they get the model that is open, that listening, errors and stopping are orderly, and two
routes more: /health and /stats.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

from moe_gguf.runtime.errors import UserError
from moe_gguf.runtime.llama import Llama

# How long a stop waits for requests in progress before the next step of each is refused.
_GRACE_SECONDS = 1


def serve(llama: Llama, host: str, port: int, api_key: str | None) -> None:
    """Serve until SIGINT or SIGTERM; UserError without the extra packages or the address."""
    try:
        import uvicorn

        app = make_app(llama, api_key)
    except ImportError as error:
        raise UserError(
            f"serving needs more packages ({error}): pip install 'moe-gguf[server]'"
        ) from None
    listener = _listen(host, port)
    stop = _Stop(llama)

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            note(f"moe-gguf: serving {alias(llama)} at {_url(listener)} (Ctrl-C stops)")

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            stop.requested = True
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=_GRACE_SECONDS, lifespan="off"
    )
    # llama_cpp.server prints remarks on clients that left; uvicorn ends by raising the signal again.
    with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(KeyboardInterrupt):
        Server(config).run(sockets=[listener])


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def alias(llama: Llama) -> str:
    """The model's name towards clients."""
    return llama.opened.layout.path.stem


def make_app(llama: Llama, api_key: str | None) -> Any:
    """The ASGI application; ImportError without the extra packages."""
    import llama_cpp.server.app as api
    from fastapi import Depends, FastAPI
    from fastapi.middleware.cors import CORSMiddleware
    from llama_cpp.server.settings import ServerSettings

    # Not api.create_app: it would open a model by itself, and obey the environment's CONFIG_FILE.
    api.set_server_settings(ServerSettings(api_key=api_key, interrupt_requests=False))
    api._llama_proxy = _Proxy(llama)  # type: ignore[assignment]
    app = FastAPI(title="moe-gguf")
    app.add_middleware(
        CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"]
    )
    guarded = [Depends(api.authenticate)]

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/stats", dependencies=guarded)
    async def stats() -> dict[str, Any]:
        return llama.stats()

    # In front of the same route of llama_cpp.server, which waits for the request in progress.
    @app.get("/v1/models", dependencies=guarded)
    async def models() -> dict[str, Any]:
        model = {"id": alias(llama), "object": "model", "owned_by": "me", "permissions": []}
        return {"object": "list", "data": [model]}

    app.include_router(api.router)
    return app


class _Proxy:
    """What llama_cpp.server asks for a model by name: whatever the name, there is one."""

    def __init__(self, llama: Llama) -> None:
        self._served = _Served(llama)

    def __call__(self, model: str | None = None) -> Any:
        return self._served

    def __iter__(self) -> Iterator[str]:
        return iter([alias(self._served.llama)])


class _Served:
    """The model as the routes see it: a stream that fails says so in its last event.

    When it fails the response has begun, and an exception would only cut the connection.
    """

    def __init__(self, llama: Llama) -> None:
        self.llama = llama

    def __getattr__(self, name: str) -> Any:
        return getattr(self.llama, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.llama(*args, **kwargs)

    # The routes stream through Llama.__call__ and Llama.create_chat_completion with this object
    # as self; the first calls create_completion, the second chat_handler.

    def create_completion(self, *args: Any, **kwargs: Any) -> Any:
        return _reported(self.llama.create_completion(*args, **kwargs))

    @property
    def chat_handler(self) -> Callable[..., Any]:
        from llama_cpp.llama_chat_format import get_chat_completion_handler

        llama = self.llama
        handler = (
            llama.chat_handler
            or llama._chat_handlers.get(llama.chat_format)
            or get_chat_completion_handler(llama.chat_format)
        )

        def handle(**kwargs: Any) -> Any:
            return _reported(handler(**{**kwargs, "llama": llama}))

        return handle


def _reported(answer: Any) -> Any:
    """A stream of chunks with an error as its last chunk; a whole answer as it is."""
    if isinstance(answer, dict):
        return answer

    def chunks() -> Iterator[Any]:
        try:
            yield from answer
        except (ValueError, OSError, RuntimeError) as error:
            yield {"error": {"message": str(error), "type": _kind(error), "code": None}}

    return chunks()


def _kind(error: Exception) -> str:
    return "invalid_request_error" if isinstance(error, ValueError) else "server_error"


class _Stop:
    """Once ``requested``, every further step of the model fails: threads cannot be cancelled."""

    def __init__(self, llama: Llama) -> None:
        self.requested = False
        context = llama._ctx
        decode = context.decode

        def unless_stopped(batch: Any) -> None:
            if self.requested:
                raise RuntimeError("the server is stopping")
            decode(batch)

        context.decode = unless_stopped


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}:{port} ({(error.strerror or str(error)).lower()}): "
            "give another --host or --port"
        ) from None
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
