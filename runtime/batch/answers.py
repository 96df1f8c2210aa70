"""The answer to one line: what is asked of the engine for it, and the form of what comes of it.

Knows no files. A line that never becomes a request has an ``error``; one whose body is refused, or
could not be computed, has a response with OpenAI's error body and its status.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import fields
from typing import Any, NamedTuple, Protocol

from ..api.calls import KINDS
from ..api.refusal import OUR_FAULT, Refusal, refusal_of
from ..api.stream import Call
from ..api.texts import Texts
from ..api.usage import Stamp
from ..engine.generation import Generation, Result
from ..engine.request import EngineClosed, PromptScored, Request, Token
from .lines import Asked, BadLine

Rest = dict[str, Any]  # an answer's fields but for its ids: "response" and "error"

_TRIES = 2  # of what failed on our side: all sequences of a step fail with one read
_FIELDS = [field.name for field in fields(Request) if field.name != "tokens"]


class Submitter(Protocol):
    """What an engine is here."""

    def submit(self, prompt: list[int], **settings: Any) -> Generation: ...


class Counts:
    """Tokens so far, for whoever watches."""

    def __init__(self) -> None:
        self.prompt = 0
        self.answered = 0


class Ready(NamedTuple):
    """A line that was understood."""

    custom_id: str
    call: Call
    prefix: str  # of its response's id


class Answerer:
    """Answers with one engine; ``model`` is its name in responses."""

    def __init__(self, engine: Submitter, texts: Texts, model: str) -> None:
        self._engine, self._texts, self._model = engine, texts, model
        self.counts = Counts()

    def understand(self, asked: Asked) -> Ready:
        """BadLine for an address that is none, Refusal for a body that cannot be answered."""
        kind = KINDS.get(asked.url)
        if kind is None:
            known = ", ".join(KINDS)
            raise BadLine("invalid_url", f"the url must be one of {known}", asked.custom_id)
        try:
            call = kind.read(asked.body, self._texts)
        except Exception as error:  # whatever a client's JSON comes to, the others go on
            raise refusal_of(error) from error
        return Ready(asked.custom_id, call, kind.prefix)

    async def compute(self, request: Request) -> Result:
        """Refusal for what cannot be computed; EngineClosed when nothing can be any more."""
        for left in reversed(range(_TRIES)):
            try:
                return await self._compute(request)
            except EngineClosed:
                raise
            except Exception as error:
                refusal = refusal_of(error)
                if not left or refusal.status < OUR_FAULT:
                    raise refusal from error
        raise AssertionError

    async def _compute(self, request: Request) -> Result:
        settings = {name: getattr(request, name) for name in _FIELDS}
        generation = self._engine.submit(list(request.tokens), **settings)
        with generation:
            async for event in generation:
                if isinstance(event, PromptScored):
                    self.counts.prompt += len(request.tokens)
                elif isinstance(event, Token):
                    self.counts.answered += 1
        return await generation.wait()

    def answer(self, ready: Ready, results: list[Result]) -> Rest:
        stamp = Stamp(ready.prefix + uuid.uuid4().hex, int(time.time()), self._model)
        return _response(200, ready.call.response(results, stamp))


def refused(refusal: Refusal) -> Rest:
    return _response(refusal.status, refusal.body())


def bad(error: BadLine) -> Rest:
    return {"response": None, "error": {"code": error.code, "message": str(error)}}


def _response(status: int, body: dict[str, Any]) -> Rest:
    response = {"status_code": status, "request_id": f"req_{uuid.uuid4().hex}", "body": body}
    return {"response": response, "error": None}
