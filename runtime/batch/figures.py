"""What a batch did: lines, tokens, times, and what its engine has to say of itself."""

from __future__ import annotations

import time
from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..engine.generation import Result
from ..sizes import format_size


class Figures:
    """Counts of one run; times of each request, in the order in which they ended."""

    def __init__(self, n_asked: int, n_before: int) -> None:
        self.n_asked = n_asked  # lines of the input
        self.n_before = n_before  # answered by earlier runs
        self.n_answered = 0
        self.n_refused = 0  # answered by an error that is the line's own
        self.n_failed = 0  # by one that is ours
        self.start()
        self._first = array("f")
        self._between = array("f")
        self._prompt_tokens = self._tokens = 0

    def start(self) -> None:
        """The time of the job runs from here."""
        self._start = time.perf_counter()

    def add(self, result: Result) -> None:
        end = result.finished
        queued_s, first_s, total_s = end.timings
        self._prompt_tokens += end.prompt_tokens
        self._tokens += end.completion_tokens
        self._first.append(first_s - queued_s)
        if end.completion_tokens > 1:
            self._between.append((total_s - first_s) / (end.completion_tokens - 1))

    @property
    def n_done(self) -> int:
        return self.n_before + self.n_answered + self.n_refused + self.n_failed

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def table(self, stats: Mapping[str, Any] | None) -> dict[str, Any]:
        """All of it as one document; ``stats`` is the engine's table, None if none was needed.

        The time to the first token runs from a request's first step, since in a batch all but a few
        wait; that between tokens is a request's mean.
        """
        seconds = self.seconds
        computing = sum(phase["seconds"] for phase in stats["phases"].values()) if stats else 0.0
        return {
            "lines": self.n_asked,
            "done": self.n_done,
            "done_before": self.n_before,
            "answered": self.n_answered,
            "refused": self.n_refused,
            "failed": self.n_failed,
            "seconds": seconds,
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._tokens,
            "prompt_tps": self._prompt_tokens / seconds,
            "completion_tps": self._tokens / seconds,
            "first_token_s": _percentiles(self._first),
            "between_tokens_s": _percentiles(self._between),
            "stall_share": stats["stall_s"] / computing if stats and computing else 0.0,
            "stats": stats,
        }


def _percentiles(times: array[float]) -> dict[str, float] | None:
    if not times:
        return None
    p50, p95 = np.percentile(np.frombuffer(times, np.float32), (50, 95))
    return {"p50": float(p50), "p95": float(p95)}


def summary(table: Mapping[str, Any]) -> str:
    """The document in a few lines for people."""
    t, stats = table, table["stats"]
    wrong = [f"{t[name]} {name}" for name in ("refused", "failed") if t[name]]
    before = f" ({t['done_before']} before)" if t["done_before"] else ""
    times = [
        f"{name} p50 {found['p50']:.3f} s, p95 {found['p95']:.3f} s"
        for name, found in (
            ("first token", t["first_token_s"]),
            ("between tokens", t["between_tokens_s"]),
        )
        if found
    ]
    first = ", ".join([f"{t['done']} of {t['lines']} lines{before}", *wrong])
    if stats is None:
        return f"{first}: there is nothing to do"
    return "\n".join(
        [
            f"{first} in {_duration(t['seconds'])}",
            f"{t['prompt_tokens']} prompt and {t['completion_tokens']} answer tokens; over the "
            f"job {t['prompt_tps']:.1f} and {t['completion_tps']:.1f} tok/s, in prompts "
            f"{stats['prefill_tps']:.1f}, decoding {stats['decode_tps']:.1f}",
            *(["; ".join(times)] if times else []),
            f"read {format_size(stats['bytes_read'])} ({format_size(stats['bytes_per_token'])} per "
            f"decoded token), stalled {t['stall_share']:.1%}; peak "
            f"{format_size(stats['rss_peak_bytes'])} of {format_size(stats['budget_bytes'])}",
        ]
    )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes:.0f} min {seconds:.0f} s" if minutes else f"{seconds:.1f} s"
