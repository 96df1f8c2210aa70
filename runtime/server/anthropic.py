"""Anthropic's endpoints: messages, and how many tokens one would have."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..api.anthropic import count_tokens
from ..api.calls import MESSAGES
from .answer import answer, json_of, json_response, while_there
from .schemas import takes
from .service import Service


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/messages", openapi_extra=takes("/v1/messages"))
    async def messages(request: Request) -> Response:
        return await answer(request, service, MESSAGES)

    @routes.post("/v1/messages/count_tokens", openapi_extra=takes("/v1/messages"))
    async def count(request: Request) -> Response:
        body = await json_of(request, service)
        work = service.prepare(count_tokens, body, service.served.texts)
        return json_response(await while_there(request, work))

    return routes
