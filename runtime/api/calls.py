"""Which bodies are understood, by the path that a client names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from ..engine.generation import Result
from ..engine.request import Request
from .chat import ChatCompletions
from .completions import Completions
from .texts import Texts
from .usage import Stamp


class Call(Protocol):
    """A body that was understood: what is to be computed, and what is answered then."""

    requests: list[Request]

    def response(self, results: Sequence[Result], stamp: Stamp) -> dict[str, Any]: ...


class Kind(NamedTuple):
    prefix: str  # of a response's id
    read: Callable[[object, Texts], Call]  # Refusal for a body that is not understood


KINDS: Mapping[str, Kind] = {
    "/v1/chat/completions": Kind("chatcmpl-", ChatCompletions),
    "/v1/completions": Kind("cmpl-", Completions),
    # /v1/responses belongs here.
}
