"""OpenAI's endpoints: chat completions, completions, responses, the list of models."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..api import chat, responses
from ..api.calls import KINDS
from ..api.refusal import Refusal
from ..api.texts import Texts
from .answer import answer, json_of, json_response, while_there
from .schemas import takes
from .service import Service


def router(service: Service) -> APIRouter:
    routes = APIRouter()
    for path in KINDS:
        # Clients' base addresses end with /v1, or do not.
        for address in (path, path.removeprefix("/v1")):
            routes.add_api_route(
                address,
                _call(service, path),
                methods=["POST"],
                openapi_extra=takes(path),
                include_in_schema=address == path,
                name=path,
            )
    _models(routes, service)
    _others(routes, service)
    return routes


def _call(service: Service, path: str) -> Any:
    async def call(request: Request) -> Response:
        return await answer(request, service, KINDS[path])

    return call


def _counted(service: Service, count: Callable[[object, Texts], dict[str, Any]]) -> Any:
    async def call(request: Request) -> Response:
        body = await json_of(request, service)
        work = service.prepare(count, body, service.served.texts)
        return json_response(await while_there(request, work))

    return call


def _models(routes: APIRouter, service: Service) -> None:
    @routes.get("/v1/models")
    @routes.get("/models", include_in_schema=False)
    async def models() -> Response:
        model = model_card(service)
        meta = {"name": model["id"], "model": model["id"], "slug": model["id"], **_codex(model)}
        ends = {"has_more": False, "first_id": model["id"], "last_id": model["id"]}  # Anthropic's
        return json_response({"object": "list", "data": [model], "models": [meta], **ends})

    @routes.get("/v1/models/{name:path}")
    async def one(name: str) -> Response:
        model = model_card(service)
        if name != model["id"]:
            raise Refusal(f"there is no model {name[:100]}: {model['id']} is served", status=404)
        return json_response(model)


def model_card(service: Service) -> dict[str, Any]:
    """A model as OpenAI and Anthropic list it, with its context length under the names that clients
    read."""
    served = service.served
    n_ctx, facts = served.texts.n_ctx, served.facts
    since = datetime.datetime.fromtimestamp(int(service.started_s), datetime.UTC)
    return {
        "id": served.name,
        "object": "model",
        "created": int(service.started_s),
        "owned_by": "moe-gguf",
        "type": "model",
        "display_name": served.name,
        "created_at": since.isoformat(),
        "capabilities": None,
        "max_input_tokens": n_ctx,
        "max_tokens": n_ctx,
        "context_length": n_ctx,
        "context_window": n_ctx,
        "max_model_len": n_ctx,
        "meta": {
            "n_ctx": n_ctx,
            "n_vocab": served.texts.n_vocab,
            "n_ctx_train": facts.get("n_ctx_train", n_ctx),
            "n_params": facts.get("n_params"),
            "size": facts.get("size"),
        },
    }


def _codex(model: dict[str, Any]) -> dict[str, Any]:
    """What else Codex reads of a model."""
    return {
        "display_name": model["id"],
        "context_window": model["context_length"],
        "supported_reasoning_levels": [],
        "visibility": "list",
    }


def _others(routes: APIRouter, service: Service) -> None:
    @routes.post("/v1/embeddings", openapi_extra=takes("/v1/embeddings"))
    @routes.post("/embeddings", include_in_schema=False)
    async def embeddings() -> Response:
        raise Refusal(
            f"{service.served.name} generates text and has no embeddings: ask another server",
            status=501,
        )

    for path, count in (
        ("/v1/responses", responses.count_tokens),
        ("/v1/chat/completions", chat.count_tokens),
    ):
        for address in (path, path.removeprefix("/v1")):
            routes.add_api_route(
                f"{address}/input_tokens",
                _counted(service, count),
                methods=["POST"],
                openapi_extra=takes(path),
                include_in_schema=address == path,
                name=f"{path}/input_tokens",
            )

    @routes.get("/v1/responses/{name}")
    async def stored(name: str) -> Response:
        raise Refusal("responses are not stored here", status=404)

    @routes.post("/v1/responses/compact", openapi_extra=takes("/v1/responses"))
    async def compact() -> Response:
        raise Refusal("conversations are not compacted here: send them whole", status=404)
