"""The endpoints of llama.cpp's server beside the protocols: state, tokens, templates."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..api.chat import conversation
from ..api.fields import Fields
from ..api.refusal import Refusal, refusal_of
from ..api.texts import Texts
from ..text import well_formed
from . import metrics
from .answer import json_of, json_response, while_there
from .schemas import takes
from .service import Service


def router(service: Service) -> APIRouter:
    routes = APIRouter()
    _state(routes, service)
    for path, work in (
        ("/tokenize", _tokenize),
        ("/detokenize", _detokenize),
        ("/apply-template", _apply_template),
    ):
        routes.add_api_route(
            path, _prepared(service, work), methods=["POST"], openapi_extra=takes(path), name=path
        )
    return routes


def _prepared(service: Service, work: Any) -> Any:
    async def call(request: Request) -> Response:
        body = await json_of(request, service)
        prepared = service.prepare(work, Fields(body), service.served.texts)
        return json_response(await while_there(request, prepared))

    return call


def _state(routes: APIRouter, service: Service) -> None:
    @routes.get("/health")
    @routes.get("/v1/health", include_in_schema=False)
    async def health() -> Response:
        if service.is_stopping:
            raise Refusal("the server is stopping", status=503)
        try:
            _ = service.served
        except Refusal as loading:
            done, total = service.progress
            share = done / total if total > 0 else 0.0
            return json_response(
                {**loading.body(), "status": "loading", "progress": share}, loading.status
            )
        return json_response({"status": "ok"})

    @routes.get("/metrics")
    async def numbers() -> Response:
        return Response(
            await service.prepare(service.metrics.text), media_type=metrics.CONTENT_TYPE
        )

    @routes.get("/stats")
    async def stats() -> Response:
        return json_response(await service.prepare(service.served.engine.stats))

    @routes.get("/experts")
    async def experts() -> Response:
        return json_response(await service.prepare(service.served.engine.experts))

    @routes.get("/slots")
    async def slots() -> Response:
        return json_response(_slots(service))

    @routes.get("/props")
    async def props() -> Response:
        return json_response(_props(service))

    @routes.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        names = ("bos_token", "eos_token", "chat_template")
        return json_response({name: service.served.facts.get(name) for name in names})


def _slots(service: Service) -> list[dict[str, Any]]:
    served = service.served
    busy = {one["slot"]: one for one in served.engine.sequences()}
    return [
        {
            "id": i,
            "n_ctx": served.texts.n_ctx,
            "speculative": False,
            "is_processing": i in busy,
            **(
                {
                    "id_task": busy[i]["number"],
                    "n_prompt_tokens": busy[i]["prompt_tokens"],
                    "n_prompt_tokens_processed": min(busy[i]["computed"], busy[i]["prompt_tokens"]),
                    "next_token": {"n_decoded": busy[i]["generated"]},
                }
                if i in busy
                else {}
            ),
        }
        for i in range(served.engine.parallel)
    ]


def _props(service: Service) -> dict[str, Any]:
    served = service.served
    return {
        "default_generation_settings": {"n_ctx": served.texts.n_ctx, "params": {}},
        "total_slots": served.engine.parallel,
        "model_alias": served.name,
        "model_path": served.name,  # where it lies is nobody's business
        "modalities": {"vision": False, "audio": False},
        "is_sleeping": False,
        **served.facts,
    }


def _tokenize(fields: Fields, texts: Texts) -> dict[str, Any]:
    """llama-server's, or vLLM's, which names its text ``prompt``."""
    is_vllms = fields.value("content") is None and fields.value("prompt") is not None
    name = "prompt" if is_vllms else "content"
    text = fields.text(name)
    if text is None:
        raise fields.wrong("content", "text")
    tokens = texts.tokenize(
        well_formed(text),
        add_special=fields.flag("add_special_tokens" if is_vllms else "add_special", is_vllms),
        parse_special=fields.flag("parse_special", default=True),
    )
    if is_vllms:
        return {"tokens": tokens, "count": len(tokens), "max_model_len": texts.n_ctx}
    if not fields.flag("with_pieces"):
        return {"tokens": tokens}
    return {"tokens": [{"id": token, "piece": _piece(texts.piece(token))} for token in tokens]}


def _piece(piece: bytes) -> str | list[int]:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return [*piece]


def _detokenize(fields: Fields, texts: Texts) -> dict[str, Any]:
    tokens = fields.value("tokens")
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise fields.wrong("tokens", "a list of tokens")
    for token in tokens:
        if not 0 <= token < texts.n_vocab:
            raise Refusal(
                f"token {token} is not in this model's vocabulary of {texts.n_vocab}", "tokens"
            )
    text = texts.text(tokens)
    return {"content": text, "prompt": text}  # the latter is vLLM's name for it


def _apply_template(fields: Fields, texts: Texts) -> dict[str, Any]:
    try:
        return {"prompt": texts.conversation(conversation(fields)).text}
    except Exception as error:
        raise refusal_of(error) from error
