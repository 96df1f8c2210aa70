"""Copies of sequences' states outside a context: a bounded shelf of them in memory.

Knows whose a copy is and of which tokens; what the bytes mean only llama.cpp knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from .store import Store, written


class Copy(NamedTuple):
    """The state after these tokens. ``partial``: only what cannot be rolled back, a checkpoint; it
    is worth something beside the state of a sequence that begins with the same tokens."""

    owner: str
    tokens: list[int]
    data: bytes | bytearray
    partial: bool = False


class Shelf:
    """At most ``limit`` bytes of copies; those unused for the longest go first, to the store if
    there is one."""

    def __init__(self, limit: int, store: Store | None = None) -> None:
        self.limit = limit
        self.n_bytes = 0
        self._store = store
        self._copies: list[Copy] = []  # the least recently used first

    def __contains__(self, copy: Copy) -> bool:
        return any(other is copy for other in self._copies)

    def of(self, owner: str) -> Iterator[Copy]:
        """The copies of one owner, the latest first."""
        return (copy for copy in reversed(self._copies) if copy.owner == owner)

    def touch(self, copy: Copy) -> None:
        """It was used."""
        if copy in self:
            self._copies = [other for other in self._copies if other is not copy] + [copy]

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
            self._copies = [other for other in self._copies if other is not copy]
            self.n_bytes -= len(copy.data)

    def _let_go(self, copy: Copy) -> None:
        if self._store is not None and not copy.partial:
            save = written(copy.tokens, copy.data)
            self._store.write(copy.owner, copy.tokens, len(copy.data), save)
        self.remove(copy)

    def clear(self) -> None:
        """Let everything go."""
        while self._copies:
            self._let_go(self._copies[0])
