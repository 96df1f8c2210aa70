"""How many cells of a unified cache the sequences take, those that they share counted once.

llama.cpp does not tell. Knows numbers of sequences and of tokens; touches no memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple


class _Run(NamedTuple):
    """Tokens [start, end) of a sequence, in cells that were filled in one go.

    Sequences that share cells have runs of one name, which begin alike and may end apart.
    """

    name: int
    start: int
    end: int


class Ledger:
    def __init__(self) -> None:
        self._runs: dict[int, list[_Run]] = {}
        self._growing: dict[int, int] = {}  # the name under which a sequence's next tokens go
        self._names = itertools.count()

    def length(self, seq: int) -> int:
        """Tokens of a sequence."""
        runs = self._runs.get(seq)
        return runs[-1].end if runs else 0

    @property
    def used(self) -> int:
        """Cells of all sequences."""
        return self.used_by(self._runs)

    def used_by(self, seqs: Iterable[int]) -> int:
        """Cells of these sequences."""
        spans: dict[int, tuple[int, int]] = {}
        for seq in seqs:
            for name, start, end in self._runs.get(seq, ()):
                spans[name] = start, max(end, spans.get(name, (0, 0))[1])
        return sum(end - start for start, end in spans.values())

    def grow(self, seq: int, n: int) -> None:
        """The sequence got ``n`` more tokens."""
        runs = self._runs.setdefault(seq, [])
        if runs and self._growing.get(seq) == runs[-1].name:
            runs[-1] = runs[-1]._replace(end=runs[-1].end + n)
            return
        self._growing[seq] = name = next(self._names)
        start = self.length(seq)
        runs.append(_Run(name, start, start + n))

    def share(self, source: int, target: int, n: int) -> None:
        """``target`` holds the first ``n`` tokens of ``source``, and nothing else any more."""
        runs = self._runs[source]
        self.drop(target)
        self._runs[target] = [r._replace(end=min(r.end, n)) for r in runs if r.start < n]

    def cut(self, seq: int, n: int) -> None:
        """Of the sequence only the first ``n`` tokens stay."""
        if n < self.length(seq):
            self.share(seq, seq, n)

    def drop(self, seq: int) -> None:
        self._runs.pop(seq, None)
        self._growing.pop(seq, None)
