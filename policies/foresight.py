"""What a layer will be asked for by many tokens, before it is known.

A prompt asks for nearly every expert of every layer, a step of many sequences for most. So the next
layer's can be copied to a device while one is computed. How many: what the link carries from when
a layer has all it lacked until the next one's demands come. Where that is less than what a layer
asks for, the link is never idle, and a copy made ahead only takes the place of one made on demand;
but one that is made for nothing is made besides.
"""

from __future__ import annotations

from .base import RouteEvent

_DECAY = 0.8  # of what was asked, by event of the layer
LEAST = 0.75  # chance of being asked for
_FALL = 0.9  # of what is copied ahead, after a step that had more in vain than an idle link
_FASTEST, _SLOWEST = 0.8, 1.1  # times what a copy took when it was measured


class Foresight:
    """By layer, the share of (token, rank) pairs that each expert had lately.

    If pairs choose independently, an expert of the share f is among n of them with the chance
    1 - (1 - f)^n.

    From a step's second event to its last the link carries what was copied in this time, but for
    what was under way at the first of them, which is as much as at the last. In the rest of the
    time it is idle. Time is an argument; a copy takes what it took in the busiest step, about
    ``copy_ns``.
    """

    def __init__(self, n_experts: int, copy_ns: float) -> None:
        self.copy_ns = _SLOWEST * copy_ns
        self._least_ns = _FASTEST * copy_ns
        self._even = [1 / n_experts] * n_experts
        self._shares: dict[int, list[float]] = {}
        self._room: dict[int, float] = {}  # copies ahead, by size of a layer's event
        self._size = self._layer = -1  # of the event before
        # Of the step's events: when, how many copies for it, and ahead.
        self._times: list[int] = []
        self._demanded: list[int] = []
        self._ahead: list[int] = []
        self._n_vain = 0  # of the latter

    def observe(self, event: RouteEvent, now_ns: int, n_copies: int, n_vain: int) -> None:
        """An event of more experts than its pool has slots, that so many are copied for now; of
        those copied ahead it did not ask for so many."""
        n = sum(event.counts)
        shares = [_DECAY * share for share in self._shares.get(event.layer, self._even)]
        for expert, count in zip(event.experts, event.counts, strict=True):
            shares[expert] += (1 - _DECAY) * count / n
        self._shares[event.layer] = shares
        size = n.bit_length()
        if event.layer <= self._layer or size != self._size:
            self._end()
            self._times, self._demanded, self._ahead, self._n_vain = [], [], [], 0
        self._layer, self._size = event.layer, size
        self._times.append(now_ns)
        self._demanded.append(n_copies)
        self._n_vain += n_vain
        self._ahead.append(0)

    def _end(self) -> None:
        """A step has ended."""
        ahead = self._ahead[1:-1]
        n = sum(self._demanded[1:-1]) + sum(ahead)
        if not ahead or not n:
            return
        took = self._times[-1] - self._times[1]
        self.copy_ns = min(self.copy_ns, max(self._least_ns, took / n))
        idle = max(0.0, took / self.copy_ns - n)
        each, old = sum(ahead) / len(ahead), self._room.get(self._size)
        if self._n_vain > idle:
            self._room[self._size] = _FALL * each
        elif old is not None:
            self._room[self._size] = max(old, each + (idle - self._n_vain) / len(ahead))

    def room(self) -> int:
        """So many copies after the event observed last keep the link busy until the next one's."""
        room = self._room.get(self._size)
        return 1 << 30 if room is None else 1 + round(room)

    def copied(self, n: int) -> None:
        """So many are, ahead, behind those of the event observed last."""
        self._ahead[-1] = n

    def likely(self, layer: int, n_pairs: int) -> list[int]:
        """The experts that so many pairs will probably ask for, likeliest first."""
        shares = self._shares.get(layer, self._even)
        least = 1 - (1 - LEAST) ** (1 / n_pairs)
        return sorted(
            (e for e, share in enumerate(shares) if share >= least),
            key=shares.__getitem__,
            reverse=True,
        )
