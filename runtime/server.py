"""The OpenAI API over one open model: llama-cpp-python's endpoints, served by uvicorn.

The endpoints, the schema of their requests and the lock that lets one request at a time compute
are llama_cpp.server's. Ours: they get the model that is open, every failure is answered in the
form OpenAI's clients read, stopping is orderly, and there are /health and /stats.

Importing this raises UserError where the packages are missing, before a model is loaded.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import llama_cpp
from llama_cpp.llama_chat_format import get_chat_completion_handler

from .errors import UserError, option, reason
from .grammar.grammar import check_chat
from .llama import Llama

try:
    import llama_cpp.server.app as api
    import uvicorn
    from fastapi import Depends, FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.middleware.cors import CORSMiddleware
    from fastapi.responses import JSONResponse
    from llama_cpp.server.settings import ServerSettings
    from starlette.exceptions import HTTPException
except ImportError as missing:
    raise UserError(
        f"serving needs more packages ({missing}): pip install 'moe-gguf[server]'"
    ) from missing

# How long a stop waits for the requests in progress.
_GRACE_SECONDS = 1
# /v1/models is ours; embeddings need a context made for them.
_NOT_TAKEN_OVER = ("/v1/models", "/v1/embeddings")


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


def serve(llama: Llama, listener: socket.socket, api_key: str | None) -> None:
    """Serve until SIGINT or SIGTERM."""

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            _note(f"moe-gguf: serving {_alias(llama)} at {_url(listener)} (Ctrl-C stops)")

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            llama.interrupt(_Stopping("the server is stopping"))
            await super().shutdown(sockets)

    config = uvicorn.Config(
        make_app(llama, api_key),
        log_level="critical",  # _error_body tells of failures
        lifespan="off",
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )
    # uvicorn raises the signal again when it has stopped. llama_cpp.server prints remarks.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), contextlib.redirect_stdout(sys.stderr):
        Server(config).run(sockets=[listener])
    # Requests cut off above are still in their threads; the model must outlive them.
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()


def make_app(llama: Llama, api_key: str | None) -> FastAPI:
    """The ASGI application."""
    # Not api.create_app: it opens a model by itself and obeys the environment's CONFIG_FILE.
    api.set_server_settings(ServerSettings(api_key=api_key, interrupt_requests=False))
    served = _Served(llama)
    api._llama_proxy = lambda model=None: served  # whatever name is asked for
    app = FastAPI(title="moe-gguf", docs_url=None, redoc_url=None)
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

    # llama_cpp.server's own would wait until the request in progress is answered.
    @app.get("/v1/models", dependencies=guarded)
    async def models() -> dict[str, Any]:
        model = {"id": _alias(llama), "object": "model", "owned_by": "moe-gguf", "permissions": []}
        return {"object": "list", "data": [model]}

    # Route by route, not the router: its route class answers bad requests with 500.
    for route in api.router.routes:
        if route.path not in _NOT_TAKEN_OVER:
            app.add_api_route(
                route.path,
                route.endpoint,
                methods=list(route.methods),
                dependencies=route.dependencies,
                response_model=None,
            )
    # Each by name: what only the handler of Exception answers also ends the connection.
    for kind in (HTTPException, RequestValidationError, AssertionError, *_EXPECTED, Exception):
        app.add_exception_handler(kind, _answer)
    return app


# --- failures -----------------------------------------------------------------------------------

# What computing may raise: bad arguments, a failed step, an expert that cannot be read.
_EXPECTED = (ValueError, RuntimeError, OSError)


class _Stopping(RuntimeError):
    """The server stops while a request is computed."""


async def _answer(request: Request, error: Exception) -> JSONResponse:
    status = _status(error)
    if isinstance(error, HTTPException):
        return JSONResponse(_body(status, str(error.detail)), status)
    if isinstance(error, RequestValidationError):
        return JSONResponse(_body(status, "; ".join(map(_complaint, error.errors()))), status)
    return JSONResponse(_error_body(error), status)


def _status(error: Exception) -> int:
    if isinstance(error, HTTPException):
        return int(error.status_code)
    if isinstance(error, RequestValidationError | ValueError) or _is_refusal(error):
        return 400
    return 503 if isinstance(error, _Stopping) else 500


def _is_refusal(error: Exception) -> bool:
    """Whether an endpoint itself asserted: the way llama_cpp.server refuses several prompts."""
    trace = traceback.extract_tb(error.__traceback__)
    return isinstance(error, AssertionError) and trace[-1].filename == api.__file__


def _complaint(error: dict[str, Any]) -> str:
    where = ".".join(map(str, error["loc"][1:] if error["type"] != "json_invalid" else ()))
    return f"{where or 'the request'}: {error['msg']}"


def _error_body(error: Exception) -> dict[str, Any]:
    """The body that tells of a failure; those that are not the client's are logged as well."""
    status = _status(error)
    if _is_refusal(error):
        return _body(status, "this server takes one prompt per request")
    if status == 500:
        _note(f"moe-gguf: error: {error or type(error).__name__}")
    return _body(status, str(error))


def _body(status: int, message: str) -> dict[str, Any]:
    """An error as OpenAI's clients understand it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    code = "context_length_exceeded" if "exceed context window" in message else None
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _with_failures(answer: Any) -> Any:
    """A whole answer as it is; of a stream, a failure becomes the last chunk.

    By then the response has begun, and an exception would only cut the connection.
    """
    if isinstance(answer, dict):
        return answer

    def chunks() -> Iterator[Any]:
        try:
            yield from answer
        except _EXPECTED as error:
            yield _error_body(error)

    return chunks()


# --- the model ----------------------------------------------------------------------------------


class _Served:
    """The model as the endpoints see it: under its own name, and with streams that report."""

    def __init__(self, llama: Llama) -> None:
        self._llama = llama

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llama, name)

    # The endpoints stream through llama_cpp.Llama.__call__ and .create_chat_completion with this
    # object as self. The first calls create_completion, the second chat_handler.

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.create_completion(*args, **kwargs)

    def create_completion(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["model"] = kwargs.get("model") or _alias(self._llama)
        return _with_failures(self._llama.create_completion(*args, **kwargs))

    def create_chat_completion(self, *args: Any, **kwargs: Any) -> Any:
        return llama_cpp.Llama.create_chat_completion(self, *args, **kwargs)

    @property
    def chat_handler(self) -> Callable[..., Any]:
        llama = self._llama
        handler = (
            llama.chat_handler
            or llama._chat_handlers.get(llama.chat_format)
            or get_chat_completion_handler(llama.chat_format)
        )

        def handle(**kwargs: Any) -> Any:
            check_chat(kwargs)
            kwargs["model"] = kwargs.get("model") or _alias(llama)
            return _with_failures(handler(**{**kwargs, "llama": llama}))

        return handle


def _alias(llama: Llama) -> str:
    """The model's name towards clients."""
    return llama.found.layout.path.stem


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
