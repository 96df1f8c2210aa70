"""The messages of a conversation as people send them, made what chat templates understand.

The texts of a list of parts are joined by line ends, as llama.cpp's server does; ``developer`` is
the newer name of ``system``.
"""

from __future__ import annotations

from typing import Any

from ..text import well_formed
from .fields import Fields
from .refusal import Refusal

_ROLES = ("system", "user", "assistant", "tool", "function")


def messages(fields: Fields) -> list[dict[str, Any]]:
    given = fields.value("messages")
    if not isinstance(given, list) or not given:
        raise fields.wrong("messages", "a list of messages")
    return [_message(Fields(one, f"messages[{i}]")) for i, one in enumerate(given)]


def _message(fields: Fields) -> dict[str, Any]:
    role = fields.text("role")
    if role == "developer":
        role = "system"
    if role not in _ROLES:
        raise fields.wrong("role", f"developer, {', '.join(_ROLES)}")
    message: dict[str, Any] = {"role": role, "content": _content(fields)}
    for name in ("name", "tool_call_id"):
        if (text := fields.text(name)) is not None:
            message[name] = text
    if calls := fields.value("tool_calls"):
        if not isinstance(calls, list):
            raise fields.wrong("tool_calls", "a list of calls")
        message["tool_calls"] = calls
    return message


def _content(fields: Fields) -> str:
    content = fields.value("content")
    if content is None:
        if fields.text("role") != "assistant":
            raise fields.wrong("content", "text or a list of parts")
        return ""
    if isinstance(content, str):
        return well_formed(content)
    if not isinstance(content, list):
        raise fields.wrong("content", "text or a list of parts")
    path = fields.path("content")
    return "\n".join(_part(Fields(part, f"{path}[{i}]")) for i, part in enumerate(content))


def _part(fields: Fields) -> str:
    kind = fields.text("type")
    if kind not in ("text", "input_text", "output_text", "refusal"):
        raise Refusal(
            f"{fields.path('type')} {kind} is not supported: this model reads text only",
            fields.path("type"),
        )
    text = fields.text("refusal" if kind == "refusal" else "text")
    if text is None:
        raise fields.wrong("text", "text")
    return well_formed(text)
