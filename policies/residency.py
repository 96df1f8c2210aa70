"""Which expert sits in which slot: turns one route event into one plan.

The engine's controller and the offline simulator both drive this class, so a replayed trace
cannot differ from the run it came from. It knows slots and keys; it does not know bytes, files,
threads or time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from moe_gguf.policies.base import CachePolicy, LoadOrder, Predictor, RouteEvent


class Plan(NamedTuple):
    """Work for one layer in execution order; the three lists are parallel.

    Resident experts come first. ``loads[i]`` is 1 when expert i must be read into ``slots[i]``
    first. A slot that appears twice is recycled inside the layer: its second expert is read
    after its first was computed. ``guesses`` are (key, slot) pairs to read in idle time.
    """

    experts: list[int]
    slots: list[int]
    loads: list[int]
    guesses: list[tuple[int, int]]
    n_hits: int


class Residency:
    """The slot table of one model: ``n_slots`` slots shared by all layers.

    Between two events ``slot_of`` maps exactly the resident keys to distinct slots, and every
    other slot is free.
    """

    def __init__(
        self,
        n_slots: int,
        n_experts: int,
        cache: CachePolicy,
        order: LoadOrder | None = None,
        predictor: Predictor | None = None,
    ) -> None:
        assert n_slots >= 1
        assert n_experts >= 1
        self.n_slots = n_slots
        self.n_experts = n_experts
        self.cache = cache
        self.order = order
        self.predictor = predictor
        self.slot_of: dict[int, int] = {}
        self.free = list(range(n_slots - 1, -1, -1))
        self.guessed: set[int] = set()  # resident because of a guess, not demanded yet
        self.guesses_used = 0

    def plan(self, event: RouteEvent) -> Plan:
        """Decide hits, loads, victims and guesses of one event and update the table.

        An event that needs more experts than there are slots is served in turns: once every
        resident key is pinned by the event itself, slots are reused in execution order.
        """
        base = event.layer * self.n_experts
        slot_of, cache = self.slot_of, self.cache
        experts: list[int] = []
        slots: list[int] = []
        missing: list[int] = []
        for i, expert in enumerate(event.experts):
            key = base + expert
            slot = slot_of.get(key)
            if slot is None:
                missing.append(i)
            else:
                cache.touch(key)
                experts.append(expert)
                slots.append(slot)
        n_hits = len(experts)
        if self.guessed:
            used = self.guessed.intersection(base + expert for expert in experts)
            self.guesses_used += len(used)
            self.guessed -= used
        passing = self._place(event, base, missing, experts, slots) if missing else []
        loads = [0] * n_hits + [1] * len(missing)
        guesses = self._guess(event) if self.predictor is not None else []
        for key in passing:  # only now: until here their slots belong to this very plan
            if key in slot_of:
                self.free.append(slot_of.pop(key))
        return Plan(experts, slots, loads, guesses, n_hits)

    def _place(
        self,
        event: RouteEvent,
        base: int,
        missing: list[int],
        experts: list[int],
        slots: list[int],
    ) -> list[int]:
        """Give every missing expert a slot, appending to ``experts`` and ``slots``.

        Returns the keys the policy does not want to keep.
        """
        slot_of, cache, free = self.slot_of, self.cache, self.free
        if self.order is not None and len(missing) > 1:
            rank = self.order.order(
                [event.experts[i] for i in missing], [event.counts[i] for i in missing]
            )
            missing = [missing[r] for r in rank]
        pinned = {base + expert for expert in event.experts}
        recycled = 0
        passing: list[int] = []
        for i in missing:
            expert = event.experts[i]
            key = base + expert
            if free:
                slot = free.pop()
            else:
                victim = cache.evict(pinned, key)
                if victim is None:
                    old = base + experts[recycled]
                    slot = slot_of.pop(old)
                    if old in cache:
                        cache.remove(old)
                    recycled += 1
                else:
                    slot = slot_of.pop(victim)
                    self.guessed.discard(victim)
            slot_of[key] = slot
            if not cache.admit(key):
                passing.append(key)
            experts.append(expert)
            slots.append(slot)
        return passing

    def _guess(self, event: RouteEvent) -> list[tuple[int, int]]:
        """Slots for the predictor's keys. A guess takes a free slot only: it evicts nothing."""
        assert self.predictor is not None
        guesses: list[tuple[int, int]] = []
        for key in self.predictor.guess(event):
            if key in self.slot_of:
                continue
            if not self.free:
                break
            if self.cache.admit(key):
                slot = self.free.pop()
                self.slot_of[key] = slot
                self.guessed.add(key)
                guesses.append((key, slot))
        return guesses

    def drop(self, keys: Iterable[int]) -> None:
        """Forget keys whose slots turned out not to hold them (a failed read, a cancelled step)."""
        for key in keys:
            self.free.append(self.slot_of.pop(key))
            self.guessed.discard(key)
            if key in self.cache:
                self.cache.remove(key)

    def reconcile(self, held: Sequence[int]) -> None:
        """Make the table true after a failure, also one inside ``plan`` that left it half changed.

        ``held[slot]`` is the key a slot holds, -1 for none.
        """
        slot_of = {
            key: s for key, s in self.slot_of.items() if held[s] == key and key in self.cache
        }
        for key in [key for key in self.cache if key not in slot_of]:
            self.cache.remove(key)
        self.slot_of = slot_of
        self.guessed &= slot_of.keys()
        used = set(slot_of.values())
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
        assert set(self.slot_of) == set(self.cache), "the policy and the table disagree"
        assert self.guessed <= set(self.slot_of), "a guess is counted that is not resident"
        self.cache.check_integrity()
