"""Which bodies are understood, by the path that a client names, and what an understood one can do.

A call says what is to be computed. Its answer is a body, or the same in pieces as it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from .anthropic import Messages
from .chat import ChatCompletions
from .completions import Completions
from .responses import Responses
from .stream import Call
from .texts import Texts


class Kind(NamedTuple):
    prefix: str  # of a response's id
    read: Callable[[object, Texts], Call]  # Refusal for a body that is not understood
    required: Sequence[str] = ()  # of its fields, by its specification


KINDS: Mapping[str, Kind] = {
    "/v1/chat/completions": Kind("chatcmpl-", ChatCompletions, ("model", "messages")),
    "/v1/completions": Kind("cmpl-", Completions, ("prompt",)),
    "/v1/responses": Kind("resp_", Responses, ("model",)),
}
MESSAGES = Kind("msg_", Messages, ("model", "messages", "max_tokens"))
