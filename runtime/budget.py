"""The memory budget: what the whole process may use, and how many slots that leaves for experts.

Pure arithmetic over numbers that others measured. The budget covers everything: trunk, KV cache,
compute buffers, Python, slots.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fractions import Fraction
from math import ceil
from typing import NamedTuple

from .columns import columns
from .errors import UserError, option
from .sizes import MB, format_size

# Enough to overlap a few reads with the expert being computed; below it every layer is served
# in turns of one or two experts.
MIN_SLOTS = 4
# What a process grows by between its start and its peak beyond the items counted: allocator
# slack, thread stacks, Python objects of a request. A choice, not a measurement;
# the tests in a cgroup of exactly the budget hold with it.
MARGIN_BYTES = 32 * MB


class Needs(NamedTuple):
    """Bytes a process needs besides its expert slots."""

    trunk: int
    kv: int
    compute: int  # llama.cpp's graph buffers and the executor's own
    process: int  # Python, libraries, vocabulary, margin
    rows: int = 0  # the cache of rows of tables on disk
    states: int = 0  # copies of sequences that have left the KV cache
    beside: int = 0  # child processes

    @property
    def total(self) -> int:
        return sum(self)

    def with_slots(self, n_slots: int, slot_bytes: int) -> int:
        """The budget that leaves room for this many slots."""
        return self.total + n_slots * slot_bytes


class Budget(NamedTuple):
    """A budget that works: what each part takes, and the slots that fit."""

    total: int
    needs: Needs
    slot_bytes: int
    n_slots: int
    n_all: int  # slots that would hold every expert of the model
    working_set: int  # experts one token asks for over all layers

    @property
    def experts(self) -> int:
        """Bytes of the arena."""
        return self.n_slots * self.slot_bytes

    @property
    def resident_share(self) -> float:
        return self.n_slots / self.n_all

    def rows(self) -> list[tuple[str, int, str]]:
        """(name, bytes, remark) of every item of the table."""
        share = f"{self.n_slots} of {self.n_all} slots, {self.resident_share:.0%} of the experts"
        return [
            ("trunk", self.needs.trunk, "every weight that is not a routed expert"),
            *([("rows", self.needs.rows, "of tables on disk")] if self.needs.rows else []),
            ("KV cache", self.needs.kv, ""),
            *([("states", self.needs.states, "of past sequences")] if self.needs.states else []),
            ("compute", self.needs.compute, "graph and work buffers"),
            *([("beside", self.needs.beside, "child processes")] if self.needs.beside else []),
            ("process", self.needs.process, "Python, libraries, vocabulary, margin"),
            ("experts", self.experts, share),
            ("total", self.needs.total + self.experts, f"of {format_size(self.total)}"),
        ]

    def table(self) -> str:
        rows = [(name, format_size(n_bytes), remark) for name, n_bytes, remark in self.rows()]
        return "\n".join(f"  {line}" for line in columns(rows, "<><"))

    def warning(self) -> str | None:
        """One sentence, its options unspelled, when the arena is below one token's working set."""
        if self.n_slots >= self.working_set:
            return None
        enough = self.needs.with_slots(self.working_set, self.slot_bytes)
        return (
            f"{self.n_slots} slots are fewer than the {self.working_set} experts one token uses: "
            f"with {option('policy', 'lru')} nearly all of them are read again for every token, "
            f"fate and lfu keep some; {format_size(enough)} would hold all"
        )


def min_slots(n_all: int) -> int:
    """The fewest slots a model runs with."""
    return min(MIN_SLOTS, n_all)


def smallest(needs: Needs, slot_bytes: int, n_all: int) -> int:
    """The budget to name as the smallest that works.

    In whole MB, and one more than computed: a process measures 300 KB more or less from run to run,
    and a refusal must not be followed by another.
    """
    return (-(-needs.with_slots(min_slots(n_all), slot_bytes) // MB) + 1) * MB


def fit(total: int, needs: Needs, slot_bytes: int, n_all: int, working_set: int) -> Budget:
    """Divide ``total`` bytes; raises UserError naming the smallest budget that works."""
    n_slots = min(n_all, (total - needs.total) // slot_bytes)
    floor = min_slots(n_all)
    if n_slots < floor:
        beside = f"child processes {format_size(needs.beside)}, " if needs.beside else ""
        raise UserError(
            f"{format_size(total)} of memory is too little for this model: the smallest budget "
            f"that works is {smallest(needs, slot_bytes, n_all) // MB}MB "
            f"(trunk {format_size(needs.trunk)}, KV cache {format_size(needs.kv)}, "
            f"compute {format_size(needs.compute)}, process {format_size(needs.process)}, {beside}"
            f"{floor} slots of {format_size(slot_bytes)}); a smaller {option('n_ctx')} also helps"
        )
    return Budget(total, needs, slot_bytes, n_slots, n_all, working_set)


# --- a device's memory --------------------------------------------------------------------------

# Of a device's free memory auto leaves this to what kernels and the driver allocate as they go.
DEVICE_HEADROOM_BYTES = 512 * MB
DEVICE_HEADROOM = 0.02


# Windows may take one part in so many of what is left for experts.
WINDOW_SHARE = 4
# Of a layer's experts on a device, below which its pool does not fall while other layers are whole.
POOL_SHARE = Fraction(2, 5)


class DeviceNeeds(NamedTuple):
    """Bytes a device needs besides its pools."""

    trunk: int = 0
    kv: int = 0
    compute: int = 0

    @property
    def total(self) -> int:
        return sum(self)


NOTHING = DeviceNeeds()


class DeviceBudget(NamedTuple):
    """A division of a device's memory that works. The mappings are by layer."""

    total: int
    needs: DeviceNeeds
    n_slots: Mapping[int, int]
    expert_bytes: Mapping[int, int]
    n_experts: int
    window: int = 0  # bytes, for all experts of one layer at a time
    n_windows: int = 0  # with two the next layer's come while one is computed

    @property
    def experts(self) -> int:
        """Bytes of all pools."""
        return sum(n * self.expert_bytes[layer] for layer, n in self.n_slots.items())

    @property
    def resident_share(self) -> float:
        """Of the experts of its layers."""
        return sum(self.n_slots.values()) / (self.n_experts * max(1, len(self.n_slots)))

    @property
    def n_whole(self) -> int:
        """Layers with all their experts there."""
        return sum(n >= self.n_experts for n in self.n_slots.values())

    def rows(self) -> list[tuple[str, int, str]]:
        """(name, bytes, remark) of every item of the table."""
        n, n_all = sum(self.n_slots.values()), self.n_experts * len(self.n_slots)
        share = f"{n} of {n_all} slots, {self.resident_share:.0%} of the experts"
        if 0 < self.n_whole < len(self.n_slots):
            share += f", all of them in {self.n_whole} of {len(self.n_slots)} layers"
        return [
            ("trunk", self.needs.trunk, ""),
            ("KV cache", self.needs.kv, ""),
            ("compute", self.needs.compute, "graph buffers"),
            *([("windows", self.windows, self._use())] if self.n_windows else []),
            ("experts", self.experts, share),
            (
                "total",
                self.needs.total + self.windows + self.experts,
                f"of {format_size(self.total)}",
            ),
        ]

    @property
    def windows(self) -> int:
        """Bytes of all of them."""
        return self.n_windows * self.window

    def _use(self) -> str:
        next_one = ", the next one meanwhile" if self.n_windows > 1 else ""
        return f"for prompts, a layer at a time{next_one}"


def device_auto(free: int) -> int:
    """What ``auto`` takes of so many bytes that are free on a device."""
    return max(0, free - max(DEVICE_HEADROOM_BYTES, int(free * DEVICE_HEADROOM)))


def fit_pools(
    total: int, needs: DeviceNeeds, expert_bytes: Mapping[int, int], n_experts: int, n_used: int
) -> DeviceBudget:
    """Divide a device's memory among its layers: two windows first, where they leave most of it, or
    one, and ``pool_slots`` of the rest. UserError naming the smallest ``total`` that works."""
    room = total - needs.total
    window = max(expert_bytes.values(), default=0) * n_experts

    every = sum(expert_bytes.values())
    least = needs.total + n_used * every
    if total < least:
        raise UserError(
            f"{format_size(total)} of device memory is too little for this model: the smallest "
            f"that works is {-(-least // MB) + 1}MB (trunk {format_size(needs.trunk)}, KV cache "
            f"{format_size(needs.kv)}, compute {format_size(needs.compute)}, {n_used} experts of "
            f"each layer); a smaller {option('n_ctx')} or fewer {option('gpu_layers')} also help"
        )
    n_windows = 0 if n_experts * every <= room else min(2, room // max(1, window * WINDOW_SHARE))
    n_slots = pool_slots(room - n_windows * window, expert_bytes, n_experts, n_used)
    return DeviceBudget(total, needs, n_slots, expert_bytes, n_experts, window, n_windows)


def pool_slots(
    room: int, expert_bytes: Mapping[int, int], n_experts: int, n_used: int
) -> dict[int, int]:
    """Slots by layer in so many bytes, which must do for ``n_used`` in each.

    A layer with all its experts is not asked for: no wait, no plan, no copy, and the link works for
    the next one that is. So what there is beyond ``POOL_SHARE`` of every layer's experts makes as
    many layers whole as it can, evenly among the others. Two with all of them and one with 2/5 wait
    once where three with 4/5 wait three times, and lack about as much: what a slot more saves falls
    fast up to there, and hardly beyond (LOG.md). The layers that are not whole have the same
    number, the first ones perhaps one more.
    """
    layers = list(expert_bytes)
    least = max(n_used, ceil(n_experts * POOL_SHARE))

    def taken(asked: Collection[int], n: int) -> int:
        slots = ((n if layer in asked else n_experts, layer) for layer in layers)
        return sum(k * expert_bytes[layer] for k, layer in slots)

    # The last ones of equal parts: the first layers are whole, of which nothing tells beforehand.
    spread = [
        {layers[(i + 1) * len(layers) // n - 1] for i in range(n)} for n in range(len(layers) + 1)
    ]
    asked = next((a for a in spread if taken(a, least) <= room), spread[-1])
    n = max((k for k in range(n_used, n_experts + 1) if taken(asked, k) <= room), default=n_used)
    n_slots = {layer: n if layer in asked else n_experts for layer in layers}
    left = room - taken(asked, n)
    for layer in layers:
        if n_slots[layer] < n_experts and expert_bytes[layer] <= left:
            n_slots[layer] += 1
            left -= expert_bytes[layer]
    return n_slots
