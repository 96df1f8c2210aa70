"""Which experts may be computed from their low copy, and the slot table that tells copies apart.

Lossy, and off unless asked for: the lossless engine runs ``Residency`` and none of this.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from .base import CachePolicy, Guess, LoadOrder, Phase, RouteEvent
from .order import Popularity
from .residency import Plan, Residency
from .scan import Scan


class Precision(NamedTuple):
    """What may be low: of a prompt's experts the unpopular tail, of decoding all or none.

    ``low_share`` is the tail's share of the votes, a vote being one (token, rank) pair.
    ``low_on_miss`` is for decode events, of however many sequences.

    In a mixed event an expert works for prompts and for generated tokens, and an event does not say
    for whom. So there it may be low only where both rules allow it: the tail, with
    ``low_on_miss``. Neither option then reaches tokens that it was not asked for.
    """

    low_share: float = 0.0
    low_on_miss: bool = False

    @property
    def lossy(self) -> bool:
        return self != Precision()

    def may_be_low(self, event: RouteEvent) -> Collection[int]:
        """Experts of the event for which the low copy will do."""
        if event.phase == Phase.DECODE:
            return event.experts if self.low_on_miss else ()
        if event.phase == Phase.MIXED and not self.low_on_miss:
            return ()
        # The tail is small change among many tokens. Where a prompt's last layer is computed for
        # its last token alone, the first generated one hangs on every expert.
        return tail(event, self.low_share) if event.n_tokens > 1 else ()


def tail(event: RouteEvent, share: float) -> set[int]:
    """The least popular experts, as many as have at most ``share`` of the event's votes together.

    Of equally popular ones those seen last: the tail is the end of the order misses are read in.
    """
    most = share * sum(event.counts)
    low: set[int] = set()
    votes = 0
    for i in reversed(Popularity().order(event.experts, event.counts)):
        votes += event.counts[i]
        if votes > most:
            break
        low.add(event.experts[i])
    return low


class MixedResidency(Residency):
    """A slot table in which an expert is held whole or low; keys are the same for both.

    An expert that may be low is used as it is held, and read low if it is not. One that may not be
    and is held low is a miss: it is read again, whole, into the slot it has. So a low copy stays
    until its expert is evicted or must be whole; nothing is read only to better it. Guesses are
    read whole, and none is made for an expert that is held low.

    In ``reconcile`` the low copies' keys follow all others, from ``first_low_key``.
    """

    is_plain = False

    def __init__(
        self,
        n_slots: int,
        n_experts: int,
        cache: CachePolicy,
        order: LoadOrder | None,
        precision: Precision,
        first_low_key: int,
        scan: Scan | None = None,
    ) -> None:
        super().__init__(n_slots, n_experts, cache, order, scan)
        self.precision = precision
        self.first_low_key = first_low_key
        self.low: set[int] = set()  # slots last filled from a low copy, the free ones among them

    def plan(self, event: RouteEvent) -> Plan:
        may_be_low = self.precision.may_be_low(event)
        plan, low = super().plan(event), self.low
        counts = dict(zip(event.experts, event.counts, strict=True))
        held: list[tuple[int, int, int]] = []
        read: list[tuple[int, int, int]] = []
        n_low_pairs = n_low_loads = 0
        for expert, slot, load in zip(plan.experts, plan.slots, plan.loads, strict=True):
            copy = int(expert in may_be_low)
            if not load and (copy or slot not in low):
                held.append((expert, slot, 0))
            else:
                read.append((expert, slot, 1 + copy))
                n_low_loads += copy
                (low.add if copy else low.discard)(slot)
            if slot in low:
                n_low_pairs += counts[expert]
        experts, slots, loads = map(list, zip(*held, *read, strict=True))
        return Plan(experts, slots, loads, len(held), n_low_pairs, n_low_loads)

    def guess(
        self, event: RouteEvent, guesses: Sequence[Guess], keep: Iterable[int] = ()
    ) -> list[tuple[int, int]]:
        placed = super().guess(event, guesses, keep)
        self.low.difference_update(slot for _, slot in placed)
        return placed

    def reconcile(self, held: Sequence[int]) -> None:
        first = self.first_low_key
        self.low = {slot for slot, key in enumerate(held) if key >= first}
        super().reconcile([key - first if key >= first else key for key in held])
