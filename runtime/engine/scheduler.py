"""Who computes in the next step: admission, turns, prompts in chunks, and who gives way.

Owns the order of sequences and counts the cells of the memory; a cell holds one token. Where a
sequence goes, and how much of it is there already, ``states`` says. Computes nothing and knows no
llama.cpp: it is told what became of a step.

The rules, in this order. Higher priority goes first; inside one priority first come, first served,
so that nobody starves. A sequence is admitted when its tokens fit and leave the others room to
grow; one of higher priority may displace lower ones for that. Those that decode go first into a
step, the rest is for prompts; one that begins as an earlier one does waits until that has computed
it. When the memory is full, the youngest of the lowest priority gives
way: it waits again, at its old place, and is computed anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple, Protocol

from ...policies.base import Phase
from .schedule import Schedule
from .sequence import Sequence
from .states import WORTH, Place, common

# Tokens that each running sequence can still grow by when another is admitted: one that is let in
# and displaced at once is computed for nothing.
_GROWTH = 16


class Limits(NamedTuple):
    """What a context allows."""

    cells: int  # tokens of all sequences together
    slots: int  # sequences in memory
    rows: int  # of one step
    outputs: int  # rows of one step whose logits are wanted
    equal: bool = False  # a step holds decode rows only, or equally long pieces of prompts


class Piece(NamedTuple):
    """Tokens [start, start + n) of a sequence; the logits of the last ``outputs`` are wanted."""

    sequence: Sequence
    start: int
    n: int
    outputs: int


class Step(NamedTuple):
    pieces: list[Piece]
    phase: Phase

    @property
    def n_rows(self) -> int:
        return sum(piece.n for piece in self.pieces)


class Memories(Protocol):
    """What the scheduler asks of ``States``, which says more of each."""

    @property
    def cuts(self) -> bool: ...
    def enter(self, owner: str, tokens: list[int], most: int, free: Collection[int]) -> Place: ...
    def leave(self, slot: int, keep: bool) -> None: ...
    def adopt(self, slot: int, source: int, n: int) -> int: ...
    def grew(self, slot: int, n: int) -> None: ...
    def room(self, n: int) -> None: ...
    def evict_all(self) -> bool: ...
    def shared(self, slots: Collection[int]) -> int: ...
    def stops(self, n_prompt: int) -> set[int]: ...
    def checkpoint(self, slot: int) -> None: ...


class Scheduler:
    """``drop`` is called with a sequence that leaves the memory while it still has its slot."""

    def __init__(
        self,
        schedule: Schedule,
        limits: Limits,
        states: Memories,
        drop: Callable[[Sequence], None] = lambda sequence: None,
    ) -> None:
        self.limits = limits
        self.cells = limits.cells  # may turn out to be fewer
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.n_preempted = 0
        self._states = states
        self._drop = drop
        self._free = set(range(limits.slots))
        self._turns = itertools.count(1)
        self._prompts_next = True  # where prompts and decoding take turns
        self.set(schedule)

    def set(self, schedule: Schedule) -> None:
        """Obey another schedule from the next step on."""
        self.schedule = schedule
        most = self.limits.slots if schedule.quantum else schedule.group
        self._n_most = min(most, self.limits.slots)
        self._group = min(schedule.group, self.limits.slots, self.limits.outputs)
        for sequence in self.running:
            sequence.served = 0

    # -- coming and going

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)
        self.waiting.sort(key=_order)

    def remove(self, sequence: Sequence, keep: bool = False) -> None:
        """It is finished, cancelled or failed; ``keep`` what it computed for others."""
        if sequence.slot >= 0:
            self._take_out(sequence, keep)
        else:
            self.waiting.remove(sequence)

    def _take_out(self, sequence: Sequence, keep: bool) -> None:
        self._drop(sequence)
        self._states.leave(sequence.slot, keep)
        self.running.remove(sequence)
        self._free.add(sequence.slot)
        sequence.slot, sequence.computed = -1, 0
        sequence.alike.clear()  # which keeps others alive

    def _preempt(self, sequence: Sequence) -> None:
        self._take_out(sequence, keep=True)
        sequence.preempted = True
        self.n_preempted += 1
        self.add(sequence)

    @property
    def used(self) -> int:
        """Cells of what runs, of tokens that are known and not computed yet as well."""
        return self._cells_of(self.running)

    def _cells_of(self, sequences: Iterable[Sequence]) -> int:
        tokens = sum(len(sequence.tokens) for sequence in sequences)
        return tokens - self._states.shared([sequence.slot for sequence in sequences])

    # -- a step

    def next(self) -> Step | None:
        """The next step, or None where there is nothing to do."""
        while len(self.running) > 1 and self.used > self.cells:
            self._preempt(_victim(self.running))
        self._admit()
        if not self.running:
            return None
        decoding = self._decoding()
        prompts = sorted((s for s in self.running if not s.decodes), key=_order)
        prompts = [s for s in prompts if not self._waits(s)]
        if not self.limits.equal:
            pieces = [_piece(s, 1) for s in decoding]
            pieces += self._chunks(prompts, len(decoding), len(decoding))
        elif prompts and (self._prompts_next or not decoding):
            decoding, pieces = [], self._equal_chunks(prompts)
        else:
            pieces = [_piece(s, 1) for s in decoding]
        if self.limits.equal:  # some memories share a graph among numbers in a row only
            pieces.sort(key=lambda piece: piece.sequence.slot)
        self._prompts_next = bool(decoding)
        self._states.room(sum(piece.n for piece in pieces))
        if not decoding:
            return Step(pieces, Phase.PREFILL)
        return Step(pieces, Phase.DECODE if len(pieces) == len(decoding) else Phase.MIXED)

    def done(self, step: Step) -> None:
        """The step was computed."""
        for sequence, _, n, _ in step.pieces:
            decoded = sequence.decodes
            sequence.computed += n
            self._states.grew(sequence.slot, n)
            if sequence.computed in sequence.stops:
                self._states.checkpoint(sequence.slot)
            sequence.served += decoded
            if not decoded or sequence.served == self.schedule.quantum:
                sequence.turn, sequence.served = next(self._turns), 0  # to the end of the round

    def refused(self, step: Step) -> bool:
        """There was no room for the step, and nothing changed. False: nor will there ever be, since
        one sequence alone has outgrown the memory."""
        if self._states.evict_all():
            return True
        self.cells = sum(s.computed for s in self.running) + step.n_rows - 1
        return len(self.running) > 1

    # -- the parts of one

    def _decoding(self) -> list[Sequence]:
        ready = [s for s in self.running if s.decodes]
        if len(ready) > self._group:
            ready.sort(key=lambda s: (-s.priority, s.turn))
        return ready[: self._group]

    def _chunks(self, prompts: Iterable[Sequence], n_rows: int, n_outputs: int) -> list[Piece]:
        rows = min(self.schedule.chunk, self.limits.rows - n_rows)
        outputs = self.limits.outputs - n_outputs
        pieces = []
        for sequence in prompts:
            if n := sequence.n_within(rows, outputs):
                pieces.append(piece := _piece(sequence, n))
                rows, outputs = rows - n, outputs - piece.outputs
        return pieces

    def _equal_chunks(self, prompts: list[Sequence]) -> list[Piece]:
        """Of the first in the order as much as fits, of others the same where they have it."""
        rows = min(self.schedule.chunk, self.limits.rows)
        outputs = self.limits.outputs
        n = prompts[0].n_within(rows, outputs)
        pieces = []
        for sequence in prompts:
            if sequence.n_within(min(n, rows), outputs) == n:
                pieces.append(piece := _piece(sequence, n))
                rows, outputs = rows - n, outputs - piece.outputs
        return pieces

    def _admit(self) -> None:
        while self.waiting:
            first = self.waiting[0]
            if not self._fits(first, self.running):
                lower = sorted((s for s in self.running if s.priority < first.priority), key=_order)
                rest = [s for s in self.running if s.priority >= first.priority]
                if not lower or not self._fits(first, rest):
                    return
                while not self._fits(first, self.running):
                    self._preempt(lower.pop())
                self.waiting.remove(first)
            else:
                del self.waiting[0]
            self._enter(first)

    def _enter(self, sequence: Sequence) -> None:
        place = self._states.enter(
            sequence.request.owner, sequence.tokens, sequence.first_output, self._free
        )
        sequence.slot, sequence.computed = place
        self._free.remove(sequence.slot)
        self.running.append(sequence)
        if not sequence.preempted:
            sequence.cached = min(sequence.computed, sequence.n_prompt)
            sequence.stops = self._states.stops(sequence.n_prompt)

    def _waits(self, sequence: Sequence) -> bool:
        """Take over the start that another has computed, if it is a longer one; whether another is
        about to compute a longer one."""
        for other in self.running:
            n = self._alike(sequence, other)
            if n < sequence.computed + WORTH:
                continue
            if other.computed >= n:
                had, sequence.alike[other] = sequence.computed, 0  # it is tried once
                sequence.computed = self._states.adopt(sequence.slot, other.slot, n)
                if not sequence.preempted:
                    sequence.cached += max(0, sequence.computed - had)
            elif _order(other) < _order(sequence):
                if not self._states.cuts:
                    other.stops.add(n)
                return True
        return False

    def _alike(self, sequence: Sequence, other: Sequence) -> int:
        """How many tokens ``sequence`` may begin with as ``other`` does."""
        if other is sequence or other.request.owner != sequence.request.owner:
            return 0
        if other not in sequence.alike:
            most = min(sequence.first_output, other.n_prompt)
            sequence.alike[other] = common(other.tokens, sequence.tokens, most)
        return sequence.alike[other]

    def _fits(self, sequence: Sequence, beside: list[Sequence]) -> bool:
        if not beside:
            return True  # if it cannot be computed alone, the step will tell
        if len(beside) >= self._n_most:
            return False
        growth = sum(_growth(s) for s in (*beside, sequence))
        used = self._cells_of(beside)
        return used + len(sequence.tokens) + growth <= self.cells

    def check_integrity(self) -> None:
        """Assert that no slot is lost or held twice."""
        held = [s.slot for s in self.running]
        assert sorted([*held, *self._free]) == list(range(self.limits.slots)), "a slot is lost"
        assert all(s.slot == -1 and s.computed == 0 for s in self.waiting)
        assert all(0 <= s.computed <= len(s.tokens) for s in self.running)
        assert len(self.running) <= self.limits.slots


def _order(sequence: Sequence) -> tuple[int, int]:
    return -sequence.priority, sequence.number


def _victim(running: Iterable[Sequence]) -> Sequence:
    return max(running, key=_order)


def _growth(sequence: Sequence) -> int:
    most = sequence.request.max_tokens
    if most is None:
        return _GROWTH
    return max(0, min(_GROWTH, most - (len(sequence.tokens) - sequence.n_prompt)))


def _piece(sequence: Sequence, n: int) -> Piece:
    return Piece(sequence, sequence.computed, n, sequence.n_outputs(n))
