"""What a policy is: the interfaces between deciding and holding.

A policy decides and never holds: no bytes, no slots, no clock, no randomness without a seed.
The same classes run in the engine and in the simulator, so a replayed trace gives the engine's
own hit count.

Keys are plain integers, ``layer * n_experts + expert``: they are made and compared thousands of
times per token on the route callback, where a tuple costs three times as much.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Inputs = NDArray[np.float32]
Ids = NDArray[np.int16] | NDArray[np.int32]


class Phase(IntEnum):
    """What a step is for; whoever starts it says so.

    Not to be read off the number of tokens: a step that decodes for eight sequences has eight, and
    the last layer of a prompt is often computed for one.
    """

    PREFILL = 0
    DECODE = 1  # one token of each sequence
    MIXED = 2  # some sequences prefill while others decode


class RouteEvent(NamedTuple):
    """What one MoE layer asked for in one step.

    ``experts`` are the distinct experts in first-seen order (for one token: in the router's
    order), ``counts[i]`` how many (token, rank) pairs chose ``experts[i]``. ``phase`` and
    ``n_sequences`` are the step's, ``n_tokens`` is the layer's.
    """

    layer: int
    n_tokens: int
    experts: Sequence[int]
    counts: Sequence[int]
    phase: Phase
    n_sequences: int
    may_compute: bool = False  # of a device's layer: the processor may compute some of them


class CachePolicy(Protocol):
    """Which experts deserve a slot. Owns an order and ghosts, nothing else.

    ``len(policy)`` and ``key in policy`` tell what the policy believes resident; the caller keeps
    that equal to its own slot table through the four calls below.
    """

    def touch(self, key: int, votes: int = 1) -> None:
        """A resident key was demanded again, by so many (token, rank) pairs."""

    def admit(self, key: int, votes: int = 1) -> bool:
        """A missing key was demanded, likewise, and gets a slot.

        Returns whether it may stay after its layer; False means: use once, then drop, and the
        policy does not hold it.
        """

    def remove(self, key: int) -> None:
        """A resident key lost its slot for a reason that was not the policy's (a failed read)."""

    def evict(
        self, pinned: Container[int], incoming: int = -1, demanded: bool = True
    ) -> int | None:
        """Choose, forget and return the victim; None when every resident key is pinned.

        ``incoming`` is the missing key the slot is for, -1 if there is none: ARC evicts from
        another list for a key it remembers, and quotas belong to layers. It is not ``demanded``
        if it is only guessed: nothing is to be learned from that.
        """

    def check_integrity(self) -> None:
        """Assert the policy's own invariants (tests call this; cost does not matter)."""

    def __contains__(self, key: object) -> bool: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[int]: ...


@runtime_checkable
class Ranked(Protocol):
    """A cache policy that can say beforehand whom it would evict."""

    def coldest(self, n: int) -> list[int]:
        """The keys that ``evict`` would return one after the other, pinned ones apart; none for a
        key it needs to know first. Changes nothing."""


class Guess(NamedTuple):
    """A key a later layer may ask for, and the probability that it will."""

    key: int
    confidence: float


class Predictor(Protocol):
    """Which experts a later layer will ask for. Guesses change time, never output.

    One learns from routes, another asks the routers themselves, a third repeats a recording: who
    reads ahead need not know which.
    """

    @property
    def recall(self) -> Mapping[int, float]:
        """By layer: the share of the experts a token used that was guessed first, lately."""

    def observe(self, event: RouteEvent, ids: Callable[[], Ids]) -> None:
        """What a layer really asked for; once per event, before ``guess``.

        ``ids`` gives the experts, [n_tokens, n_used], and ``x`` of ``guess`` the layer's gate
        input, [n_tokens, n_embd], both valid during the call only. They are asked for, since most
        need none and the callback is waited for. A recording keeps no inputs: replayed, n_embd is
        0.
        """

    def guess(self, event: RouteEvent, x: Callable[[], Inputs]) -> Sequence[Guess]:
        """Keys worth reading ahead after ``event``, best first; may be empty."""


class LoadOrder(Protocol):
    """In which order missing experts are read and computed."""

    def order(self, experts: Sequence[int], counts: Sequence[int]) -> Sequence[int]:
        """A permutation of ``range(len(experts))``."""
