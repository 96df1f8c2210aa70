"""What a server has done, for Prometheus: calls, latencies and tokens, and what its engine counts.

Each server has a registry of its own. An engine's counters are read when somebody asks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ..engine.request import Finished
from ..system import rss_peak

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
# Of an engine's table: name -> (ours, what it is).
_COUNTERS = {
    "prefill_tokens": ("prompt_tokens_computed", "tokens of prompts computed"),
    "decode_tokens": ("tokens_computed", "tokens computed one at a time"),
    "hits": ("expert_hits", "experts that were in memory when they were needed"),
    "misses": ("expert_misses", "experts that had to be read when they were needed"),
    "guesses": ("expert_guesses", "experts read before they were needed"),
    "guesses_used": ("expert_guesses_used", "experts read before that were needed then"),
    "bytes_read": ("read_bytes", "bytes of experts read from disk"),
    "guess_bytes": ("guess_bytes", "bytes of experts read before they were needed"),
    "stall_s": ("stall_seconds", "time in which computing waited for reads"),
    "compute_s": ("expert_compute_seconds", "time in which experts were computed"),
    "disk_s": ("disk_seconds", "time in which the disk was read"),
}
_GAUGES = {
    "budget_bytes": ("budget_bytes", "bytes the process may use"),
    "rss_peak_bytes": ("resident_peak_bytes", "most bytes the process has used"),
    "slots": ("expert_slots", "experts that fit in memory"),
    "prefill_tps": ("prompt_tokens_per_second", "mean speed of prompts"),
    "decode_tps": ("tokens_per_second", "mean speed of answers, of all sequences together"),
}
_REQUESTS = {
    "running": "sequences in memory",
    "waiting": "sequences that wait for room",
    "cells": "tokens that the memory of all sequences holds",
    "cells_used": "tokens in it",
}


class HasStats(Protocol):
    def stats(self) -> dict[str, Any]: ...


class Metrics:
    """One server's."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kept: dict[str, Any] = {"registry": self.registry, "namespace": "moe_gguf"}
        self.calls = Counter("http_requests", "HTTP requests", ["path", "status"], **kept)
        self.in_progress = Gauge("http_requests_in_progress", "HTTP requests now", **kept)
        self.first_token = Histogram(
            "first_token_seconds", "from request to first token", buckets=_SECONDS, **kept
        )
        self.between_tokens = Histogram(
            "between_tokens_seconds", "from one token to the next", buckets=_SECONDS, **kept
        )
        self.queue = Histogram(
            "queue_seconds", "from request to first step", buckets=_SECONDS, **kept
        )
        self.total = Histogram(
            "request_seconds", "from request to its end", buckets=_SECONDS, **kept
        )
        self._prompt = Counter("prompt_tokens", "tokens of answered prompts", **kept)
        self._cached = Counter("cached_tokens", "of those, not computed again", **kept)
        self._generated = Counter("generated_tokens", "tokens of answers", **kept)

    def watch(self, engine: HasStats) -> None:
        self.registry.register(_Engine(engine))

    def finished(self, end: Finished) -> None:
        self.queue.observe(max(0.0, end.timings.queued_s))
        self.total.observe(max(0.0, end.timings.total_s))
        self._prompt.inc(end.prompt_tokens)
        self._cached.inc(end.cached_tokens)
        self._generated.inc(end.completion_tokens)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Engine(Collector):
    """An engine's own counters."""

    def __init__(self, engine: HasStats) -> None:
        self._engine = engine

    def describe(self) -> Iterator[Any]:
        return iter(())  # else it is asked once for nothing when it is registered

    def collect(self) -> Iterator[Any]:
        stats = self._engine.stats()
        yield from _families(stats, _COUNTERS, CounterMetricFamily)
        yield from _families(stats, _GAUGES, GaugeMetricFamily)
        requests = stats.get("requests", {})
        named = {name: (f"sequences_{name}", text) for name, text in _REQUESTS.items()}
        yield from _families(requests, named, GaugeMetricFamily)
        yield GaugeMetricFamily(
            "moe_gguf_process_peak_bytes", "most resident bytes so far", value=rss_peak()
        )


def _families(
    stats: Mapping[str, Any], names: Mapping[str, tuple[str, str]], kind: Any
) -> Iterator[Any]:
    for name, (ours, text) in names.items():
        if isinstance(value := stats.get(name), int | float):
            yield kind(f"moe_gguf_{ours}", text, value=value)
