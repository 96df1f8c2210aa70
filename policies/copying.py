"""Which guesses are copied to a device before they are asked for.

What a pool lacks is copied when it is demanded, and the device waits. Copies made ahead take the
link while the device computes; but the link serves in order, so that one too many delays what is
demanded next. Time is an argument; what copying takes is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Protocol

from .base import Phase, RouteEvent
from .pace import VICTIM_VALUE

_DECAY = 0.8  # of the running means, by layer: about five tokens
_ROOM = 0.9  # of what was found: what turns out not to fit is tried less and less
_STEPS = 12  # of a trial with, and as many without
_TURN, _SETTLING = 6, 2  # steps of a turn, and those at its start that do not count
_LASTS = 32  # times as long as a trial its outcome counts
_LEARNING = 48  # steps before the first: how far guesses are to be trusted is learned from them


class Copying(Protocol):
    """Chooses among guesses that are in memory and not on the device."""

    def event(self, event: RouteEvent, now_ns: int, since_ns: int, n_missing: int) -> bool:
        """An event arrived, of whose experts the device lacked so many; whether to copy ahead.

        ``since_ns`` is how long ago copies after the event before could begin.
        """

    def chances(self, layer: int, most: int) -> Sequence[float]:
        """After an event of that layer the k-th guess, of one layer and best first, is copied if
        it is likelier than the k-th of these, and so were those before it."""


class Trial:
    """Whether something pays: some steps with it and some without in turn, and for a while what
    took less. In turn, because steps become shorter by themselves while pools fill; several,
    because a device records its launches anew when they change. Before the first trial it is on for
    ``learned`` steps."""

    def __init__(self, steps: int = _STEPS, lasts: int = _LASTS, learned: int = _LEARNING) -> None:
        self.is_on = True
        self._steps, self._lasts = steps, lasts
        self._times: dict[bool, list[int]] = {True: [], False: []}
        self._turn = 0  # steps of the present one
        self._learning = learned
        self._left = 0  # of what was decided

    def step(self, ns: int) -> None:
        """One took so long, as ``is_on`` said."""
        if self._learning:
            self._learning -= 1
            return
        if self._left:
            self._left -= 1
            self.is_on = self.is_on or not self._left
            return
        self._turn += 1
        if self._turn > _SETTLING:
            self._times[self.is_on].append(ns)
        if self._turn < _TURN:
            return
        self._turn, self.is_on = 0, not self.is_on
        if self.is_on and len(self._times[False]) >= self._steps:
            # The medians: between two steps a caller may think.
            took = {on: median(times) for on, times in self._times.items()}
            self.again()
            self.is_on, self._left = took[True] < took[False], self._steps * self._lasts

    def again(self) -> None:
        """Steps will take another time from now on."""
        self.is_on, self._left, self._turn = True, 0, 0
        self._times = {True: [], False: []}


class IdleLink:
    """Copies into the time in which the link would be idle, as long as that makes steps shorter.

    After an event the link copies what the event lacked; what is left until the next one of the
    time from when guesses are there is room. In it a guess of chance p saves a copy; beyond it a
    wrong one delays a demand by as much, and any wrong one takes the slot of what is evicted next.
    An expert takes ``copy_ns``.

    Whether all this pays, guessing included, a trial says, so that it never costs more than that.
    """

    def __init__(self, copy_ns: float) -> None:
        self.copy_ns = copy_ns
        self.trial = Trial()
        self._room: dict[int, float] = {}  # by layer of the event
        self._layer, self._then, self._n_missing = -1, 0, 0  # of the event before
        self._began: int | None = None  # the step, if it is one of decoding
        self._n_sequences = 0

    def event(self, event: RouteEvent, now_ns: int, since_ns: int, n_missing: int) -> bool:
        if event.layer <= self._layer:
            self._begin(event, now_ns)
        elif self._layer >= 0:
            idle = now_ns - self._then - self._n_missing * self.copy_ns
            room = max(0.0, min(since_ns, idle))
            mean = self._room.get(self._layer, room)
            self._room[self._layer] = mean + (1 - _DECAY) * (room - mean)
        self._layer, self._then, self._n_missing = event.layer, now_ns, n_missing
        return event.phase == Phase.DECODE and self.trial.is_on

    def _begin(self, event: RouteEvent, now_ns: int) -> None:
        """A step begins."""
        if event.n_sequences != self._n_sequences:
            self.trial.again()
        elif self._began is not None and event.phase == Phase.DECODE:
            self.trial.step(now_ns - self._began)
        self._began = now_ns if event.phase == Phase.DECODE else None
        self._n_sequences = event.n_sequences

    def chances(self, layer: int, most: int) -> Sequence[float]:
        each, room = self.copy_ns, _ROOM * self._room.get(layer, 0.0)
        chances: list[float] = []
        while room > 0 and len(chances) < most:
            saved = min(each, room)
            cost = each - saved + VICTIM_VALUE * each
            chances.append(cost / (cost + saved))
            room -= each
        return chances
