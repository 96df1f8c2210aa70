"""Two tables for one model: which experts are on a device, and which in memory for it to copy.

The device holds a pool of slots per layer, and each pool is a ``Residency`` of its own; what a pool
lacks is demanded of the table in memory, which is another, over all layers. So both tiers decide by
the same classes, each hearing only the demands that reach it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from itertools import pairwise
from operator import neg

from .base import CachePolicy, Guess, LoadOrder, Phase, RouteEvent
from .coexecution import NOBODY, Dividing
from .copying import Copying
from .foresight import LEAST, Foresight
from .residency import Plan, Residency
from .scan import Scan

# For an expert's slot in a pool: the processor computes it (native/moe.h).
ON_CPU = -2


class Tiers(Residency):
    """The table in memory, below the pools of a device.

    ``n_pool`` is the slots of each layer that the device computes; a layer with all its experts
    there, each in the slot of its own number, is never asked for. An event that wants more experts
    than its pool has slots leaves the pool as it is, but for free slots: a prompt does not evict
    what is generated with. (A device without room for such an event divides it before it asks.)

    ``dividing`` says which missing experts the processor computes; None: none. ``copying`` says
    which guesses are copied to the device before they are asked for; None: none. ``foresight``
    says what the next layer will want after an event wider than its pool; None: nobody does.
    """

    is_plain = False
    dividing: Dividing | None = None
    copying: Copying | None = None
    foresight: Foresight | None = None

    def __init__(
        self,
        n_slots: int,
        n_experts: int,
        cache: CachePolicy,
        order: LoadOrder | None,
        n_pool: Mapping[int, int],
        pool_cache: Callable[[int, int], CachePolicy],
        scan: Scan | None = None,
    ) -> None:
        super().__init__(n_slots, n_experts, cache, order, scan)
        self.keeps = True  # the policy has kept every expert that the device got so far
        self.whole = frozenset(layer for layer, n in n_pool.items() if n >= n_experts)
        self._n_below = (len(n_pool) - len(self.whole)) * n_experts  # keys that pools may lack
        self.pools = {
            layer: Residency(n, n_experts, pool_cache(layer, n), order)
            for layer, n in n_pool.items()
            if layer not in self.whole
        }
        layers = sorted(self.pools)
        self._next = dict(pairwise(layers))
        # Where memory has room for every key that pools may lack: the slot of a layer's first.
        self._home = {layer: i * n_experts for i, layer in enumerate(layers)}
        if n_slots < self._n_below:
            self._home = {}
        self._coming: frozenset[int] = frozenset()  # foreseen, and copied ahead
        self._n_likely = 0  # keys that were foreseen, whether there was room to copy them or not

    def plan(self, event: RouteEvent) -> Plan:
        pool = self.pools.get(event.layer)
        if pool is None:  # computed on the processor
            return super().plan(event)
        if len(event.experts) > pool.n_slots:
            return self._plan_wide(event, pool)
        base = event.layer * self.n_experts
        computed, passing = self._divide(event, pool, base)
        above = pool.plan(_without(event, passing) if passing else event)
        self.keeps = self.keeps and all(
            base + expert in pool.slot_of for expert in above.experts[above.n_hits :]
        )
        n = above.n_hits
        missing = above.experts[n:] + list(passing)
        if not missing:
            return above._replace(slots=[-1] * n, pools=above.slots)
        pools = [*above.slots, *[ON_CPU] * len(passing)]
        if computed:
            for i in range(n, len(above.experts)):
                if missing[i - n] in computed:
                    pools[i] = ON_CPU - 1 - pools[i]
        slots = self._slots_for_good(base, missing)
        if slots:
            experts = above.experts[:n] + missing
            return Plan(experts, [-1] * n + slots, [0] * len(experts), n, pools=pools)
        counts = dict(zip(event.experts, event.counts, strict=True))
        below = super().plan(
            event._replace(experts=missing, counts=[counts[expert] for expert in missing])
        )
        place = dict(zip(missing, pools[n:], strict=True))
        return below._replace(
            experts=above.experts[:n] + below.experts,
            slots=[-1] * n + below.slots,
            loads=[0] * n + below.loads,
            n_hits=n,
            pools=pools[:n] + [place[expert] for expert in below.experts],
        )

    def _take(self, pinned: Container[int], incoming: int, demanded: bool = True) -> int | None:
        """Where memory has room for all, neighbours lie side by side: they are copied together."""
        layer, expert = divmod(incoming, self.n_experts)
        if layer in self._home:
            slot = self._home[layer] + expert
            i = bisect_left(self.free, -slot, key=neg)  # descending, but for what was forgotten
            if i < len(self.free) and self.free[i] == slot:
                del self.free[i]
                return slot
        return super()._take(pinned, incoming, demanded)

    def _divide(
        self, event: RouteEvent, pool: Residency, base: int
    ) -> tuple[Collection[int], Collection[int]]:
        """Of its experts those the processor computes, and of them those that get no slot."""
        if self.dividing is None or not event.may_compute:
            return (), ()
        missing = [i for i, e in enumerate(event.experts) if base + e not in pool.slot_of]
        division = NOBODY
        if missing:
            division = self.dividing.divide(event.layer, [event.counts[i] for i in missing])
        computed = {event.experts[missing[i]] for i in division.computed}
        return computed, [event.experts[missing[i]] for i in sorted(division.passing)]

    def _slots_for_good(self, base: int, experts: Sequence[int]) -> list[int]:
        """Where memory has them, if it has every expert that pools may lack and so never loses one:
        then there is nothing to decide. Empty otherwise."""
        slot_of = self.slot_of
        if len(slot_of) != self._n_below or self.guessed or self.stale:
            return []
        slots = [slot_of.get(base + expert, -1) for expert in experts]
        return [] if -1 in slots else slots

    def _plan_wide(self, event: RouteEvent, pool: Residency) -> Plan:
        """Of more experts than slots: those that find none have -1 for one, but in memory."""
        base = event.layer * self.n_experts
        pool.settle(event)
        computed, passing = self._divide(event, pool, base)
        place = {e: slot for e in event.experts if (slot := pool.slot_of.get(base + e)) is not None}
        held = list(place)
        missing = [i for i, expert in enumerate(event.experts) if expert not in place]
        experts = [event.experts[i] for i in missing]
        counts = [event.counts[i] for i in missing]
        ranked = sorted(range(len(missing)), key=counts.__getitem__, reverse=True)
        wanted = (base + experts[r] for r in ranked if experts[r] not in passing)
        for key, slot in pool.fill(wanted):
            place[key - base] = slot
        below = super().plan(event._replace(experts=experts, counts=counts))
        return below._replace(
            experts=held + below.experts,
            slots=[-1] * len(held) + below.slots,
            loads=[0] * len(held) + below.loads,
            n_hits=len(held),
            pools=[
                ON_CPU - 1 - place.get(expert, -1) if expert in computed else place.get(expert, -1)
                for expert in held + below.experts
            ],
        )

    def foreseen(self, event: RouteEvent, plan: Plan, now_ns: int) -> Sequence[int]:
        """After the plan of an event, at a time: keys of the next layer that is asked for,
        likeliest first, that go to its window while this one is computed."""
        pool, coming, self._coming = self.pools.get(event.layer), self._coming, frozenset()
        self._n_likely = 0
        if self.foresight is None or pool is None or len(event.experts) <= pool.n_slots:
            return ()
        base = event.layer * self.n_experts
        planned = zip(plan.experts, plan.slots, strict=True)
        lacking = {base + expert for expert, slot in planned if slot >= 0}
        self.foresight.observe(event, now_ns, len(lacking - coming), len(coming - lacking))
        layer = self._next.get(event.layer)
        if layer is None or event.may_compute:  # what the processor computes needs no copy
            return ()
        likely = self.foresight.likely(layer, sum(event.counts))
        self._n_likely = len(likely)
        return self._with_room(layer, [layer * self.n_experts + expert for expert in likely])

    def _with_room(self, layer: int, keys: Iterable[int]) -> Sequence[int]:
        """Of these, likeliest first, those that the link has room for, or the pool has."""
        assert self.foresight is not None
        held = self.pools[layer].slot_of
        chosen: list[int] = []
        coming: list[int] = []
        room = self.foresight.room()
        for key in keys:
            if key in held:
                chosen.append(key)
            elif key in self.slot_of and len(coming) < room:
                chosen.append(key)
                coming.append(key)
        self.foresight.copied(len(coming))
        self._coming = frozenset(coming)
        return chosen

    def foresees(self, event: RouteEvent) -> bool:
        """Whether guesses after this event are to say what goes to the next window: where its pool
        has half of what it wants at most, but of the next one hardly anything is sure."""
        pool = self.pools.get(event.layer)
        if self.foresight is None or pool is None or event.phase != Phase.DECODE:
            return False
        n_lacking = len(event.experts) - pool.n_slots
        return n_lacking >= max(pool.n_slots, 2 * self._n_likely + 1) and not event.may_compute

    def foresee(self, event: RouteEvent, guesses: Sequence[Guess]) -> Sequence[int]:
        """``foreseen``, by guesses: of what the layer's event, if that will be wider than its pool,
        is likely to want."""
        layer = self._next.get(event.layer)
        near = [g for g in guesses if g.key // self.n_experts == layer]
        if layer is None or sum(g.confidence for g in near) <= self.pools[layer].n_slots:
            return ()
        likely = [g for g in near if g.confidence >= LEAST]
        likely.sort(key=lambda g: g.confidence, reverse=True)
        return self._with_room(layer, [g.key for g in likely])

    def is_complete(self, layers: Sequence[int]) -> bool:
        """Whether memory holds every expert that a device may ask it for."""
        return len(self.slot_of) == (len(layers) - len(self.whole)) * self.n_experts

    def fill(self, keys: Iterable[int]) -> list[tuple[int, int]]:
        """Of layers that are not wholly on the device."""
        return super().fill(key for key in keys if key // self.n_experts not in self.whole)

    def holds(self, key: int) -> bool:
        layer = key // self.n_experts
        if key in self.slot_of or layer in self.whole:
            return True
        pool = self.pools.get(layer)
        return pool is not None and pool.holds(key)

    def guess(
        self, event: RouteEvent, guesses: Sequence[Guess], keep: Iterable[int] = ()
    ) -> list[tuple[int, int]]:
        """Of guesses that are in neither table: they are read into memory."""
        return super().guess(event, [g for g in guesses if not self.holds(g.key)], keep)

    def copies_ahead(self, event: RouteEvent, now_ns: int, since_ns: int, n_missing: int) -> bool:
        """Whether guesses are to be copied to pools after this event, of whose experts the device
        lacked so many: not where events are wider than these, which leave them as they are."""
        pool = self.pools.get(event.layer)
        if self.copying is None or pool is None:
            return False
        pays = self.copying.event(event, now_ns, since_ns, n_missing)
        return pays and len(event.experts) <= pool.n_slots

    def guess_above(
        self, event: RouteEvent, guesses: Sequence[Guess], most: int
    ) -> list[tuple[int, int, int]]:
        """(key, slot, slot of the pool) for guesses that are in memory and go to the device, for
        the first layer ahead that they are of. None takes the slot of a better guess."""
        assert self.copying is not None
        layer = next((g.key // self.n_experts for g in guesses), event.layer)
        pool = self.pools.get(layer)
        if pool is None or layer == event.layer:
            return []
        below, above = self.slot_of, pool.slot_of
        near = [g for g in guesses if g.key // self.n_experts == layer]
        lacking = [g for g in near if g.key in below and g.key not in above]
        # What is still being read cannot be copied yet.
        ready = [g for g in lacking if g.key not in self.guessed and g.key not in self.stale]
        n = 0
        for guess, chance in zip(ready, self.copying.chances(event.layer, most), strict=False):
            if guess.confidence <= chance:
                break
            n += 1
        if not n:
            return []
        better = near[: near.index(ready[n - 1])]
        placed = pool.guess(event, ready[:n], (g.key for g in better))
        return [(key, below[key], slot) for key, slot in placed]

    # -- what may be done unasked

    def orders(self, layer: int, most: int) -> tuple[Sequence[int], Sequence[float]]:
        """For the layer's next event: the slots of its pool that missing experts would get, in this
        order, none where that cannot be said before; and ``Copying.chances``."""
        pool = self.pools.get(layer)
        if pool is None or self.dividing is not None:
            return (), ()
        chances = () if self.copying is None else self.copying.chances(layer, most)
        return pool.spares(most), chances

    def copied(
        self, event: RouteEvent, guesses: Sequence[Guess], copies: Sequence[tuple[int, int]]
    ) -> None:
        """Guesses after that event went to the device, (key, slot of the pool) of those that it
        lacked: ``guess_above``, done by others. ``guesses`` ends with the last that was wanted."""
        pool = self.pools[copies[0][0] // self.n_experts]
        went = {key for key, _ in copies}
        chosen = [guess for guess in guesses if guess.key in went]
        placed = pool.guess(event, chosen, (guess.key for guess in guesses[:-1]))
        if placed != list(copies):
            raise RuntimeError(f"guesses went to {copies} on the device, and not to {placed}")

    def reconcile_pool(self, layer: int, held: Sequence[int]) -> None:
        """As ``reconcile``, of what the device holds of a layer; what it still has is kept."""
        pool = self.pools[layer]
        pool.reconcile(held)
        pool.give_up(layer)  # the plugin knows of no guesses any more
        pool.adopt(held)

    def resident(self, layer: int) -> Sequence[int]:
        """The experts of one layer that are on the device, if it computes the layer."""
        if layer in self.whole:
            return range(self.n_experts)
        pool = self.pools.get(layer)
        return super().resident(layer) if pool is None else pool.resident(layer)

    def check_integrity(self) -> None:
        super().check_integrity()
        for layer, pool in self.pools.items():
            pool.check_integrity()
            assert all(key // self.n_experts == layer for key in pool.slot_of)


def _without(event: RouteEvent, experts: Collection[int]) -> RouteEvent:
    kept = [i for i, expert in enumerate(event.experts) if expert not in experts]
    return event._replace(
        experts=[event.experts[i] for i in kept], counts=[event.counts[i] for i in kept]
    )
