"""Bodies of ``/v1/responses``, OpenAI's newer form, as the Open Responses specification has it.

Nothing is kept between requests: a client sends the whole conversation, as agents do. What is only
possible with a store is refused.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ..chat.parser import Call as ToolCall
from ..chat.parser import Message
from ..engine.generation import Result
from ..engine.request import Event, Finished
from . import settings
from .fields import Fields
from .refusal import Refusal
from .stream import Piece
from .texts import Conversation, Reader, Texts
from .turn import Turn, continues, finished, template_kwargs
from .usage import Stamp, timings

Json = dict[str, Any]

_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


class Responses:
    """One body; its one request is to be computed."""

    def __init__(self, body: object, texts: Texts) -> None:
        fields = Fields(body)
        _refuse_others(fields)
        self._fields = fields
        self._sampling = settings.sampling(fields, texts.n_vocab)
        self._max_tokens = fields.integer("max_output_tokens", 1, 2**31 - 1)
        self._tools = _tools(fields)
        self.turn = Turn(
            _conversation(fields, self._tools),
            texts,
            max_tokens=self._max_tokens,
            sampling=self._sampling,
        )
        self.requests = self.turn.requests

    def response(self, results: Sequence[Result], stamp: Stamp) -> Json:
        """The response body of what the request came to."""
        answer = self.turn.answered(results[0])
        return self.finished(stamp, answer.end, answer.message, _items(answer.message, stamp))

    def stream(self, stamp: Stamp) -> ResponseStream:
        return ResponseStream(self, stamp)

    def finished(self, stamp: Stamp, end: Finished, message: Message, items: list[Json]) -> Json:
        n_reasoning = self.turn.n_tokens(message.reasoning)
        cut = end.reason != "stop"
        if cut and items:
            items = [*items[:-1], {**items[-1], "status": "incomplete"}]
        return {
            **self.resource(stamp, "incomplete" if cut else "completed"),
            "completed_at": None if cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": items,
            "usage": {
                "input_tokens": end.prompt_tokens,
                "input_tokens_details": {"cached_tokens": end.cached_tokens},
                "output_tokens": end.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": n_reasoning},
                "total_tokens": end.prompt_tokens + end.completion_tokens,
            },
            "timings": timings(end),
        }

    def resource(self, stamp: Stamp, status: str) -> Json:
        """A response before its end: what was asked, and nothing yet of what is answered."""
        fields, sampling = self._fields, self._sampling
        reasoning = fields.value("reasoning") or {}
        text = fields.value("text") or {}
        return {
            "id": stamp.id,
            "object": "response",
            "created_at": stamp.created,
            "completed_at": None,
            "status": status,
            "incomplete_details": None,
            "error": None,
            "model": stamp.model,
            "previous_response_id": None,
            "instructions": fields.text("instructions"),
            "output": [],
            "tools": [_shown(tool) for tool in self._tools],
            "tool_choice": fields.value("tool_choice") or "auto",
            "parallel_tool_calls": fields.flag("parallel_tool_calls", default=True),
            "truncation": "disabled",
            "text": {"format": text.get("format") or {"type": "text"}},
            "temperature": sampling.temp,
            "top_p": sampling.top_p,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "top_logprobs": 0,
            "reasoning": {
                "effort": reasoning.get("effort"),
                "summary": reasoning.get("summary"),
            },
            "usage": None,
            "max_output_tokens": self._max_tokens,
            "max_tool_calls": None,
            "store": False,
            "background": False,
            "service_tier": "default",
            "metadata": fields.value("metadata") or {},
            "safety_identifier": fields.value("safety_identifier"),
            "prompt_cache_key": fields.value("prompt_cache_key"),
        }


class ResponseStream:
    """The specification's events: each item of the output begins, grows, and is done."""

    def __init__(self, call: Responses, stamp: Stamp) -> None:
        self._call, self._stamp = call, stamp
        self._reader: Reader = call.turn.reader()
        self._n = 0  # events so far
        self._items: list[Json] = []  # of the output; the last may be open
        self._open: str | int | None = None  # kind of the open item, or its call's index
        self._end: Finished | None = None

    def begin(self) -> list[Piece]:
        resource = self._call.resource(self._stamp, "in_progress")
        return [
            self._piece("response.created", response=resource),
            self._piece("response.in_progress", response=resource),
        ]

    def push(self, i: int, events: Sequence[Event]) -> list[Piece]:
        delta = self._call.turn.read(self._reader, events)
        pieces: list[Piece] = []
        if delta.reasoning:
            pieces += self._grow("reasoning", "reasoning_text", delta.reasoning)
        if delta.content:
            pieces += self._grow("message", "output_text", delta.content)
        for call in delta.calls:
            pieces += self._call_more(call)
        if (end := finished(events)) is not None:
            self._end = end
            if not self._items:  # an answer of nothing is a message all the same
                pieces += self._grow("message", "output_text", "")
            pieces += self._close()
        return pieces

    def end(self) -> list[Piece]:
        assert self._end is not None
        done = self._call.finished(self._stamp, self._end, self._reader.message, self._items)
        return [self._piece(f"response.{done['status']}", response=done)]

    def fail(self, refusal: Refusal) -> list[Piece]:
        told = {"code": refusal.code or refusal.kind, "message": str(refusal)}
        error = {**told, "type": refusal.kind, "param": refusal.param}
        failed = {**self._call.resource(self._stamp, "failed"), "error": told}
        return [
            self._piece("error", error=error, **told, param=refusal.param),
            self._piece("response.failed", response=failed),
        ]

    # -- items

    def _grow(self, kind: str, part: str, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        if self._open != kind:
            pieces += self._begin(kind, _empty(kind, self._new_id(kind)))
            added = _content(part, "")
            pieces.append(self._at("response.content_part.added", content_index=0, part=added))
            self._items[-1]["content"] = [added]
        content = self._items[-1]["content"][0]
        self._items[-1]["content"] = [{**content, "text": content["text"] + text}]
        more: Json = {"logprobs": []} if part == "output_text" else {}
        return [*pieces, self._at(f"response.{part}.delta", content_index=0, delta=text, **more)]

    def _call_more(self, call: ToolCall) -> list[Piece]:
        pieces: list[Piece] = []
        if call.name is not None:
            item = _function_call(call, self._new_id("function_call"), "in_progress")
            pieces += self._begin(call.index, {**item, "arguments": ""})
        if call.arguments:
            self._items[-1]["arguments"] += call.arguments
            name = "response.function_call_arguments.delta"
            pieces.append(self._at(name, delta=call.arguments))
        return pieces

    def _begin(self, kind: str | int, item: Json) -> list[Piece]:
        pieces = self._close()
        self._open = kind
        self._items.append(item)
        index = len(self._items) - 1
        added = self._piece("response.output_item.added", output_index=index, item=dict(item))
        return [*pieces, added]

    def _close(self) -> list[Piece]:
        if self._open is None:
            return []
        self._open = None
        item = self._items[-1]
        pieces = []
        if item["type"] == "function_call":
            name = "response.function_call_arguments.done"
            pieces.append(self._at(name, arguments=item["arguments"], name=item["name"]))
        else:
            (part,) = item["content"]
            more: Json = {"logprobs": []} if part["type"] == "output_text" else {}
            name = f"response.{part['type']}.done"
            pieces.append(self._at(name, content_index=0, text=part["text"], **more))
            pieces.append(self._at("response.content_part.done", content_index=0, part=part))
        cut = self._end is not None and self._end.reason != "stop"
        item["status"] = "incomplete" if cut else "completed"
        index = len(self._items) - 1
        done = self._piece("response.output_item.done", output_index=index, item=dict(item))
        return [*pieces, done]

    def _new_id(self, kind: str) -> str:
        return _id(kind, self._stamp, len(self._items))

    def _at(self, event: str, /, **more: Any) -> Piece:
        """An event of the open item."""
        index = len(self._items) - 1
        return self._piece(event, item_id=self._items[-1]["id"], output_index=index, **more)

    def _piece(self, event: str, /, **more: Any) -> Piece:
        self._n += 1
        return Piece({"type": event, "sequence_number": self._n - 1, **more}, event)


def count_tokens(body: object, texts: Texts) -> Json:
    """The response body of ``/v1/responses/input_tokens``."""
    call = Responses(body, texts)
    return {"object": "response.input_tokens", "input_tokens": call.turn.n_prompt}


# --- what is answered ---------------------------------------------------------------------------


def _items(message: Message, stamp: Stamp) -> list[Json]:
    items: list[Json] = []
    if message.reasoning:
        part = _content("reasoning_text", message.reasoning)
        items.append({**_empty("reasoning", _id("reasoning", stamp, 0)), "content": [part]})
    if message.content or not message.calls:
        part = _content("output_text", message.content)
        items.append({**_empty("message", _id("message", stamp, len(items))), "content": [part]})
    for call in message.calls:
        id_ = _id("function_call", stamp, len(items))
        items.append(_function_call(call, id_, "completed"))
    return [{**item, "status": "completed"} for item in items]


_PREFIXES = {"reasoning": "rs_", "message": "msg_", "function_call": "fc_"}


def _id(kind: str, stamp: Stamp, index: int) -> str:
    return f"{_PREFIXES[kind]}{stamp.id.removeprefix('resp_')}{index:02d}"


def _empty(kind: str, id_: str) -> Json:
    item: Json = {"id": id_, "type": kind, "status": "in_progress", "content": []}
    more: Json = {"summary": []} if kind == "reasoning" else {"role": "assistant"}
    return item | more


def _content(kind: str, text: str) -> Json:
    part: Json = {"type": kind, "text": text}
    return part | {"annotations": [], "logprobs": []} if kind == "output_text" else part


def _function_call(call: ToolCall, id_: str, status: str) -> Json:
    return {
        "id": id_,
        "type": "function_call",
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
        "status": status,
    }


def _shown(tool: Json) -> Json:
    function = tool["function"]
    return {
        "type": "function",
        "name": function["name"],
        "description": function["description"],
        "parameters": function["parameters"],
        "strict": function["strict"],
    }


# --- what is asked ------------------------------------------------------------------------------


def _refuse_others(fields: Fields) -> None:
    """What would change the answer and is not done."""
    if fields.value("previous_response_id"):
        raise Refusal(
            "responses are not stored here: send the whole conversation as input",
            "previous_response_id",
            code="previous_response_not_found",
        )
    if fields.value("conversation"):
        raise Refusal("conversations are not stored here: send one as input", "conversation")
    if fields.flag("background"):
        raise Refusal("background is not supported: wait for the answer", "background")
    if fields.value("prompt"):
        raise Refusal("prompts are not stored here: send one as input", "prompt")


def _conversation(fields: Fields, tools: Sequence[Json]) -> Conversation:
    messages: list[Json] = []
    if instructions := fields.text("instructions"):
        messages.append({"role": "system", "content": instructions})
    given = fields.value("input")
    if given is None or isinstance(given, str):
        messages.append({"role": "user", "content": given or ""})
    elif isinstance(given, list):
        for i, one in enumerate(given):
            _add(messages, Fields(one, f"input[{i}]"))
        if not given:  # agents ask so whether anyone is there
            messages.append({"role": "user", "content": ""})
    else:
        raise fields.wrong("input", "text or a list of items")
    choice = _choice(fields)  # looked at without tools too: it is told again
    reasoning = fields.inner("reasoning")
    effort = None if reasoning is None else reasoning.text("effort")
    if effort is not None and effort not in _EFFORTS:
        raise Refusal(f"reasoning.effort must be one of {', '.join(_EFFORTS)}", "reasoning.effort")
    return Conversation(
        messages=messages,
        tools=tools or None,
        tool_choice=choice if tools else None,
        parallel_tool_calls=fields.optional_flag("parallel_tool_calls"),
        held_to=settings.text_format(fields),
        reasoning_effort=effort,
        template_kwargs=template_kwargs(fields),
        continue_final=continues(messages),
    )


def _add(messages: list[Json], item: Fields) -> None:
    """One item of the input; what belongs to one message of the model's is put together."""
    match item.text("type") or "message":
        case "message":
            role = item.text("role")
            content = _message_content(item)
            if role == "assistant":
                own = _own(messages)
                own["content"] = "\n".join(filter(None, (own["content"], _joined(content))))
            else:
                messages.append({"role": role, "content": content})
        case "reasoning":
            own = _own(messages)
            own["reasoning_content"] = own.get("reasoning_content", "") + _reasoning(item)
        case "function_call":
            function = {
                "name": item.text("name"),
                "arguments": item.value("arguments"),
            }
            call = {"id": item.text("call_id"), "type": "function", "function": function}
            _own(messages).setdefault("tool_calls", []).append(call)
        case "function_call_output":
            output = item.value("output")
            if isinstance(output, list):
                path = item.path("output")
                output = [_part(Fields(one, f"{path}[{i}]")) for i, one in enumerate(output)]
            elif not isinstance(output, str):
                output = json.dumps(output)
            messages.append(
                {"role": "tool", "tool_call_id": item.text("call_id") or "", "content": output}
            )
        case "item_reference":
            raise Refusal("items are not stored here: send the item itself", item.path("type"))
        case kind if kind in ("web_search_call", "file_search_call", "image_generation_call"):
            pass  # what another server did; its result stands in the messages
        case kind:
            raise Refusal(f"{item.path('type')} {kind} is not supported", item.path("type"))


def _own(messages: list[Json]) -> Json:
    """The model's message at the end, begun where there is none."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _message_content(item: Fields) -> str | list[Json]:
    content = item.value("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise item.wrong("content", "text or a list of parts")
    path = item.path("content")
    return [_part(Fields(one, f"{path}[{i}]")) for i, one in enumerate(content)]


def _part(part: Fields) -> Json:
    """A part as one of OpenAI's older form; what a model cannot read, it refuses by its name."""
    match part.text("type"):
        case "input_text" | "output_text" | "text" | "refusal" as kind:
            text = part.text("refusal" if kind == "refusal" else "text")
            if text is None:
                raise part.wrong("text", "text")
            return {"type": "text", "text": text}
        case "input_image":
            return {"type": "image_url", "image_url": {"url": part.text("image_url") or ""}}
    raise Refusal(
        f"{part.path('type')} {part.text('type')} is not supported: give text", part.path("type")
    )


def _joined(content: str | list[Json]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.get("text", "") for part in content)


def _reasoning(item: Fields) -> str:
    content = item.value("content") or item.value("summary") or []
    if not isinstance(content, list):
        raise item.wrong("content", "a list of parts")
    return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))


def _tools(fields: Fields) -> list[Json]:
    """The functions among the tools. Others are such as a server of OpenAI's runs itself: agents
    list them whoever answers, and a model that is not told of them does without."""
    given = fields.value("tools")
    if given is None:
        return []
    if not isinstance(given, list):
        raise fields.wrong("tools", "a list of tools")
    tools = []
    for i, one in enumerate(given):
        tool = Fields(one, f"tools[{i}]")
        if tool.text("type") != "function":
            continue
        if not tool.text("name"):
            raise tool.wrong("name", "the function's name")
        function = {
            "name": tool.text("name"),
            "description": tool.text("description") or "",
            "parameters": tool.value("parameters") or {},
            "strict": tool.flag("strict"),
        }
        tools.append({"type": "function", "function": function})
    return tools


def _choice(fields: Fields) -> object:
    choice = fields.value("tool_choice")
    if isinstance(choice, Mapping):
        if choice.get("type") == "function" and isinstance(choice.get("name"), str):
            return {"type": "function", "function": {"name": choice["name"]}}
        if choice.get("type") == "allowed_tools":
            choice = choice.get("mode", "auto")
    if choice not in (None, "auto", "none", "required"):
        raise fields.wrong("tool_choice", "auto, none, required or a function")
    return choice
