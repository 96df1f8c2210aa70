"""An understood body, and its answer in pieces: what every kind of call can do.

Knows no kind of body, and not how pieces travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from ..engine.generation import Result
from ..engine.request import Event, Request
from .refusal import Refusal
from .usage import Stamp


class Piece(NamedTuple):
    """One event of a stream: JSON, or a word that is none; ``name`` where its protocol has one."""

    data: dict[str, Any] | str
    name: str | None = None


class Stream(Protocol):
    """An answer as it comes. ``push`` may take some milliseconds: it reads tool calls."""

    def begin(self) -> list[Piece]:
        """What comes first."""

    def push(self, i: int, events: Sequence[Event]) -> list[Piece]:
        """What came of the request ``i``; a Finished among it is the last."""

    def end(self) -> list[Piece]:
        """All requests have finished."""

    def fail(self, refusal: Refusal) -> list[Piece]:
        """The end of an answer that does not come."""


class Call(Protocol):
    """A body that was understood: what is to be computed, and what is answered then."""

    requests: list[Request]

    def response(self, results: Sequence[Result], stamp: Stamp) -> dict[str, Any]: ...

    def stream(self, stamp: Stamp) -> Stream: ...


DONE = Piece("[DONE]")
