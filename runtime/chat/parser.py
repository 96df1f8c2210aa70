"""An answer read while it grows: content, reasoning and tool calls.

llama.cpp's parsers read a text from its beginning; each time there is more, all of it is read
again, which takes a millisecond for 25,000 characters. What an answer turns out to mean is told
once: what was told is never taken back.

An answer that is not what its template's format asks for is no error: what cannot be read of it is
content as it is. White space between a thought, a content and a call belongs to the format.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ..errors import RequestError
from ..text import well_formed
from .process import Process, ProcessEnded

_ALPHABET = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Call:
    """A tool call, or what is new of one: then ``id`` and ``name`` come once, with the first."""

    index: int
    id: str | None
    name: str | None
    arguments: str


class Delta(NamedTuple):
    """What is new, in the order of its fields."""

    reasoning: str = ""
    content: str = ""
    calls: Sequence[Call] = ()


@dataclass
class Message:
    """An answer as far as it was told: the sum of all deltas."""

    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        self.reasoning += delta.reasoning
        self.content += delta.content
        for call in delta.calls:
            if call.index == len(self.calls):
                self.calls.append(call)
            else:
                old = self.calls[call.index]
                self.calls[call.index] = replace(old, arguments=old.arguments + call.arguments)


class Parser:
    """Reads one answer. Not thread-safe; different ones may be used at the same time."""

    def __init__(self, process: Process, state: Mapping[str, Any]) -> None:
        self._process, self._state = process, state
        self._id = secrets.token_hex(8)
        self._text = ""
        self._read = 0  # how much of the text the process has
        self._understood = 0  # how much of it could be read at last
        self.message = Message()

    def push(self, text: str) -> Delta:
        """What more of the answer adds."""
        self._text += well_formed(text)
        found = self._parse(partial=True)
        if found is None:  # what follows may explain it
            return Delta()
        self._understood = len(self._text)
        return self._tell(found, whole=False)

    def finish(self, text: str = "", cut: bool = False) -> Delta:
        """What the end of the answer adds. ``cut``: it was not the model that ended it."""
        self._text += well_formed(text)
        found = self._parse(partial=False)
        if found is None and cut:
            found = self._parse(partial=True)
        return self._raw() if found is None else self._tell(found, whole=True)

    # --- reading --------------------------------------------------------------------------------

    def _parse(self, partial: bool) -> dict[str, Any] | None:
        """What the text so far means; None where it has no meaning."""
        more, self._read = self._text[self._read :], len(self._text)
        question = {"op": "parse", "id": self._id, "more": more, "partial": partial}
        try:
            found = self._process.ask(question)
            if "unknown" in found:  # it is new to this process
                self._process.ask({"op": "parser", "id": self._id, "state": self._state})
                found = self._process.ask({**question, "more": self._text})
        except (ProcessEnded, RequestError):  # its nesting, or its length, is more than is taken
            return None
        return None if "error" in found or "unknown" in found else found

    def _raw(self) -> Delta:
        """The end of an answer that cannot be read as a whole: the rest of it is content."""
        told = self.message
        if told.calls:
            return self._add(Delta(content=self._text[self._understood :]))
        beginning = self._parse(partial=True) or {}
        reasoning = _behind(told.reasoning, beginning.get("reasoning_content", ""))
        content = told.content + _behind(told.content, beginning.get("content", ""))
        rest = self._text
        if told.reasoning + reasoning:
            rest = _after(rest, told.reasoning + reasoning).lstrip()
            for tag in self._state.get("thinking_end_tags", ()):
                rest = rest.removeprefix(tag.strip())
        if content.strip():
            rest = content + _after(rest, content)
        return self._add(Delta(reasoning, _behind(told.content, rest)))

    # --- telling --------------------------------------------------------------------------------

    def _add(self, delta: Delta) -> Delta:
        self.message.add(delta)
        return delta

    def _tell(self, found: Mapping[str, Any], whole: bool) -> Delta:
        """What of it is new."""
        told, calls, content = self.message, found["tool_calls"], found["content"]
        if calls or not whole:  # what may follow is not white space of the content's
            content = content.rstrip()
        new = []
        for i, call in enumerate(calls):
            begun = i < len(told.calls)
            is_last = i + 1 == len(calls)
            if not begun and (
                not call["name"] or (is_last and not call["arguments"] and not whole)
            ):
                break  # its name may grow
            fresh = _behind(told.calls[i].arguments if begun else "", call["arguments"])
            if not begun:
                new.append(Call(i, call["id"] or _new_id(), call["name"], fresh))
            elif fresh:
                new.append(Call(i, None, None, fresh))
        reasoning = _behind(told.reasoning, found["reasoning_content"].rstrip())
        return self._add(Delta(reasoning, _behind(told.content, content), new))


def _new_id() -> str:
    """As llama-server makes them."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(32))


def _after(text: str, part: str) -> str:
    """What stands behind the last place of ``part``; all of it where there is none."""
    return text.rpartition(part)[2]


def _behind(told: str, text: str) -> str:
    """What ``text`` adds; nothing where it is another text than was told."""
    return text[len(told) :] if text.startswith(told) else ""
