"""An answer read while it grows: content, reasoning and tool calls.

llama.cpp's parsers read a text from its beginning; each time there is more, all of it is read
again, which takes a millisecond for 25,000 characters. What an answer turns out to mean is told
once: what was told is never taken back.

An answer that is not what its template's format asks for is no error: its text is the content.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..errors import RequestError
from ..text import well_formed
from .process import Process, ProcessEnded

_ALPHABET = string.ascii_letters + string.digits


class Call(NamedTuple):
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
                self.calls[call.index] = old._replace(arguments=old.arguments + call.arguments)


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
        return self._told(found, whole=False)

    def finish(self, cut: bool = False) -> Delta:
        """What the end of the answer adds. ``cut``: it was not the model that ended it."""
        found = self._parse(partial=False)
        if found is None and cut:
            found = self._parse(partial=True)
        return self._told(found, whole=not cut) if found is not None else self._raw()

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
        """The answer as content, as far as it was not told."""
        text, told = self._text, self.message
        if told.calls:
            rest = text[self._understood :]
        elif told.content:
            rest = text[text.rfind(told.content) + len(told.content) :]
        elif told.reasoning:
            rest = text[text.rfind(told.reasoning) + len(told.reasoning) :]
        else:
            rest = text
        return self._tell(Delta(content=rest))

    # --- telling --------------------------------------------------------------------------------

    def _tell(self, delta: Delta) -> Delta:
        self.message.add(delta)
        return delta

    def _told(self, found: Mapping[str, Any], whole: bool) -> Delta:
        """What of it is new."""
        told = self.message
        calls = found["tool_calls"]
        new = []
        for i, call in enumerate(calls):
            arguments, before = call["arguments"], ""
            if i < len(told.calls):
                before = told.calls[i].arguments
            elif not call["name"] or not (arguments or whole or i + 1 < len(calls)):
                break  # the name may grow
            fresh = _behind(before, arguments)
            if i == len(told.calls) + len([c for c in new if c.name is not None]):
                id_ = call["id"] or "".join(secrets.choice(_ALPHABET) for _ in range(32))
                new.append(Call(i, id_, call["name"], fresh))
            elif fresh:
                new.append(Call(i, None, None, fresh))
        return self._tell(
            Delta(
                _behind(told.reasoning, found["reasoning_content"]),
                _behind(told.content, found["content"]),
                new,
            )
        )


def _behind(told: str, text: str) -> str:
    """What ``text`` adds; nothing where it is another text than was told."""
    return text[len(told) :] if text.startswith(told) else ""
