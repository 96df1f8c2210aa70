"""Copies of sequences' states outside a context: a bounded shelf of them in memory.

Knows whose a copy is and of which tokens; what the bytes mean only llama.cpp knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from .store import Store, written


@dataclass(eq=False)
class Copy:
    """The state after these tokens. ``partial``: only what cannot be rolled back, a checkpoint; it
    is worth something beside the state of a sequence that begins with the same tokens."""

    owner: str
    tokens: list[int]
    data: bytes | bytearray
    partial: bool = False
    written: Future[None] | None = None  # to the store, or on its way there


class Shelf:
    """At most ``limit`` bytes of copies; those unused for the longest go first, to the store if
    there is one.

    A copy stays here until it is written, so what waits for the disk is in the limit too. When more
    than half of the limit is not written yet, the oldest are, ahead of need: whoever needs room
    then waits for the disk only if states come faster than it takes them.
    """

    def __init__(self, limit: int, store: Store | None = None) -> None:
        self.limit = limit
        self.n_bytes = 0
        self._store = store
        self._copies: list[Copy] = []  # the least recently used first

    def __contains__(self, copy: Copy) -> bool:
        return copy in self._copies

    def of(self, owner: str) -> Iterator[Copy]:
        """The copies of one owner, the latest first."""
        return (copy for copy in reversed(self._copies) if copy.owner == owner)

    def touch(self, copy: Copy) -> None:
        """It was used."""
        if copy in self:
            self._copies.remove(copy)
            self._copies.append(copy)

    def add(
        self, owner: str, tokens: list[int], size: int, save: Callable[[], bytearray], partial: bool
    ) -> bool:
        """Take in what ``save`` returns, ``size`` bytes; False where that is more than fits."""
        for copy in self.of(owner):
            if copy.partial == partial and copy.tokens == tokens:
                self.touch(copy)
                return True
        if not self.reserve(size):
            return False
        self._copies.append(Copy(owner, tokens, save(), partial))
        self.n_bytes += size
        self._write_ahead()
        return True

    def reserve(self, size: int) -> bool:
        """Leave so many bytes of the limit unused, if there are so many."""
        if size > self.limit:
            return False
        while self.n_bytes + size > self.limit:
            self._let_go(self._copies[0])
        return True

    def remove(self, copy: Copy) -> None:
        if copy in self:
            self._copies.remove(copy)
            self.n_bytes -= len(copy.data)
            if copy.written is not None:
                copy.written.cancel()  # unless it has begun

    def _write_ahead(self) -> None:
        if self._store is None:
            return
        waiting = [copy for copy in self._copies if not copy.partial and copy.written is None]
        n_bytes = sum(len(copy.data) for copy in waiting)
        for copy in waiting:
            if 2 * n_bytes <= self.limit:
                return
            self._write(self._store, copy)
            n_bytes -= len(copy.data)

    def _let_go(self, copy: Copy) -> None:
        if self._store is not None and not copy.partial:
            self._write(self._store, copy).result()
        self.remove(copy)

    def _write(self, store: Store, copy: Copy) -> Future[None]:
        if copy.written is None:
            save = written(copy.tokens, copy.data)
            copy.written = store.write(copy.owner, copy.tokens, len(copy.data), save, here=False)
        return copy.written

    def clear(self) -> None:
        """Let everything go."""
        while self._copies:
            self._let_go(self._copies[0])
