"""What all response bodies say alike: who answers, why it ended, what it took."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ..engine.request import Event, Finished, Progress, PromptScored, Reason, Timings, Token

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
    return _timings(end.prompt_tokens, end.cached_tokens, end.completion_tokens, end.timings)


class TimingsSoFar:
    """The same of an answer that goes on, for who wants it with every chunk."""

    def __init__(self, n_prompt: int, wanted: bool) -> None:
        self._n_prompt, self._wanted = n_prompt, wanted
        self._cached = self._n = 0

    def push(self, events: Iterable[Event]) -> dict[str, Any]:
        """What these events add to a chunk."""
        last: Timings | None = None
        for event in events:
            if isinstance(event, PromptScored):
                self._cached = event.cached_tokens
            elif isinstance(event, Token):
                self._n += 1
                last = event.timings
        if last is None or not self._wanted:
            return {}
        return {"timings": _timings(self._n_prompt, self._cached, self._n, last)}


def _timings(n_prompt: int, cached: int, n: int, times: Timings) -> dict[str, Any]:
    queued, first, total = times
    prompt_ms, predicted_ms = (first - queued) * 1e3, (total - first) * 1e3
    prompt_n = n_prompt - cached
    predicted_n = max(0, n - 1)  # the first token comes with the prompt
    return {
        "cache_n": cached,
        "prompt_n": prompt_n,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": _ratio(prompt_ms, prompt_n),
        "prompt_per_second": _ratio(prompt_n * 1e3, prompt_ms),
        "predicted_n": n,
        "predicted_ms": predicted_ms,
        "predicted_per_token_ms": _ratio(predicted_ms, predicted_n),
        "predicted_per_second": _ratio(predicted_n * 1e3, predicted_ms),
        "queued_ms": queued * 1e3,
    }


def _ratio(value: float, by: float) -> float:
    return value / by if by > 0 else 0.0
