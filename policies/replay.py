"""The simulator: a recorded run again, under any policy and arena size, without weights.

Drives the classes the engine drives. Counts hits, guesses and bytes; knows no time, so a better hit
rate here is not yet a faster engine.

What is read ahead depends on time, so that comes from the recording. A policy that asks the model's
routers gets the guesses the recorded run was offered; one that predicts by itself does so again.
After an event no more of them are read than the recorded run read there, those that it read first.
The recorded policy at the recorded size so gives the engine's own counts exactly. At other sizes,
and under other policies, the number stands for the disk time there was; where the recorded run
found nothing left to read it is 0, so a smaller arena is given too few guesses rather than too
many. A recording without guesses (of ``lru``, say) replays guessing policies by their caches alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import compress
from typing import NamedTuple

import numpy as np

from .base import Guess, Ids, Inputs, RouteEvent
from .cache import Belady
from .order import FirstSeen
from .presets import Facts, Policy, policy
from .residency import Residency
from .trace import Offers, Trace, TraceEvent

BELADY = "belady"  # a row like the others, but no policy to run: it needs the future
_NO_INPUTS = np.zeros((1, 0), np.float32)  # a trace holds none


class ReplayResult(NamedTuple):
    """One row of a replay; the counts are those the engine would have reported.

    ``bytes_read`` counts every load, also the loads of continuations. A guess counts whole, though
    the engine may have given it up halfway.
    """

    policy: str
    n_slots: int
    hits: int
    misses: int
    guesses: int
    guesses_used: int
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


class RecordedOffers:
    """A predictor that offers what the recorded run was offered, event by event."""

    def __init__(self, offers: Iterable[Offers]) -> None:
        self.recall: dict[int, float] = {}
        self._left = iter(offers)
        self._now = Offers()

    def observe(self, event: RouteEvent, ids: Callable[[], Ids]) -> None:
        self._now = next(self._left)

    def guess(self, event: RouteEvent, x: Callable[[], Inputs]) -> Sequence[Guess]:
        return list(map(Guess, self._now.keys, self._now.chances))


def replay(trace: Trace, policy: str, n_slots: int) -> ReplayResult:
    """Replay a trace under a named policy or ``"belady"``, from an empty arena.

    Bélády's row bounds from above the hits of every other one that guesses nothing. For that it
    skips continuations, and an expert that is needed later than everything resident passes through
    without a slot: a scan needs one for that, and an event need not fit into the arena.
    """
    return replay_table(trace, [policy], [n_slots])[0]


def replay_table(trace: Trace, policies: Iterable[str], sizes: Sequence[int]) -> list[ReplayResult]:
    """A row per policy and size, sizes innermost. ValueError on an unknown policy or no slots."""
    events = [(event.route(), event) for event in trace.events]
    return [_replay(trace, events, name, n_slots) for name in policies for n_slots in sizes]


Events = Sequence[tuple[RouteEvent, TraceEvent]]


def _replay(trace: Trace, events: Events, name: str, n_slots: int) -> ReplayResult:
    if n_slots < 1:
        raise ValueError(f"An arena of {n_slots} slots holds no expert: ask for at least 1.")
    n_experts = trace.metadata["n_experts"]
    arena: Arena
    if name == BELADY:
        events = [(event, recorded) for event, recorded in events if not recorded.continuation]
        future = [event.layer * n_experts + x for event, _ in events for x in event.experts]
        arena = IdealArena(Belady(future), n_slots, n_experts)
    else:
        arena = Arena(policy(name, _facts(trace, n_slots)), n_slots, n_experts)
    blob_bytes = dict(zip(trace.metadata["layers"], trace.metadata["blob_bytes"], strict=True))
    layer_hits = dict.fromkeys(sorted({event.layer for event, _ in events}), 0)
    layer_misses = layer_hits.copy()
    guesses = bytes_read = 0
    for event, recorded in events:
        n_hits = arena.serve(event, recorded)
        n_misses = len(event.experts) - n_hits
        bytes_read += n_misses * blob_bytes[event.layer]
        if recorded.continuation:
            continue
        layer_hits[event.layer] += n_hits
        layer_misses[event.layer] += n_misses
        for key, _ in arena.guess(event, recorded):
            bytes_read += blob_bytes[key // n_experts]
            guesses += 1
    used = arena.residency.guesses_used
    hits, misses = sum(layer_hits.values()), sum(layer_misses.values())
    return ReplayResult(
        name, n_slots, hits, misses, guesses, used, bytes_read, layer_hits, layer_misses
    )


def _facts(trace: Trace, n_slots: int) -> Facts:
    meta = trace.metadata
    offers = [event.offers for event in trace.events if not event.continuation]
    return Facts(
        n_slots,
        meta["n_experts"],
        max((event.ids.shape[1] for event in trace.events), default=1),
        meta["layers"],
        n_sequences=meta.get("n_sequences", 1),
        gates=lambda how: RecordedOffers(offers) if trace.has_offers else None,
    )


class Arena:
    """A policy at work on slots that hold nothing."""

    def __init__(self, policy: Policy, n_slots: int, n_experts: int) -> None:
        self.residency = Residency(n_slots, n_experts, policy.cache, policy.order, policy.scan)
        self.predictor = policy.predictor

    def serve(self, event: RouteEvent, recorded: TraceEvent) -> int:
        """Plan an event; how many hits it had."""
        residency = self.residency
        if recorded.cancelled:
            guesses = residency.guessed | residency.stale.keys()
            residency.drop([key for key in recorded.cancelled if key in guesses])
        return residency.plan(event).n_hits

    def guess(self, event: RouteEvent, recorded: TraceEvent) -> Sequence[tuple[int, int]]:
        """(key, slot) of what is read ahead after an event."""
        if self.predictor is None:
            return ()
        self.predictor.observe(event, lambda: recorded.ids)  # a cache may go by what it learns
        most = sum(recorded.offers.chosen)
        if not most:
            return ()
        guesses = self.predictor.guess(event, lambda: _NO_INPUTS)
        read = set(compress(recorded.offers.keys, recorded.offers.chosen))
        missing = [guess for guess in guesses if guess.key not in self.residency.slot_of]
        missing.sort(key=lambda guess: guess.key not in read)  # stable
        return self.residency.guess(event, missing[:most], (guess.key for guess in guesses))


class IdealArena(Arena):
    """Bélády's, with a slot beside the arena that everything may pass through."""

    def __init__(self, belady: Belady, n_slots: int, n_experts: int) -> None:
        super().__init__(Policy(belady, FirstSeen()), n_slots, n_experts)
        self.belady = belady

    def serve(self, event: RouteEvent, recorded: TraceEvent) -> int:
        """Keep the experts needed soonest, of this event or before it."""
        residency, belady = self.residency, self.belady
        base = event.layer * residency.n_experts
        hits = [x for x in event.experts if base + x in belady]
        residency.plan(event._replace(experts=hits, counts=[1] * len(hits)))
        for expert in event.experts:
            if expert not in hits and (residency.free or not belady.bypass(base + expert)):
                residency.plan(event._replace(experts=[expert], counts=[1]))
        return len(hits)
