"""What was computed is not computed again: sequences begin where others have been.

Owns which sequence number of a context holds whose tokens, and what becomes of one that has ended:
it stays in the context's memory while its cells and its number are not needed, then as a copy on a
shelf, then on disk. A sequence that enters gets the longest start that any of them can give.
Nothing passes from one owner to another. Knows no requests and no steps; all of it happens between
two steps, on the thread that computes.

What can be had depends on the kind of memory. Of a plain cache any start can be cut off and shared.
Of a sliding window only one whose last window is still there, and it is shared by a copy: a cell of
two sequences would never leave the window again. A recurrent state, alone or beside a cache, is
whole or nothing; what is wanted of it earlier is a checkpoint, taken on the way.
"""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

import llama_cpp

from .copies import Copy, Shelf
from .ledger import Ledger
from .memory import Memory
from .store import Entry, Store

# A start of fewer tokens is computed sooner than copied, and waiting for one does not pay.
WORTH = 32
# Before the end of a prompt: there the next one of a conversation parts from it, since a template
# opens the answer in a way that it does not repeat in the past.
_BEFORE_END = 4
_APART = 8192  # tokens between the checkpoints of a long prompt


class Kind(NamedTuple):
    """What a context's memory allows."""

    whole: bool = False  # a state cannot be cut
    window: int = 0  # the attention's, in tokens; 0: all there are
    recurrent: bool = False  # nothing but what cannot be cut

    @classmethod
    def of(cls, model: Any, memory: Memory) -> Kind:
        """As llama.cpp tells of a model, and of its memory, which is empty."""
        recurrent = bool(llama_cpp.llama_model_is_recurrent(model))
        whole = recurrent or bool(llama_cpp.llama_model_is_hybrid(model))
        whole = whole or not memory.remove(0, 0, 1)
        window = 0 if whole else int(llama_cpp.llama_model_n_swa(model))
        return cls(whole, window, recurrent)


@dataclass(eq=False)
class Held:
    """A sequence in the context's memory. ``tokens`` may be more than were computed."""

    owner: str
    tokens: list[int]
    running: bool


class Place(NamedTuple):
    """A sequence number, and how many tokens are there already."""

    slot: int
    n: int


class States:
    """The states of one context of so many ``cells``; ``store``: where they last."""

    def __init__(
        self,
        memory: Memory,
        kind: Kind,
        cells: int,
        shelf: Shelf | None = None,
        store: Store | None = None,
    ) -> None:
        self.memory = memory
        self.kind = kind
        self.cells = cells
        self.shelf = shelf or Shelf(0, store)
        self.store = store
        self.ledger = Ledger()
        self.held: dict[int, Held] = {}  # by number; of those at rest the least recently used first

    @property
    def cuts(self) -> bool:
        """Any start of a sequence can be cut from it at any time."""
        return not self.kind.whole and not self.kind.window

    # -- coming and going

    def wanted(self, owner: str, tokens: list[int], most: int) -> Future[None] | None:
        """What has to end before ``enter``, so that this does not wait for the disk; None: nothing
        any more. It is to be asked again after that."""
        store = self.store
        if store is None or most < WORTH:
            return None
        if not store.is_listed(owner):
            return store.reading(lambda: store.look_up(owner))
        found, n = self._best_copy(owner, tokens, most)
        here = self._best(owner, tokens, most)[1] + WORTH
        for coming, done in store.coming(owner):
            if common(coming, tokens, most) >= max(n + 1, here):
                return done
        if n < here or not isinstance(found, Entry) or found.checked is not None:
            return None
        entry = found
        return store.reading(lambda: store.check(owner, entry))

    def enter(self, owner: str, tokens: list[int], most: int, free: Collection[int]) -> Place:
        """A number of ``free`` for a sequence that begins to run, with as many of its first
        ``most`` tokens as can be had."""
        source, n = self._best(owner, tokens, most)
        copy, n_copy = self._best_copy(owner, tokens, most)
        if copy is not None and n_copy >= n + WORTH:
            slot = self._vacate(free)
            n = n_copy if self._put(slot, owner, copy, n_copy) else 0
        elif source is None:
            slot, n = self._vacate(free), 0
        else:
            slot = self._spot(source, n, free)
            n = self._take(source, slot, n)
        self.held[slot] = Held(owner, tokens, True)
        return Place(slot, n)

    def adopt(self, slot: int, source: int, n: int) -> int:
        """Let a running sequence begin with the first ``n`` tokens of another of its owner, in the
        place of the fewer that it has; how many it has then."""
        mine, other = self.held[slot], self.held[source]
        assert mine.owner == other.owner and mine.tokens[:n] == other.tokens[:n]
        by_copy = self.kind.window and self.memory.state_bytes(source) > self.shelf.limit
        if by_copy or self._usable(source, n) != n:
            return self.ledger.length(slot)
        self._drop(slot)
        n = self._take(source, slot, n)
        self.held[slot] = mine
        return n

    def grew(self, slot: int, n: int) -> None:
        """So many more tokens of a sequence were computed."""
        self.ledger.grow(slot, n)

    def leave(self, slot: int, keep: bool) -> None:
        """A sequence runs no more; unless it is kept, nothing of it stays."""
        held, n = self.held.pop(slot), self.ledger.length(slot)
        if not keep or n == 0:
            self._drop(slot)
            return
        held = Held(held.owner, held.tokens[:n], False)
        if self.cuts:  # what begins it
            for other, old in list(self.held.items()):
                covered = not old.running and old.owner == held.owner
                if covered and old.tokens == held.tokens[: len(old.tokens)]:
                    self._drop(other)
        self.held[slot] = held

    def room(self, n: int) -> None:
        """See to it that there are ``n`` free cells, if what is at rest holds so many."""
        for slot in self._resting():
            if self.ledger.used + n <= self.cells:
                return
            self.evict(slot)

    def evict(self, slot: int) -> None:
        """Let a sequence at rest leave the memory, for the shelf."""
        held = self.held[slot]
        owner, tokens = held.owner, held.tokens
        if len(tokens) >= WORTH and (self.shelf.limit or self.store is not None):
            size = self.memory.state_bytes(slot)
            kept = self.shelf.add(owner, tokens, size, lambda: self.memory.save(slot), False)
            if not kept and self.store is not None:  # there is no room for a copy on the way
                self._store_directly(slot, size)
        self._drop(slot)

    def _store_directly(self, slot: int, size: int) -> None:
        assert self.store is not None
        owner, tokens = self.held[slot].owner, self.held[slot].tokens
        self.store.write(
            owner, tokens, size, lambda path: self.memory.save_file(slot, path, tokens), here=True
        )

    def shared(self, slots: Collection[int]) -> int:
        """How many cells these sequences would take more if they shared none."""
        return sum(map(self.ledger.length, slots)) - self.ledger.used_by(slots)

    def evict_all(self) -> bool:
        """Whether anything was at rest."""
        resting = self._resting()
        for slot in resting:
            self.evict(slot)
        return bool(resting)

    def close(self) -> None:
        """Bring to disk what is worth it."""
        if self.store is not None:
            self.evict_all()
            self.shelf.clear()
            self.store.close()

    # -- checkpoints

    def stops(self, n_prompt: int) -> set[int]:
        """Where computing a prompt should pause for ``checkpoint``."""
        if not self.kind.whole or not self.shelf.limit:
            return set()
        points = {*range(_APART, n_prompt - _APART, _APART), n_prompt - _BEFORE_END}
        return {point for point in points if point >= WORTH}

    def checkpoint(self, slot: int) -> None:
        """Remember a running sequence as it is now, where it could not be cut back to it later."""
        if not self.kind.whole:
            return
        held, partial = self.held[slot], not self.kind.recurrent
        self.shelf.add(
            held.owner,
            held.tokens[: self.ledger.length(slot)],
            self.memory.state_bytes(slot, partial),
            lambda: self.memory.save(slot, partial),
            partial,
        )

    def _checkpoint(self, owner: str, tokens: list[int], most: int) -> Copy | None:
        """The longest of a start of these tokens."""
        found = [
            copy
            for copy in self.shelf.of(owner)
            if copy.partial and len(copy.tokens) <= most and begins(copy.tokens, tokens)
        ]
        return max(found, key=lambda copy: len(copy.tokens), default=None)

    # -- what there is

    def _best(self, owner: str, tokens: list[int], most: int) -> tuple[int | None, int]:
        """The sequence in memory that has most of these tokens, and how many; the latest of equal
        ones."""
        best: tuple[int | None, int] = (None, 0)
        for slot, held in self.held.items():
            if held.owner == owner:
                n = self._usable(slot, common(held.tokens, tokens, most))
                if n and n >= best[1]:
                    best = slot, n
        return best

    def _usable(self, slot: int, n: int) -> int:
        """How many of its first ``n`` tokens a sequence can give."""
        length = self.ledger.length(slot)
        if n >= length:
            return length
        if self.kind.whole:
            held = self.held[slot]
            found = self._checkpoint(held.owner, held.tokens, n)
            return len(found.tokens) if found else 0
        if self.kind.window and self.memory.first(slot) > max(0, n - self.kind.window):
            return 0
        return n

    def _best_copy(
        self, owner: str, tokens: list[int], most: int
    ) -> tuple[Copy | Entry | None, int]:
        """The same of copies on the shelf and on disk."""
        best: tuple[Copy | Entry | None, int] = (None, 0)
        copies: list[Copy | Entry] = [copy for copy in self.shelf.of(owner) if not copy.partial]
        if self.store is not None:
            copies += self.store.entries(owner)
        for copy in copies:
            n, length = common(copy.tokens, tokens, most), len(copy.tokens)
            if n < length and self.kind.whole:
                found = self._checkpoint(owner, copy.tokens, n)
                n = len(found.tokens) if found else 0
            elif n < length and max(0, length - self.kind.window) > max(0, n - self.kind.window):
                n = 0 if self.kind.window else n
            if n > best[1]:
                best = copy, n
        return best

    # -- how it is had

    def _resting(self) -> list[int]:
        return [slot for slot, held in self.held.items() if not held.running]

    def _vacate(self, free: Collection[int]) -> int:
        """A free number without a sequence: the lowest, or else what rests in one is evicted."""
        if vacant := [slot for slot in free if slot not in self.held]:
            return min(vacant)
        slot = next(slot for slot in self._resting() if slot in free)
        self.evict(slot)
        return slot

    def _spot(self, source: int, n: int, free: Collection[int]) -> int:
        """Where a sequence goes that begins with ``n`` tokens of ``source``: on in its place,
        unless that would cost the rest of it and there is another place."""
        if source not in free:
            return self._vacate(free)
        others = [slot for slot in free if slot != source]
        is_vacant = any(slot not in self.held for slot in others)
        length = self.ledger.length(source)
        if n == length or not others or (not is_vacant and 2 * n >= length):
            return source
        return self._vacate(others)

    def _take(self, source: int, slot: int, n: int) -> int:
        """Have the first ``n`` tokens of a sequence in ``slot``; how many there are."""
        if source == slot:
            done = self._cut(slot, n)
        elif self.kind.window:
            done = self._copy(source, slot, n)
        else:
            length = self.ledger.length(source)
            # A state that cannot be cut cannot be copied in part either: llama.cpp would abort.
            self.memory.copy(source, slot, -1 if self.kind.whole or n == length else n)
            self.ledger.share(source, slot, length if self.kind.whole else n)
            self.held[slot] = self.held[source]
            done = self._cut(slot, n)
        if done:
            return n
        self._drop(slot)
        return 0

    def _cut(self, slot: int, n: int) -> bool:
        """Reduce a sequence to its first ``n`` tokens."""
        if n == self.ledger.length(slot):
            return True
        if self.kind.whole:
            held = self.held[slot]
            point = self._checkpoint(held.owner, held.tokens, n)
            if point is None or len(point.tokens) != n:
                return False
            self.shelf.touch(point)
            if not self.memory.restore(slot, point.data, partial=True):
                return False
        if not self.memory.remove(slot, n):
            return False
        self.ledger.cut(slot, n)
        return True

    def _copy(self, source: int, slot: int, n: int) -> bool:
        """Copy the first ``n`` tokens of a sequence with a sliding window, by way of the shelf's
        memory."""
        if not self.shelf.reserve(self.memory.state_bytes(source)):
            return False
        self.memory.copy(source, slot, n)
        data = self.memory.save(slot)  # its window alone
        self.memory.remove(slot)
        self.room(n)
        if self.ledger.used + n > self.cells or not self.memory.restore(slot, data):
            return False
        self.ledger.grow(slot, n)
        return True

    def _put(self, slot: int, owner: str, copy: Copy | Entry, n: int) -> bool:
        """Restore a copy into an empty slot, and cut it to ``n`` tokens."""
        self.room(n_copy := len(copy.tokens))
        if self.ledger.used + n_copy > self.cells or not self._restore(slot, owner, copy):
            self._drop(slot)
            return False
        self.ledger.grow(slot, len(copy.tokens))
        self.held[slot] = Held(owner, copy.tokens, False)
        if not self._cut(slot, n):
            self._drop(slot)
            return False
        if isinstance(copy, Copy) and n == len(copy.tokens):
            self.shelf.remove(copy)  # what comes of it will be another copy
        return True

    def _restore(self, slot: int, owner: str, copy: Copy | Entry) -> bool:
        if isinstance(copy, Copy):
            self.shelf.touch(copy)
            return self.memory.restore(slot, copy.data)
        path = None if self.store is None else self.store.verified(owner, copy)
        return path is not None and self.memory.restore_file(slot, path, len(copy.tokens))

    def _drop(self, slot: int) -> None:
        self.held.pop(slot, None)
        self.memory.remove(slot)
        self.ledger.drop(slot)

    def stats(self) -> dict[str, int]:
        """For a table, from any thread."""
        return {
            "kept": sum(not held.running for held in list(self.held.values())),
            "kept_bytes": self.shelf.n_bytes,
        }

    def check_integrity(self) -> None:
        """Assert that the ledger and llama.cpp agree."""
        for slot, held in self.held.items():
            n = self.ledger.length(slot)
            assert self.memory.last(slot) == n - 1
            assert held.running or len(held.tokens) == n
        assert self.ledger.used <= self.cells


def begins(start: list[int], tokens: list[int]) -> bool:
    return tokens[: len(start)] == start


def common(a: list[int], b: list[int], most: int) -> int:
    """How many tokens two sequences begin with alike, ``most`` at most."""
    low, high = 0, min(len(a), len(b), most)
    while low < high:  # comparing slices is far faster than comparing tokens
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
