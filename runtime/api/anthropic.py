"""Bodies of ``/v1/messages``, Anthropic's: a conversation in blocks, and the message that answers.

A conversation is brought into OpenAI's terms, so that the same one has the same prompt by either
protocol, and what was computed for one serves the other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..chat.parser import Call, Message
from ..engine.generation import Result
from ..engine.request import Event, Finished, PromptScored
from . import settings
from .fields import Fields
from .refusal import Refusal
from .stream import Piece
from .texts import Conversation, Reader, Texts
from .turn import Turn, continues, finished, template_kwargs
from .usage import Stamp

Json = dict[str, Any]

# Claude Code puts a line that differs in every request in front of everything; no prompt would
# begin like another.
_BILLING = re.compile(r"^x-anthropic-billing-header:[^\n]*\n?")
# Read as reasoning, or without a meaning to a model here.
_NOT_TEXT = ("redacted_thinking", "container_upload")


class Messages:
    """One body; its one request is to be computed."""

    def __init__(self, body: object, texts: Texts) -> None:
        fields = Fields(body)
        self.thinking = _thinking(fields)
        max_tokens = fields.integer("max_tokens", 1, 2**31 - 1)
        stop = fields.texts("stop_sequences", settings.MOST_STOPS)
        self.turn = Turn(
            conversation(fields, self.thinking),
            texts,
            max_tokens=max_tokens,
            sampling=settings.sampling(fields, texts.n_vocab),
            stop=stop,
        )
        self.requests = self.turn.requests

    def response(self, results: Sequence[Result], stamp: Stamp) -> Json:
        """The response body of what the request came to."""
        answer = self.turn.answered(results[0])
        return {
            **self.head(stamp),
            "content": _blocks(answer.message),
            "stop_reason": self.stop_reason(answer.end, answer.message),
            "stop_sequence": answer.stop_text,
            "usage": usage(answer.end, self.turn.n_tokens(answer.message.reasoning)),
        }

    def stream(self, stamp: Stamp) -> MessageStream:
        return MessageStream(self, stamp)

    def head(self, stamp: Stamp) -> Json:
        return {
            "id": stamp.id,
            "type": "message",
            "role": "assistant",
            "model": stamp.model,
            "container": None,
            "stop_details": None,
        }

    def stop_reason(self, end: Finished, message: Message) -> str:
        if self.turn.stop_text(end) is not None:
            return "stop_sequence"
        if end.reason != "stop":
            return "max_tokens"
        return "tool_use" if message.calls else "end_turn"


class MessageStream:
    """Anthropic's events of one message: blocks one after the other."""

    def __init__(self, call: Messages, stamp: Stamp) -> None:
        self._call, self._stamp = call, stamp
        self._reader: Reader = call.turn.reader()
        self._index = -1
        self._open: str | int | None = None  # the kind of the open block, or its call's index

    def begin(self) -> list[Piece]:
        return []

    def push(self, i: int, events: Sequence[Event]) -> list[Piece]:
        pieces = []
        for event in events:
            if isinstance(event, PromptScored):
                pieces += self._start(event.cached_tokens)
        delta = self._call.turn.read(self._reader, events)
        if delta.reasoning:
            pieces += self._block("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            pieces.append(self._delta("thinking_delta", thinking=delta.reasoning))
        if delta.content:
            pieces += self._block("text", {"type": "text", "text": "", "citations": None})
            pieces.append(self._delta("text_delta", text=delta.content))
        for call in delta.calls:
            if call.name is not None:
                block = {**_use(call), "input": {}}
                pieces += self._block(call.index, block)
            if call.arguments:
                pieces.append(self._delta("input_json_delta", partial_json=call.arguments))
        if (end := finished(events)) is not None:
            pieces += self._finish(end)
        return pieces

    def end(self) -> list[Piece]:
        return [_piece("message_stop")]

    def fail(self, refusal: Refusal) -> list[Piece]:
        return [Piece(error_body(refusal), "error")]

    def _start(self, cached: int) -> list[Piece]:
        message = {
            **self._call.head(self._stamp),
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(self._call.turn.n_prompt, cached, 0, 0),
        }
        return [_piece("message_start", message=message), _piece("ping")]

    def _block(self, kind: str | int, block: Json) -> list[Piece]:
        """Begin a block, unless it is open already."""
        if self._open == kind:
            return []
        pieces = self._close()
        self._open = kind
        self._index += 1
        return [*pieces, _piece("content_block_start", index=self._index, content_block=block)]

    def _close(self) -> list[Piece]:
        if self._open is None:
            return []
        pieces = []
        if self._open == "thinking":
            pieces.append(self._delta("signature_delta", signature=_SIGNATURE))
        self._open = None
        return [*pieces, _piece("content_block_stop", index=self._index)]

    def _delta(self, kind: str, **more: Any) -> Piece:
        return _piece("content_block_delta", index=self._index, delta={"type": kind, **more})

    def _finish(self, end: Finished) -> list[Piece]:
        pieces: list[Piece] = []
        if self._index < 0:  # an answer of nothing has a block all the same
            pieces += self._block("text", {"type": "text", "text": "", "citations": None})
        message = self._reader.message
        delta = {
            "stop_reason": self._call.stop_reason(end, message),
            "stop_sequence": self._call.turn.stop_text(end),
            "stop_details": None,
            "container": None,
        }
        used = usage(end, self._call.turn.n_tokens(message.reasoning))
        return [
            *pieces,
            *self._close(),
            _piece("message_delta", delta=delta, usage=used),
        ]


# Anthropic signs thoughts, and clients give them back as they were; there is nothing to prove here.
_SIGNATURE = "unsigned"


def count_tokens(body: object, texts: Texts) -> Json:
    """The response body of ``/v1/messages/count_tokens``."""
    fields = Fields(body)
    turn = Turn(
        conversation(fields, _thinking(fields)),
        texts,
        max_tokens=0,
        sampling=settings.sampling(Fields({}), texts.n_vocab),
    )
    return {"input_tokens": turn.n_prompt, "context_management": None}


def usage(end: Finished, reasoning_tokens: int) -> Json:
    return _usage(end.prompt_tokens, end.cached_tokens, end.completion_tokens, reasoning_tokens)


def _usage(prompt: int, cached: int, completion: int, reasoning: int) -> Json:
    return {
        "input_tokens": prompt - cached,
        "output_tokens": completion,
        "output_tokens_details": {"thinking_tokens": reasoning},
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "cache_creation": None,
        "server_tool_use": None,
        "service_tier": "standard",
        "inference_geo": None,
    }


_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_body(refusal: Refusal) -> Json:
    """Anthropic's form of an error."""
    default = "api_error" if refusal.status >= 500 else "invalid_request_error"
    kind = _KINDS.get(refusal.status, default)
    return {"type": "error", "error": {"type": kind, "message": str(refusal)}, "request_id": None}


def _piece(kind: str, **more: Any) -> Piece:
    return Piece({"type": kind, **more}, kind)


def _blocks(message: Message) -> list[Json]:
    blocks: list[Json] = []
    if message.reasoning:
        blocks.append({"type": "thinking", "thinking": message.reasoning, "signature": _SIGNATURE})
    if message.content or not message.calls:
        blocks.append({"type": "text", "text": message.content, "citations": None})
    blocks += [{**_use(call), "input": _input(call.arguments)} for call in message.calls]
    return blocks


def _use(call: Call) -> Json:
    """The block of a call, but for its input."""
    return {"type": "tool_use", "id": call.id, "name": call.name, "caller": {"type": "direct"}}


def _input(arguments: str) -> Json:
    try:
        found = json.loads(arguments or "{}")
    except ValueError:  # of an answer that was cut short
        return {}
    return found if isinstance(found, dict) else {}


# --- what is asked ------------------------------------------------------------------------------


def conversation(fields: Fields, thinking: bool | None) -> Conversation:
    """A body's conversation in OpenAI's terms."""
    messages = _system(fields)
    given = fields.value("messages")
    if not isinstance(given, list) or not given:
        raise fields.wrong("messages", "a list with at least one message")
    for i, one in enumerate(given):
        messages += _message(Fields(one, f"messages[{i}]"))
    tools = _tools(fields)
    choice, parallel = _choice(fields)
    config = fields.inner("output_config")
    return Conversation(
        messages=messages,
        tools=tools,
        tool_choice=choice if tools else None,
        parallel_tool_calls=parallel,
        held_to=settings.output_format(fields),
        thinking=thinking,
        reasoning_effort=config.text("effort") if config is not None else None,
        template_kwargs=template_kwargs(fields),
        continue_final=continues(messages),
    )


def _thinking(fields: Fields) -> bool | None:
    asked = fields.inner("thinking")
    if asked is None:
        return None
    kind = asked.text("type")
    if kind not in ("enabled", "disabled", "adaptive"):
        raise asked.wrong("type", "enabled, adaptive or disabled")
    return kind != "disabled"


def _system(fields: Fields) -> list[Json]:
    given = fields.value("system")
    if given is None:
        return []
    if isinstance(given, str):
        texts = [given]
    elif isinstance(given, list):
        blocks = [Fields(one, f"system[{i}]") for i, one in enumerate(given)]
        texts = [_text(block) for block in blocks]
    else:
        raise fields.wrong("system", "text or a list of text blocks")
    if texts:
        texts[0] = _BILLING.sub("", texts[0], count=1)
    text = "\n".join(text for text in texts if text)
    return [{"role": "system", "content": text}] if text else []


def _text(block: Fields) -> str:
    text = block.text("text")
    if text is None:
        raise block.wrong("text", "text")
    return text


def _message(fields: Fields) -> list[Json]:
    """One message of Anthropic's is several of OpenAI's where it has results of tools."""
    role = fields.text("role")
    if role not in ("user", "assistant", "system"):
        raise fields.wrong("role", "user or assistant")
    content = fields.value("content")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise fields.wrong("content", "text or a list of blocks")
    blocks = [Fields(one, f"{fields.path('content')}[{i}]") for i, one in enumerate(content)]
    return _assistant(blocks) if role == "assistant" else _user(role, blocks)


def _user(role: str, blocks: Sequence[Fields]) -> list[Json]:
    results: list[Json] = []
    parts: list[Json] = []
    for block in blocks:
        match block.text("type"):
            case "tool_result":
                results.append(_result(block))
            case kind if kind in _NOT_TEXT:
                pass
            case _:
                parts.append(_part(block))
    rest: list[Json] = []
    if parts or not results:
        rest.append({"role": role, "content": _joined(parts)})
    return results + rest


def _assistant(blocks: Sequence[Fields]) -> list[Json]:
    parts: list[Json] = []
    calls: list[Json] = []
    reasoning = ""
    for block in blocks:
        match block.text("type"):
            case "tool_use":
                given = block.value("input")
                function = {"name": block.text("name"), "arguments": given if given else {}}
                calls.append({"id": block.text("id"), "type": "function", "function": function})
            case "thinking":
                reasoning += block.text("thinking") or ""
            case kind if kind in _NOT_TEXT:
                pass
            case _:
                parts.append(_part(block))
    message: Json = {"role": "assistant", "content": _joined(parts)}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return [message]


def _result(block: Fields) -> Json:
    content = block.value("content")
    path = block.path("content")
    if isinstance(content, list):
        content = _joined([_part(Fields(p, f"{path}[{i}]")) for i, p in enumerate(content)])
    elif content is None:
        content = ""
    elif not isinstance(content, str):
        raise block.wrong("content", "text or a list of blocks")
    return {"role": "tool", "tool_call_id": block.text("tool_use_id") or "", "content": content}


def _part(block: Fields) -> Json:
    """A block as a part of OpenAI's; what a model cannot read, it refuses by its own name."""
    match block.text("type"):
        case "text":
            return {"type": "text", "text": _text(block)}
        case "image":
            source = block.inner("source")
            if source is None:
                raise block.wrong("source", "where the image is")
            url = source.text("url") or f"data:{source.text('media_type')};base64,"
            return {"type": "image_url", "image_url": {"url": url + (source.text("data") or "")}}
    raise Refusal(
        f"{block.path('type')} {block.text('type')} is not supported: give text blocks",
        block.path("type"),
    )


def _joined(parts: Sequence[Json]) -> str | list[Json]:
    """One text, where there is nothing else: what OpenAI's clients send for the same."""
    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return list(parts)


def _tools(fields: Fields) -> list[Json] | None:
    given = fields.value("tools")
    if given is None:
        return None
    if not isinstance(given, list):
        raise fields.wrong("tools", "a list of tools")
    tools = []
    for i, one in enumerate(given):
        tool = Fields(one, f"tools[{i}]")
        kind = tool.text("type")
        if kind not in (None, "custom") and tool.value("input_schema") is None:
            continue  # Anthropic's own, which its servers do: no model is offered them here
        schema = tool.value("input_schema")
        if not isinstance(schema, Mapping):
            raise tool.wrong("input_schema", "a JSON schema")
        function = {
            "name": tool.text("name"),
            "description": tool.text("description") or "",
            "parameters": schema,
        }
        tools.append({"type": "function", "function": function})
    return tools


def _choice(fields: Fields) -> tuple[object, bool | None]:
    """OpenAI's tool_choice, and whether several calls may come."""
    asked = fields.inner("tool_choice")
    if asked is None:
        return None, None
    parallel = None if not asked.flag("disable_parallel_tool_use") else False
    match asked.text("type"):
        case "auto":
            return "auto", parallel
        case "any":
            return "required", parallel
        case "none":
            return "none", parallel
        case "tool":
            return {"type": "function", "function": {"name": asked.text("name")}}, parallel
    raise asked.wrong("type", "auto, any, tool or none")
