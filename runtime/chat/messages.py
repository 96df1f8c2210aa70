"""People's JSON, as OpenAI's chat completions have it, checked and brought into one form.

What is unusable is refused with the name of its field. Knows nothing of models and templates.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import RequestError
from ..grammar.asked import Schema
from ..text import shown, well_formed

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_DEPTH = 100  # of what is nested; C++ recurses over it
MAX_VALUES = 500_000  # values in one request, each of which takes some 100 bytes there

_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}

Json = dict[str, Any]


class Tools(NamedTuple):
    """``shown`` stand in the prompt; one of ``offered`` may be called, and ``choice`` is auto, none
    or required."""

    shown: Sequence[Json]
    offered: Sequence[Json]
    choice: str


def messages_of(given: object) -> list[Json]:
    """The messages of a request: text contents, tool calls with JSON arguments, known roles."""
    if not isinstance(given, list | tuple) or not given:
        raise RequestError("messages must be a list with at least one message", "messages")
    counted = _Counted()
    return [_message(message, f"messages[{i}]", counted) for i, message in enumerate(given)]


def tools_of(given: object, choice: object = None) -> Tools:
    """The tools of a request, by ``tools`` and ``tool_choice``."""
    if given is not None and not isinstance(given, list | tuple):
        raise RequestError("tools must be a list", "tools")
    counted = _Counted()
    tools = [_tool(tool, f"tools[{i}]", counted) for i, tool in enumerate(given or ())]
    if choice is None or choice == "auto":
        return Tools(tools, tools, "auto")
    if choice == "none":
        return Tools(tools, [], "none")
    if choice == "required":
        offered = tools
    elif isinstance(choice, Mapping) and isinstance(choice.get("function"), Mapping):
        name = choice["function"].get("name")
        offered = [tool for tool in tools if tool["function"]["name"] == name]
        if not offered:
            raise RequestError(f"there is no tool {shown(name)} to choose", "tool_choice")
    else:
        raise RequestError(
            "tool_choice must be auto, none, required, or name a function", "tool_choice"
        )
    if not offered:
        raise RequestError(f"tool_choice {choice} needs tools", "tool_choice")
    return Tools(tools, offered, "required")


def schema_of(response_format: object) -> Schema | None:
    """What a ``response_format`` holds the answer to."""
    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if not isinstance(response_format, Mapping) or kind not in (
        "text",
        "json_object",
        "json_schema",
    ):
        raise RequestError(
            "response_format must have a type of text, json_object or json_schema",
            "response_format",
        )
    if kind == "text":
        return None
    if kind == "json_object":
        schema = response_format.get("schema")  # llama-server's own addition
    else:
        wrapper = response_format.get("json_schema")
        schema = wrapper.get("schema") if isinstance(wrapper, Mapping) else None
        if schema is None:
            raise RequestError(
                "response_format needs json_schema.schema", "response_format.json_schema"
            )
    if schema is None or schema == {}:
        return Schema(schema=True)
    if not isinstance(schema, Mapping):
        raise RequestError("a JSON schema must be an object", "response_format")
    return Schema(schema=plain(schema, "response_format"))


class _Counted:
    def __init__(self) -> None:
        self.n = 0


def plain(value: Any, param: str, counted: _Counted | None = None, depth: int = 0) -> Any:
    """A copy of JSON that is bounded, and whose text UTF-8 can say."""
    counted = counted or _Counted()
    counted.n += 1
    if counted.n > MAX_VALUES:
        raise RequestError(f"{param} has more than {MAX_VALUES} values: send less", param)
    if depth > MAX_DEPTH:
        raise RequestError(f"{param} is nested more than {MAX_DEPTH} deep", param)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return well_formed(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise RequestError(f"{param} has a number that JSON cannot say", param)
        return value
    if isinstance(value, Mapping):
        return {
            well_formed(str(key)): plain(item, param, counted, depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [plain(item, param, counted, depth + 1) for item in value]
    raise RequestError(f"{param} has a value that JSON cannot say ({type(value).__name__})", param)


def _object(given: object, param: str) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise RequestError(f"{param} must be an object", param)
    return given


def _text(given: Mapping[str, Any], key: str, param: str) -> str | None:
    """A field that is text or null, or absent."""
    value = given.get(key)
    if value is None or isinstance(value, str):
        return None if value is None else well_formed(value)
    raise RequestError(f"{param}.{key} must be text", f"{param}.{key}")


def _message(given: object, param: str, counted: _Counted) -> Json:
    message = _object(given, param)
    role = message.get("role")
    if role not in ROLES:
        raise RequestError(
            f"{param}.role is {shown(role)!r}, and must be one of {', '.join(ROLES)}",
            f"{param}.role",
        )
    out: Json = {"role": role, "content": _content(message, param, counted)}
    if role == "assistant":
        reasoning = _text(message, "reasoning_content", param) or _text(message, "reasoning", param)
        if reasoning:
            out["reasoning_content"] = reasoning
        if message.get("tool_calls"):
            out["tool_calls"] = _calls(message["tool_calls"], f"{param}.tool_calls", counted)
    needs_content = role != "assistant" or not ("tool_calls" in out or "reasoning_content" in out)
    if needs_content and "content" not in message and not message.get("refusal"):
        raise RequestError(f"{param} has no content", f"{param}.content")
    for key in ("name", "tool_call_id"):
        if (value := _text(message, key, param)) is not None:
            out[key] = value
    return out


def _content(message: Mapping[str, Any], param: str, counted: _Counted) -> str | list[Json]:
    """Text, or its parts: some templates tell parts from a text."""
    content, param = message.get("content"), f"{param}.content"
    if content is None:
        content = message.get("refusal") or ""
    if isinstance(content, str):
        return well_formed(content)
    if not isinstance(content, list | tuple):
        raise RequestError(f"{param} must be text or a list of parts", param)
    parts = []
    for i, given in enumerate(content):
        part = _object(given, f"{param}[{i}]")
        kind = part.get("type")
        if kind not in _TEXT_PARTS:
            raise RequestError(
                f"{param}[{i}] is of type {shown(kind)!r}, and this model is given text only",
                f"{param}[{i}].type",
            )
        counted.n += 1
        text = _text(part, _TEXT_PARTS[kind], f"{param}[{i}]")
        if text is None:
            raise RequestError(f"{param}[{i}] has no {_TEXT_PARTS[kind]}", f"{param}[{i}]")
        parts.append({"type": "text", "text": text})
    return parts[0]["text"] if len(parts) == 1 else parts or ""


def _calls(given: object, param: str, counted: _Counted) -> list[Json]:
    if not isinstance(given, list | tuple):
        raise RequestError(f"{param} must be a list", param)
    return [_call(call, f"{param}[{i}]", counted) for i, call in enumerate(given)]


def _call(given: object, param: str, counted: _Counted) -> Json:
    call = _object(given, param)
    if call.get("type", "function") != "function":
        raise RequestError(f"{param}.type must be function", f"{param}.type")
    function = _object(call.get("function"), f"{param}.function")
    name = _text(function, "name", f"{param}.function")
    if not name:
        raise RequestError(f"{param}.function has no name", f"{param}.function.name")
    out: Json = {
        "type": "function",
        "function": {"name": name, "arguments": _arguments(function, f"{param}.function", counted)},
    }
    if (id_ := _text(call, "id", param)) is not None:
        out["id"] = id_
    return out


def _arguments(function: Mapping[str, Any], param: str, counted: _Counted) -> str:
    """As text, which templates that want an object have made one of."""
    param = f"{param}.arguments"
    arguments = function.get("arguments")
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return "{}"
    if not isinstance(arguments, str):
        return json.dumps(plain(arguments, param, counted), ensure_ascii=False)
    try:
        plain(json.loads(arguments, parse_constant=_no_constant), param, counted)
    except (ValueError, RecursionError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{param} must be JSON", param) from None
    return well_formed(arguments)  # as it is: a prompt computed before may begin with it


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _tool(given: object, param: str, counted: _Counted) -> Json:
    tool = _object(given, param)
    if tool.get("type", "function") != "function":
        raise RequestError(
            f"{param} is of type {shown(tool.get('type'))!r}, and only functions can be called",
            f"{param}.type",
        )
    function = _object(tool.get("function"), f"{param}.function")
    name = _text(function, "name", f"{param}.function")
    if not name:
        raise RequestError(f"{param}.function has no name", f"{param}.function.name")
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {}
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": _text(function, "description", f"{param}.function") or "",
            "parameters": plain(
                _object(parameters, f"{param}.function.parameters"),
                f"{param}.function.parameters",
                counted,
            ),
        },
    }
