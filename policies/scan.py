"""Demand that goes round: when it does not fit, a fixed part stays and the rest streams.

Owns how wide each layer's demand is, and from that how many slots stream and which of a layer's
experts keep theirs. Knows no slots, no bytes and no time, so a recording replays it exactly.

A group of sequences asks for nearly every expert of a layer, layer after layer, step after step: a
cyclic scan of N keys over C slots. Of such a scan nothing can hit more than C of N. Between two
demands of a key come all the others; in that round each of the N keys passes through a slot once
and C - R of them can have stayed, if those that did not stay passed through the other R. What has
just been used is needed farthest in the future, so Bélády evicts that at once: after the first
round his victims are always the newcomers, R = 1 slot sees all the misses of a round, and the
C - 1 others never change. Recency does the opposite: it keeps what was used last, and hits nothing
until everything fits. If demands differ in likelihood, the best fixed part is the likeliest: with
independent demands that maximises the expected hits of every round.

So a layer keeps its likeliest experts, as many as its share of C - R, and the others stream: each
is read into one of R slots, computed, and its slot taken by the next one of its layer, or of the
next layer. R = 1 would leave disk and processor waiting for each other; every slot of R is one hit
less per round, of one layer. While attention and the experts that stay are computed, the disk can
only run ahead as far as R lets it, and a group that computes about as long as it reads needs all of
that lead. So R is half the experts of one layer: with 64 sequences and 64 experts the disk then
waits for nobody (LOG.md), and it is a few in a hundred of the slots. It is a function of the model
and the arena alone, so that replaying a recording needs no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from heapq import nlargest

from .base import RouteEvent
from .cache import LFU
from .layered import Layered, evenly

_DECAY = 0.75  # of the running means of how many experts a layer asks for: about four steps


class Scan:
    """Tells a scan, and which experts of a layer stay. ``cache`` is what says their worth."""

    def __init__(self, cache: Layered, n_slots: int, n_experts: int, layers: Sequence[int]) -> None:
        self.cache = cache
        self.n_slots = n_slots
        self.ring = max(1, min(n_experts // 2, n_slots // 4))  # of a small arena, most must stay
        self.quotas: Mapping[int, int] = evenly(n_slots - self.ring, n_experts, layers)
        self._widths = dict.fromkeys(layers, 0.0)
        self._demand = 0.0  # their sum: what one step asks for

    def observe(self, event: RouteEvent) -> bool:
        """Whether the event is part of a scan: of a group whose steps ask for more than fits.

        One sequence is not told apart by its demand alone: below its working set it could be, but
        its next token is better guessed than its next round.
        """
        if event.n_sequences <= 1:
            return False
        width, n = self._widths[event.layer], len(event.experts)
        now = _DECAY * width + (1 - _DECAY) * n if width else n
        self._widths[event.layer] = now
        self._demand += now - width
        return self._demand > self.n_slots

    def stays(self, layer: int, keys: Iterable[int]) -> set[int]:
        """Which of a layer's keys, resident or just demanded, have a slot after the event."""
        inner = self.cache.caches[layer]
        assert isinstance(inner, LFU)
        return set(nlargest(self.quotas[layer], keys, key=inner.worth))
