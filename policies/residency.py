"""Which expert sits in which slot: turns one route event into one plan.

The engine's controller and the offline simulator both drive this class, so a replayed trace
cannot differ from the run it came from. It knows slots and keys; it does not know bytes, files,
threads or time.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import NamedTuple

from .base import CachePolicy, Guess, LoadOrder, RouteEvent


class Plan(NamedTuple):
    """Work for one layer in execution order; the three lists are parallel.

    Resident experts come first. ``loads[i]`` is not 0 when expert i must be read into ``slots[i]``
    first: 1 whole, 2 its low copy. A slot that appears twice is recycled inside the layer: its
    second expert is read after its first was computed.
    """

    experts: list[int]
    slots: list[int]
    loads: list[int]
    n_hits: int
    n_low_pairs: int = 0  # (token, rank) pairs computed from a low copy
    n_low_loads: int = 0


class Residency:
    """The slot table of one model: ``n_slots`` slots shared by all layers.

    Between two events ``slot_of`` maps exactly the resident keys to distinct slots, and every
    other slot is free. A guess is on probation: it has a slot, but the cache policy learns of it
    when it is demanded. One that was wrong is ``stale``, the next to lose its slot.
    """

    is_plain = True  # every resident key is an expert as it is

    def __init__(
        self, n_slots: int, n_experts: int, cache: CachePolicy, order: LoadOrder | None = None
    ) -> None:
        assert n_slots >= 1
        assert n_experts >= 1
        self.n_slots = n_slots
        self.n_experts = n_experts
        self.cache = cache
        self.order = order
        self.slot_of: dict[int, int] = {}
        self.free = list(range(n_slots - 1, -1, -1))
        self.guessed: set[int] = set()  # not demanded yet
        self.stale: dict[int, None] = {}  # in the order they turned out wrong
        self.guesses_used = 0
        self._n_passed = 0  # free slots, the last ones, that the last plan still computes on
        self._in_turns = False  # the last plan recycles slots

    def plan(self, event: RouteEvent) -> Plan:
        """Decide hits, loads and victims of one event and update the table.

        An event that needs more experts than there are slots is served in turns: once every
        resident key is pinned by the event itself, slots are reused in execution order.
        """
        base = event.layer * self.n_experts
        slot_of, cache, guessed, stale = self.slot_of, self.cache, self.guessed, self.stale
        probation = bool(guessed or stale)
        experts: list[int] = []
        slots: list[int] = []
        missing: list[int] = []
        passing: list[int] = []
        for i, expert in enumerate(event.experts):
            key = base + expert
            slot = slot_of.get(key)
            if slot is None:
                missing.append(i)
                continue
            experts.append(expert)
            slots.append(slot)
            if probation and (key in guessed or key in stale):
                self.guesses_used += key in guessed
                guessed.discard(key)
                stale.pop(key, None)
                if not cache.admit(key):
                    passing.append(key)
            else:
                cache.touch(key)
        n_hits = len(experts)
        if guessed:  # of this layer or an earlier one, and not asked for
            for key in [key for key in guessed if key // self.n_experts <= event.layer]:
                guessed.remove(key)
                stale[key] = None
        self._in_turns = False
        if missing:
            self._place(event, base, missing, experts, slots, passing)
        loads = [0] * n_hits + [1] * len(missing)
        passed = [slot_of.pop(key) for key in passing if key in slot_of]
        self.free += passed  # only now: until here these slots belong to this very plan
        self._n_passed = len(passed)
        return Plan(experts, slots, loads, n_hits)

    def _place(
        self,
        event: RouteEvent,
        base: int,
        missing: list[int],
        experts: list[int],
        slots: list[int],
        passing: list[int],
    ) -> None:
        """Give every missing expert a slot, appending to ``experts`` and ``slots``.

        Keys the policy does not want to keep go to ``passing``.
        """
        slot_of, cache = self.slot_of, self.cache
        if self.order is not None and len(missing) > 1:
            rank = self.order.order(
                [event.experts[i] for i in missing], [event.counts[i] for i in missing]
            )
            missing = [missing[r] for r in rank]
        pinned = {base + expert for expert in event.experts}
        recycled = 0
        for i in missing:
            expert = event.experts[i]
            key = base + expert
            slot = self._take(pinned, key)
            if slot is None:
                slot = self._take_guess(pinned)
            if slot is None:
                old = base + experts[recycled]
                slot = slot_of.pop(old)
                if old in cache:
                    cache.remove(old)
                recycled += 1
                self._in_turns = True
            slot_of[key] = slot
            if not cache.admit(key):
                passing.append(key)
            experts.append(expert)
            slots.append(slot)

    def _take(self, pinned: Container[int], incoming: int, demanded: bool = True) -> int | None:
        """A slot: a free one, a wrong guess's, or the policy's victim's."""
        if self.free:
            return self.free.pop()
        for key in self.stale:
            if key not in pinned:
                del self.stale[key]
                return self.slot_of.pop(key)
        victim = self.cache.evict(pinned, incoming, demanded)
        return None if victim is None else self.slot_of.pop(victim)

    def _take_guess(self, pinned: Container[int]) -> int | None:
        """The slot of a guess that may still come true: a demand needs it now."""
        for key in self.guessed:
            if key not in pinned:
                self.guessed.remove(key)
                return self.slot_of.pop(key)
        return None

    def guess(
        self, event: RouteEvent, guesses: Sequence[Guess], keep: Iterable[int] = ()
    ) -> list[tuple[int, int]]:
        """(key, slot) for those guesses, made after ``event`` was planned, that get a slot.

        None takes the slot of an expert that the event needs, that is a guess itself or in
        ``keep``.
        """
        if self._in_turns:
            return []
        base = event.layer * self.n_experts
        pinned = {base + expert for expert in event.experts}
        pinned.update(keep)
        placed: list[tuple[int, int]] = []
        n_free = len(self.free) - self._n_passed
        busy = self.free[n_free:]
        del self.free[n_free:]
        for key, _ in guesses:
            if key in self.slot_of:
                continue
            slot = self._take(pinned, key, demanded=False)
            if slot is None:
                break
            self.slot_of[key] = slot
            self.guessed.add(key)
            placed.append((key, slot))
        self.free += busy
        return placed

    def fill(self, keys: Iterable[int]) -> list[tuple[int, int]]:
        """(key, slot) for those keys that get a free slot before anything was demanded.

        To the policy each is a demand, in this order: what is worth most belongs last.
        """
        placed: list[tuple[int, int]] = []
        for key in keys:
            if not self.free:
                break
            if key not in self.slot_of and self.cache.admit(key):
                slot = self.slot_of[key] = self.free.pop()
                placed.append((key, slot))
        return placed

    def drop(self, keys: Iterable[int]) -> None:
        """Forget keys whose slots turned out not to hold them (a failed read, a cancelled step)."""
        for key in keys:
            self.free.insert(0, self.slot_of.pop(key))
            self.guessed.discard(key)
            self.stale.pop(key, None)
            if key in self.cache:
                self.cache.remove(key)

    def reconcile(self, held: Sequence[int]) -> None:
        """Make the table true after a failure, also one inside ``plan`` that left it half changed.

        ``held[slot]`` is the key a slot holds, -1 for none.
        """
        probation = self.guessed | self.stale.keys()
        slot_of = {
            key: s
            for key, s in self.slot_of.items()
            if held[s] == key and (key in self.cache or key in probation)
        }
        for key in [key for key in self.cache if key not in slot_of]:
            self.cache.remove(key)
        self.slot_of = slot_of
        self.guessed &= slot_of.keys()
        self.stale = {key: None for key in self.stale if key in slot_of}
        used = set(slot_of.values())
        self._n_passed = 0
        self.free = [slot for slot in range(self.n_slots - 1, -1, -1) if slot not in used]

    def resident(self, layer: int) -> Sequence[int]:
        """The experts of one layer that have a slot."""
        base = layer * self.n_experts
        return [key - base for key in self.slot_of if base <= key < base + self.n_experts]

    def check_integrity(self) -> None:
        """Assert that slots are neither shared, lost nor held by keys the policy forgot."""
        used = list(self.slot_of.values())
        assert len(set(used)) == len(used), "two experts share a slot"
        assert sorted(used + self.free) == list(range(self.n_slots)), "a slot is lost"
        parts = [set(self.cache), self.guessed, set(self.stale)]
        assert set(self.slot_of) == set().union(*parts), "the policy and the table disagree"
        assert len(self.slot_of) == sum(map(len, parts)), "a key is on probation and kept"
        self.cache.check_integrity()
