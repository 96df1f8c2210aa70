"""One turn of a conversation, as every protocol that has conversations asks for it: the prompt, the
requests, and what their answers mean.

Knows neither the fields of a protocol nor its answers.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any, NamedTuple

from ..chat.parser import Delta, Message
from ..engine.generation import Result
from ..engine.request import Event, Finished, Request, Sampling, Token
from ..errors import UserError
from . import settings
from .fields import Fields
from .refusal import Refusal
from .texts import Conversation, Reader, Texts, check_length

MOST_STOPS = 64


class Answered(NamedTuple):
    """What an answer came to."""

    message: Message
    end: Finished
    stop_text: str | None  # a client's own that ended it


class Turn:
    """``n`` answers to a conversation are to be computed."""

    def __init__(
        self,
        asked: Conversation,
        texts: Texts,
        *,
        max_tokens: int | None,
        sampling: Sampling,
        stop: Sequence[str] = (),
        n: int = 1,
        **more: Any,  # fields of Request
    ) -> None:
        self._texts = texts
        self._stop: Set[str] = set(stop)
        try:
            self.prompt = texts.conversation(asked)
        except UserError as error:
            raise Refusal(str(error), getattr(error, "param", None) or "messages") from None
        tokens = list(self.prompt.tokens)
        check_length("messages", tokens, max_tokens, texts)
        self.n_prompt = len(tokens)
        self.requests = [
            Request(
                tokens=tokens,
                max_tokens=max_tokens,
                sampling=settings.choice(sampling, k),
                stop=[*stop, *self.prompt.stops],
                constraint=self.prompt.constraint,
                shown=self.prompt.preserved,
                **more,
            )
            for k in range(n)
        ]

    def reader(self) -> Reader:
        return self._texts.reader(self.prompt)

    def answered(self, result: Result) -> Answered:
        reader, end = self.reader(), result.finished
        stop_text = self.stop_text(end)
        reader.finish(result.text, cut=end.reason != "stop" or stop_text is not None)
        return Answered(reader.message, end, stop_text)

    def read(self, reader: Reader, events: Sequence[Event]) -> Delta:
        """What more of an answer adds."""
        text = "".join(event.text for event in events if isinstance(event, Token))
        end = finished(events)
        if end is None:
            return reader.push(text) if text else Delta()
        cut = end.reason != "stop" or self.stop_text(end) is not None
        return reader.finish(text + end.text, cut)

    def stop_text(self, end: Finished) -> str | None:
        """A client's own, not one with which its template ends all answers."""
        return end.stop_text if end.stop_text in self._stop else None

    def n_tokens(self, text: str) -> int:
        """About as many tokens as a part of an answer had."""
        return len(self._texts.encode(text)) - len(self._texts.encode("")) if text else 0


def finished(events: Sequence[Event]) -> Finished | None:
    last = events[-1] if events else None
    return last if isinstance(last, Finished) else None


def continues(messages: object) -> bool:
    """Whether the last message is the model's own beginning, which is to be continued."""
    if not isinstance(messages, list) or not messages or not isinstance(messages[-1], dict):
        return False
    last = messages[-1]
    return last.get("role") == "assistant" and not last.get("tool_calls")


def template_kwargs(fields: Fields) -> dict[str, Any]:
    given = fields.value("chat_template_kwargs")
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise fields.wrong("chat_template_kwargs", "an object")
    return given
