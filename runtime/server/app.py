"""The ASGI application: the endpoints, and the boundary around them."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from ..api.refusal import Refusal
from . import anthropic, files, native, openai, static
from .boundary import Boundary, response_of
from .service import Service


def make_app(service: Service) -> FastAPI:
    """The application over what ``service`` serves, now or later."""
    app = FastAPI(title="moe-gguf", docs_url=None, redoc_url=None)
    for routes in (openai, anthropic, native, files):
        app.include_router(routes.router(service))
    open_paths = static.mount(app, service.settings.ui)

    @app.exception_handler(HTTPException)
    async def answered(request: Request, error: HTTPException) -> Response:
        return response_of(request.scope, error)

    @app.exception_handler(RequestValidationError)
    async def refused(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][1:])
        return response_of(request.scope, Refusal(f"{name}: {first['msg']}", name or None))

    app.add_middleware(Boundary, service=service, page=open_paths)
    if origins := service.settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST", "DELETE", "OPTIONS"],
            allow_headers=["*"],
            allow_credentials="*" not in origins,
        )
    return app
