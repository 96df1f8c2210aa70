"""What all of OpenAI's response bodies say alike: who answers, why it ended, what it took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..engine.generation import Result
from ..engine.request import Reason

_LEAST = -9999.0  # how OpenAI writes that a token is impossible


class Stamp(NamedTuple):
    """What a response says of itself."""

    id: str
    created: int  # seconds since 1970
    model: str


def head(stamp: Stamp, kind: str) -> dict[str, Any]:
    return {"id": stamp.id, "object": kind, "created": stamp.created, "model": stamp.model}


def finite(logprob: float) -> float:
    """A log probability that JSON can say."""
    return max(logprob, _LEAST)


def finish_reason(reason: Reason) -> str:
    """A full context is OpenAI's length too."""
    return "stop" if reason == "stop" else "length"


def usage(results: Sequence[Result], per_prompt: int = 1) -> dict[str, Any]:
    """``results`` are ``per_prompt`` choices of each prompt, which counts once."""
    ends = [result.finished for result in results]
    firsts = ends[::per_prompt]
    prompt = sum(end.prompt_tokens for end in firsts)
    completion = sum(end.completion_tokens for end in ends)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(end.cached_tokens for end in firsts)},
    }
