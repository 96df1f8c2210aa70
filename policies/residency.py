"""Which expert sits in which slot: turns one route event into one plan.

The engine's controller and the offline simulator both drive this class, so a replayed trace
cannot differ from the run it came from. It knows slots and keys; it does not know bytes, files,
threads or time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable, Sequence
from typing import NamedTuple

from .base import CachePolicy, Guess, LoadOrder, Ranked, RouteEvent
from .order import Popularity
from .scan import Scan

WRONG_GUESSES = -3  # among ``Residency.spares``


class Plan(NamedTuple):
    """Work for one layer in execution order; the three lists are parallel.

    Resident experts come first. ``loads[i]`` is not 0 when expert i must be read into ``slots[i]``
    first: 1 whole, 2 its low copy. A slot that appears twice is recycled inside the layer: its
    second expert is read after its first was computed.

    On a device ``pools`` are slots of the layer's pool there, and an expert that has one already
    has no other: its slot is -1.
    """

    experts: list[int]
    slots: list[int]
    loads: list[int]
    n_hits: int
    n_low_pairs: int = 0  # (token, rank) pairs computed from a low copy
    n_low_loads: int = 0
    pools: Sequence[int] = ()


class Guessed(NamedTuple):
    """What is done with guesses: ``placed`` are (key, slot, -1) of what is to be read ahead, and
    (key, slot, slot of its layer's pool) of what is in memory and to be copied to the device;
    ``foreseen``, if any, replaces what was foreseen with the plan."""

    placed: Sequence[tuple[int, int, int]]
    foreseen: Sequence[int] = ()


class Residency:
    """The slot table of one model: ``n_slots`` slots shared by all layers.

    Between two events ``slot_of`` maps exactly the resident keys to distinct slots, and every
    other slot is free. A guess is on probation: it has a slot, but the cache policy learns of it
    when it is demanded. One that was wrong is ``stale``, the next to lose its slot.

    Where ``scan`` finds that demand goes round, experts that do not stay are *passing*: they keep
    their slot until they were computed, and then it is the next one's, of the same event or of a
    guess.
    """

    is_plain = True  # every resident key is an expert as it is

    def __init__(
        self,
        n_slots: int,
        n_experts: int,
        cache: CachePolicy,
        order: LoadOrder | None = None,
        scan: Scan | None = None,
    ) -> None:
        assert n_slots >= 1
        assert n_experts >= 1
        assert scan is None or scan.cache is cache, "a scan judges by the cache that keeps"
        self.n_slots = n_slots
        self.n_experts = n_experts
        self.cache = cache
        self.order = order
        self.scan = scan
        self.slot_of: dict[int, int] = {}
        self.free = list(range(n_slots - 1, -1, -1))
        self.guessed: set[int] = set()  # not demanded yet
        self.stale: dict[int, None] = {}  # in the order they turned out wrong
        self.guesses_used = 0
        self._scans = False  # the last event was part of a scan
        is_known = scan is None and isinstance(order, Popularity)
        self._ranked = cache if is_known and isinstance(cache, Ranked) else None

    def plan(self, event: RouteEvent) -> Plan:
        """Decide hits, loads and victims of one event and update the table.

        An event that needs more experts than there are slots is served in turns: once every
        resident key is pinned by the event itself, slots are reused in execution order.
        """
        self._scans = self.scan is not None and self.scan.observe(event)
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
            came_true = probation and (key in guessed or key in stale)
            if came_true:
                self.guesses_used += key in guessed
                guessed.discard(key)
                stale.pop(key, None)
            if self._scans:
                continue  # _stream does the rest
            if came_true:
                if not cache.admit(key, event.counts[i]):
                    passing.append(key)
            else:
                cache.touch(key, event.counts[i])
        n_hits = len(experts)
        if guessed:
            self.give_up(event.layer)
        if self._scans:
            self._stream(event, base, missing, experts, slots, passing)
        elif missing:
            self._place(event, base, missing, experts, slots, passing)
        loads = [0] * n_hits + [1] * len(missing)
        # Only now: until here these slots belong to this very plan. Those computed first are the
        # first to be taken, but after those that were free before.
        self.free[:0] = [slot_of.pop(key) for key in reversed(passing) if key in slot_of]
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
        missing = self._in_order(event, missing)
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
            slot_of[key] = slot
            if not cache.admit(key, event.counts[i]):
                passing.append(key)
            experts.append(expert)
            slots.append(slot)

    def _stream(
        self,
        event: RouteEvent,
        base: int,
        missing: list[int],
        experts: list[int],
        slots: list[int],
        passing: list[int],
    ) -> None:
        """``_place`` in a scan: what the scan does not keep takes turns in the slots of its ring.

        Good guesses stream too. A resident expert that does not stay is computed first, so its slot
        is free when the event has ended, or at once if it was not asked for.
        """
        assert self.scan is not None
        slot_of, cache = self.slot_of, self.cache
        keys = [base + expert for expert in event.experts]
        pinned = set(keys)
        for i in missing:
            cache.admit(keys[i], event.counts[i])
        # After the newcomers: of equally likely experts the resident ones stay.
        for key, votes in zip(keys, event.counts, strict=True):
            if key in slot_of:
                (cache.touch if key in cache else cache.admit)(key, votes)
        idle = [k for k in range(base, base + self.n_experts) if k in cache and k not in pinned]
        stays = self.scan.stays(event.layer, [*keys, *idle])
        streaming = deque(key for key in keys if key in slot_of and key not in stays)
        for key in (key for key in idle if key not in stays):
            cache.remove(key)
            self.free.append(slot_of.pop(key))
        for key in streaming:
            cache.remove(key)
        for i in self._in_order(event, missing):
            key = keys[i]
            leaves = key not in stays
            if leaves:
                cache.remove(key)
            full = len(streaming) >= self.scan.ring if leaves else not self.free
            slot = None if full and streaming else self._take(pinned, key)
            if slot is None and not streaming:
                slot = self._take_guess(pinned)
            if slot is None:
                first = streaming.popleft() if streaming else self._first_placed(base, experts)
                slot = slot_of.pop(first)
                if first in cache:
                    cache.remove(first)
            slot_of[key] = slot
            if leaves:
                streaming.append(key)
            experts.append(event.experts[i])
            slots.append(slot)
        passing += streaming

    def _first_placed(self, base: int, experts: Sequence[int]) -> int:
        """Of the experts planned so far, the key of the first that still has its slot."""
        return next(base + expert for expert in experts if base + expert in self.slot_of)

    def _in_order(self, event: RouteEvent, missing: list[int]) -> list[int]:
        if self.order is None or len(missing) < 2:
            return missing
        rank = self.order.order(
            [event.experts[i] for i in missing], [event.counts[i] for i in missing]
        )
        return [missing[r] for r in rank]

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

        None takes the slot of an expert that stays and that the event needs, that is a guess itself
        or in ``keep``; in a scan, of no expert that stays. A slot may be one that the event still
        computes on: it is read into when that is done.
        """
        base = event.layer * self.n_experts
        pinned = {base + expert for expert in event.experts}
        pinned.update(keep)
        placed: list[tuple[int, int]] = []
        for key, _ in guesses:
            if key in self.slot_of:
                continue
            if self._scans and not self.free and not self.stale:
                break
            slot = self._take(pinned, key, demanded=False)
            if slot is None:
                break
            self.slot_of[key] = slot
            self.guessed.add(key)
            placed.append((key, slot))
        return placed

    def spares(self, most: int) -> list[int]:
        """The slots that missing keys of the next event would get, in this order, passing over
        those of keys that it asks for; empty if the cache or the order does not say. In the place
        of ``WRONG_GUESSES`` come those of guesses made until then that the event does not ask for,
        in the order of their keys."""
        if self._ranked is None:
            return []
        slot_of = self.slot_of
        slots = self.free[::-1] + [slot_of[key] for key in self.stale] + [WRONG_GUESSES]
        if len(slots) < most:
            slots += [slot_of[key] for key in self._ranked.coldest(most - len(slots))]
        return slots[:most]

    def settle(self, event: RouteEvent) -> None:
        """An event came that is served elsewhere: what it asks for was guessed well, and other
        guesses for the layer were wrong."""
        base = event.layer * self.n_experts
        for expert, count in zip(event.experts, event.counts, strict=True):
            key = base + expert
            if (key in self.guessed or key in self.stale) and self.cache.admit(key, count):
                self.guesses_used += key in self.guessed
                self.guessed.discard(key)
                self.stale.pop(key, None)
        self.give_up(event.layer)

    def give_up(self, layer: int) -> None:
        """Guesses for this layer or an earlier one that were not asked for were wrong."""
        for key in sorted(key for key in self.guessed if key // self.n_experts <= layer):
            self.guessed.remove(key)
            self.stale[key] = None

    def fill(self, keys: Iterable[int]) -> list[tuple[int, int]]:
        """(key, slot) for those keys that get a free slot before anything was demanded, in the
        order of keys: so neighbours lie side by side, and are copied to a device together.

        To the policy each is a demand, in the given order: what is worth most belongs last.
        """
        admitted: dict[int, None] = {}
        for key in keys:
            if len(admitted) == len(self.free):
                break
            if key not in self.slot_of and key not in admitted and self.cache.admit(key):
                admitted[key] = None
        slots = sorted(self.free.pop() for _ in admitted)
        placed = list(zip(sorted(admitted), slots, strict=True))
        self.slot_of.update(placed)
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
        self.free = [slot for slot in range(self.n_slots - 1, -1, -1) if slot not in used]

    def adopt(self, held: Sequence[int]) -> None:
        """After ``reconcile``: keep what else the slots hold, if the policy would."""
        for slot, key in enumerate(held):
            if key >= 0 and key not in self.slot_of and self.cache.admit(key):
                self.slot_of[key] = slot
                self.free.remove(slot)

    def holds(self, key: int) -> bool:
        """Whether a demand for it would read nothing."""
        return key in self.slot_of

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
