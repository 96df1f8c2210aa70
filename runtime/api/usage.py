"""What all response bodies say alike: who answers, why it ended, what it took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..engine.request import Finished, Progress, Reason

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


def usage(
    ends: Sequence[Finished], per_prompt: int = 1, reasoning_tokens: int | None = None
) -> dict[str, Any]:
    """``ends`` are of ``per_prompt`` choices of each prompt, which counts once."""
    firsts = ends[::per_prompt]
    prompt = sum(end.prompt_tokens for end in firsts)
    completion = sum(end.completion_tokens for end in ends)
    found = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(end.cached_tokens for end in firsts)},
    }
    if reasoning_tokens is not None:
        found["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens}
    return found


def progress(event: Progress, n_prompt: int) -> dict[str, Any]:
    """How far a prompt is, under llama-server's names."""
    return {
        "total": n_prompt,
        "cache": event.cached_tokens,
        "processed": event.n_tokens,
        "time_ms": event.seconds * 1e3,
    }


def timings(end: Finished) -> dict[str, Any]:
    """How fast one answer was, under llama.cpp's names; what waited in the queue is not counted."""
    queued, first, total = end.timings
    prompt_ms, predicted_ms = (first - queued) * 1e3, (total - first) * 1e3
    prompt_n = end.prompt_tokens - end.cached_tokens
    # The first token comes with the prompt.
    predicted_n = max(0, end.completion_tokens - 1)
    return {
        "cache_n": end.cached_tokens,
        "prompt_n": prompt_n,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": _ratio(prompt_ms, prompt_n),
        "prompt_per_second": _ratio(prompt_n * 1e3, prompt_ms),
        "predicted_n": end.completion_tokens,
        "predicted_ms": predicted_ms,
        "predicted_per_token_ms": _ratio(predicted_ms, predicted_n),
        "predicted_per_second": _ratio(predicted_n * 1e3, predicted_ms),
        "queued_ms": queued * 1e3,
    }


def _ratio(value: float, by: float) -> float:
    return value / by if by > 0 else 0.0
