"""The simulator: a recorded run again, under any policy and arena size, without weights.

Drives the classes the engine drives. Counts hits and bytes; knows no time, so a better hit rate
here is not yet a faster engine, and guesses, which depend on time, are not made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .base import RouteEvent
from .cache import Belady
from .order import FirstSeen
from .predict import Gates
from .presets import Facts, Policy, policy
from .residency import Residency
from .trace import Ids, Trace, route_event

Routed = tuple[RouteEvent, Ids, bool]  # an event, its ids, whether it continues the one before

BELADY = "belady"  # a row like the others, but no policy to run: it needs the future


class ReplayResult(NamedTuple):
    """One row of a replay; the counts are those the engine would have reported.

    ``bytes_read`` counts every load, also the loads of continuations.
    """

    policy: str
    n_slots: int
    hits: int
    misses: int
    bytes_read: int
    layer_hits: dict[int, int]
    layer_misses: dict[int, int]

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)

    @property
    def layer_hit_rate(self) -> dict[int, float]:
        return {
            layer: hits / max(1, hits + self.layer_misses[layer])
            for layer, hits in self.layer_hits.items()
        }


def replay(trace: Trace, policy: str, n_slots: int) -> ReplayResult:
    """Replay a trace under a named policy or ``"belady"``, from an empty arena.

    Bélády's row bounds every other one from above in hits. For that it skips continuations, and an
    event larger than the arena leaves behind whichever experts are best, where a real arena is
    left with those computed last.
    """
    return replay_table(trace, [policy], [n_slots])[0]


def replay_table(trace: Trace, policies: Iterable[str], sizes: Sequence[int]) -> list[ReplayResult]:
    """A row per policy and size, sizes innermost. ValueError on an unknown policy or no slots."""
    events = [(route_event(e.layer, e.ids), e.ids, e.continuation) for e in trace.events]
    return [_replay(trace, events, name, n_slots) for name in policies for n_slots in sizes]


def _replay(trace: Trace, events: Sequence[Routed], name: str, n_slots: int) -> ReplayResult:
    if n_slots < 1:
        raise ValueError(f"An arena of {n_slots} slots holds no expert: ask for at least 1.")
    n_experts = trace.metadata["n_experts"]
    blob_bytes = dict(zip(trace.metadata["layers"], trace.metadata["blob_bytes"], strict=True))
    belady = None
    if name == BELADY:
        events = [routed for routed in events if not routed[2]]
        belady = Belady([e.layer * n_experts + x for e, *_ in events for x in e.experts])
    if belady is None:
        n_used = max((event.ids.shape[1] for event in trace.events), default=1)
        chosen = policy(name, Facts(n_slots, n_experts, n_used, trace.metadata["layers"]))
    else:
        chosen = Policy(belady, FirstSeen())
    residency = Residency(n_slots, n_experts, chosen.cache, chosen.order)
    predictor = None if isinstance(chosen.predictor, Gates) else chosen.predictor
    layer_hits = dict.fromkeys(sorted({event.layer for event, *_ in events}), 0)
    layer_misses = layer_hits.copy()
    bytes_read = 0
    for event, ids, continuation in events:
        if belady is not None and len(event.experts) > n_slots:
            n_hits = _serve_ideally(residency, belady, event)
        else:
            plan = residency.plan(event)
            n_hits = plan.n_hits
            if predictor is not None and not continuation:
                predictor.observe(event, ids)  # a cache may go by what it learns
        n_misses = len(event.experts) - n_hits
        bytes_read += n_misses * blob_bytes[event.layer]
        if not continuation:
            layer_hits[event.layer] += n_hits
            layer_misses[event.layer] += n_misses
    hits, misses = sum(layer_hits.values()), sum(layer_misses.values())
    return ReplayResult(name, n_slots, hits, misses, bytes_read, layer_hits, layer_misses)


def _serve_ideally(residency: Residency, belady: Belady, event: RouteEvent) -> int:
    """Serve an event larger than the arena, keep the experts needed soonest, return the hits."""
    base = event.layer * residency.n_experts
    hits = [x for x in event.experts if base + x in belady]
    residency.plan(RouteEvent(event.layer, event.n_tokens, hits, [1] * len(hits)))
    for expert in event.experts:
        if expert not in hits and (residency.free or not belady.bypass(base + expert)):
            residency.plan(RouteEvent(event.layer, event.n_tokens, [expert], [1]))
    return len(hits)
