"""Load orders: in which order a layer's missing experts are read and computed."""

from __future__ import annotations

from collections.abc import Sequence


class FirstSeen:
    """As the router named them."""

    def order(self, experts: Sequence[int], counts: Sequence[int]) -> Sequence[int]:
        return range(len(experts))


class Popularity:
    """Most demanded first, so that the longest computation hides the most reads.

    Equal counts, as in the decoding of one sequence, keep the router's order.
    """

    def order(self, experts: Sequence[int], counts: Sequence[int]) -> Sequence[int]:
        return sorted(range(len(experts)), key=counts.__getitem__, reverse=True)
