"""How long a step takes: with so many slots, on a disk of this speed.

The model is two clocks. Computing takes what it took when it was measured; reading takes the bytes
that a group of this size misses in slots of this share, over the disk's speed. Of the computing a
measured share hides reads (the next layer's are under way while this one computes); the rest of the
reads is waited for. Knows no memory and no schedule.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from ..formats.ggml_types import pad_up
from .curves import Curves, Points, at, level, log

# From so many rows on ggml-cpu's attention takes them in tiles of as many, and leaves out a stretch
# of cells only if none of a tile's rows sees it. Rows of many sequences see all, so that each pays
# for the cells of all others; one row less, and they are passed over (ggml-cpu/ops.cpp).
TILE = 64


class StepTime(NamedTuple):
    """Seconds of one step. ``read_s`` is what the disk is busy, behind ``compute_s`` and then
    alone, for ``stall_s``."""

    compute_s: float
    read_s: float
    stall_s: float
    read_bytes: float

    @property
    def seconds(self) -> float:
        return self.compute_s + self.stall_s


@dataclass(frozen=True, eq=False)
class Costs:
    """``share`` of all experts have a slot; ``faster`` is a processor of so many times the speed,
    ``disk_faster`` such a disk.

    More slots, a faster disk and a faster processor never make a step longer.
    """

    curves: Curves
    share: float
    disk_bytes_per_s: float
    direct: bool = True
    faster: float = 1.0
    disk_faster: float = 1.0

    def decode(self, rows: int, cells: float = 0.0, sequences: int = 0) -> StepTime:
        """A token of each of ``rows`` sequences, of ``sequences`` in memory if those are more, that
        hold ``cells`` tokens each."""
        held = max(rows, sequences) * cells
        own = at(self.curves.decode_s, rows) + self._attention_s(rows, cells, held, rows)
        return self._step(own, rows)

    def prompt(
        self, rows: int, beside: int = 0, cells: float = 0.0, sequences: int = 0
    ) -> StepTime:
        """A chunk of prompts, and a token of each of ``beside`` sequences with it."""
        held = max(beside, sequences) * cells
        own = at(self.curves.prompt_s, rows)
        if beside:
            own += at(self.curves.decode_s, beside) - at(self.curves.decode_s, 1)
            own += self._attention_s(beside, cells, held, rows + beside)
        return self._step(own, rows + beside)

    def switch_s(self, group: int) -> float:
        """What the first tokens after another group's turn cost more."""
        extra = min(group * self.curves.switch(self.share), self.distinct(group))
        extra = min(extra, self.distinct(group) - self.reads(group))
        return max(0.0, extra) * self.curves.shape.expert_bytes / self._speed(group)

    def expert_s(self, rows: int) -> float:
        """Of a step of decoding: the processor at work on experts."""
        return at(self.curves.expert_s, rows) / self.faster

    def distinct(self, rows: float) -> float:
        """Experts of one layer that a step of so many rows needs."""
        return self.curves.distinct(rows)

    def reads(self, rows: float) -> float:
        """Of them, those that are not there and must be read."""
        return level(self._missing, log(rows)) * self.distinct(rows)

    @cached_property
    def _missing(self) -> Points:
        return self.curves.missing(self.share)

    def _attention_s(self, rows: int, cells: float, held: float, of_step: int) -> float:
        """Going through the cells of each row as a row goes through weights: once; and over those
        that others hold."""
        shape, measured = self.curves.shape, self.curves.measured
        own = rows * cells * shape.cell_bytes / measured.trunk_bytes_per_s
        if of_step < TILE:
            return own + rows * (held - cells) * shape.masked_s
        return own + pad_up(rows, TILE) * (held - cells) * shape.tiled_s

    def _step(self, own_s: float, rows: int) -> StepTime:
        n_bytes = self.reads(rows) * self.curves.shape.expert_bytes
        compute = (own_s + n_bytes * self.curves.measured.read_cost_s) / self.faster
        read = n_bytes / self._speed(rows)
        stall = max(0.0, read - self.curves.hidden(rows) * compute)
        return StepTime(compute, read, stall, n_bytes)

    def _speed(self, rows: float) -> float:
        now, seen = self.disk_bytes_per_s, self.curves.speed_of(rows)
        if seen is not None:
            # Beside computing, of which the disk's probe knows nothing. Buffered reads come from
            # the page cache or the disk, and no probe knows which.
            now = min(now, seen) if self.direct else seen
        return self.disk_faster * now
