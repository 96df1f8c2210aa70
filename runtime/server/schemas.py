"""What ``/openapi.json`` says of the bodies that are taken: the fields a client must give, and the
forms of those it may. What a field means is said where it is read (``api``).
"""

from __future__ import annotations

from typing import Any

_TEXT = {"type": "string"}
_FLAG = {"type": "boolean"}
_SCHEMAS: dict[str, dict[str, Any]] = {
    "temperature": {"type": "number", "minimum": 0, "maximum": 100},
    "top_p": {"type": "number", "minimum": 0, "maximum": 1},
    "top_k": {"type": "integer", "minimum": -1},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "max_tokens": {"type": "integer", "minimum": 1},
    "max_completion_tokens": {"type": "integer", "minimum": 1},
    "max_output_tokens": {"type": "integer", "minimum": 1},
    "seed": {"type": "integer"},
    "n": {"type": "integer", "minimum": 1, "maximum": 128},
    "stream": _FLAG,
    "echo": _FLAG,
    "stop": {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]},
    "messages": {"type": "array", "minItems": 1, "items": {"type": "object"}},
    "prompt": {"anyOf": [_TEXT, {"type": "array"}]},
    "input": {"anyOf": [_TEXT, {"type": "array", "items": {"type": "object"}}]},
    "system": {"anyOf": [_TEXT, {"type": "array", "items": {"type": "object"}}]},
    "instructions": _TEXT,
    "tools": {"type": "array", "items": {"type": "object"}},
    "content": _TEXT,
    "tokens": {"type": "array", "items": {"type": "integer"}},
    "input_file_id": _TEXT,
    "endpoint": _TEXT,
    "model": _TEXT,
}
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed", "stream")
_BODIES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "/v1/chat/completions": (
        ("model", "messages"),
        (*_SAMPLING, "max_tokens", "max_completion_tokens", "n", "stop", "tools"),
    ),
    "/v1/completions": (("prompt",), ("model", *_SAMPLING, "max_tokens", "n", "stop", "echo")),
    "/v1/responses": (
        ("model",),
        ("input", "instructions", *_SAMPLING, "max_output_tokens", "tools"),
    ),
    "/v1/messages": (("model", "messages"), (*_SAMPLING, "max_tokens", "system", "tools")),
    "/v1/embeddings": (("input",), ("model",)),
    "/tokenize": (("content",), ()),
    "/detokenize": (("tokens",), ()),
    "/apply-template": (("messages",), ("tools",)),
    "/v1/batches": (("input_file_id", "endpoint"), ()),
}
_STATUSES = {
    "400": "the request cannot be answered as it is",
    "401": "a key is needed",
    "429": "too many requests wait already",
    "500": "it failed",
    "503": "the model is being loaded, or the server stops",
}


def takes(path: str) -> dict[str, Any]:
    """The OpenAPI of an endpoint that takes such a body."""
    required, others = _BODIES[path]
    schema = {
        "type": "object",
        "required": list(required),
        "properties": {name: _SCHEMAS[name] for name in (*required, *others)},
    }
    responses = {status: {"description": text} for status, text in _STATUSES.items()}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": responses,
    }
