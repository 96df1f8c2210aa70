"""The slots of a loaded model, who decides about them, and starting warm.

Owns the controller, the callbacks and the native gates of one model. Knows budgets and policies by
their values; does not know how the model was found, nor who computes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import psutil

from ..policies.base import CachePolicy, Phase, Predictor
from ..policies.coexecution import Measured
from ..policies.copying import IdleLink
from ..policies.foresight import Foresight
from ..policies.layered import Layered, hottest
from ..policies.precision import MixedResidency
from ..policies.predict import Gates, GatesMaker
from ..policies.presets import Facts, Policy, PolicyMaker, policy
from ..policies.residency import Residency
from ..policies.tiers import Tiers
from . import mode_line
from .ahead import Ahead
from .budget import Budget, DeviceBudget, min_slots
from .controller import Controller, Demands, Guessing, Recorder
from .formats.layout import ModelLayout, PlacedTensor
from .opening import Found, Loaded
from .plugin.abi import GUESS_CHUNK_BYTES, MAX_GUESSES
from .plugin.callbacks import Callbacks
from .plugin.gates import NativeGates, PluginGates, Router
from .plugin.model import PluginModel
from .progress import Report
from .routers import read_routers

RouterReader = Callable[[ModelLayout, PluginModel], Mapping[int, Router]]

# Slots are filled at the start in steps of this size: Ctrl-C waits for one, and between two the
# lanes idle for about a read.
_FILL_BYTES = 64 << 20
# What the speed of the link to a device is measured by.
_LINK_BYTES = 32 << 20


class Arena:
    """The slots of one model, ready to compute with. Made by ``start``."""

    def __init__(
        self,
        found: Found,
        budget: Budget,
        plugin: PluginModel,
        controller: Controller,
        gates: NativeGates | None,
        is_blind: bool,
        tables: Sequence[PlacedTensor],
        pools: DeviceBudget | None = None,
    ) -> None:
        self.found = found
        self.budget = budget
        self.pools = pools  # a device's, if there is one
        self.tables = tables  # that are on disk
        # Whoever calls llama_decode tells it the tokens first, so that their rows are on their way.
        self.ahead = Ahead(found.layout, tables, plugin.fetch_rows) if tables else None
        self.plugin = plugin
        self.controller = controller
        self.gates = gates
        self.is_blind = is_blind  # the policy would guess, but this model's routers are not known
        # Of an expert to a device's pool, by whether its matrices go in one call where they can.
        self.copy_ns: dict[bool, float] = {}
        self.n_warmed: int | None = None  # slots filled at the start; None without statistics
        self.callbacks = Callbacks(plugin, controller, found.layout.n_experts)

    @property
    def residency(self) -> Residency:
        return self.controller.residency

    # -- around steps

    def say(self, phase: Phase, n_sequences: int) -> None:
        """What the next step is; whoever calls llama_decode says it first."""
        self.plugin.step(phase, n_sequences)

    def recover(self) -> BaseException:
        """After a failed step: make the table true again and return the reason of the failure."""
        self._reconcile()
        return self.callbacks.failure()

    def _reconcile(self) -> None:
        """Make the tables true, once they have heard of all that passed."""
        self.callbacks.flush()
        self.callbacks.withdraw()
        self.residency.reconcile(self.plugin.slot_keys())
        if isinstance(self.residency, Tiers):
            for layer in self.residency.pools:
                self.residency.reconcile_pool(layer, self.plugin.pool_keys(layer))

    def interrupt(self, error: Exception) -> None:
        """From any thread: every step fails with this from now on, the running one included."""
        self.callbacks.stop = error

    def cancel_guesses(self) -> None:
        """Drop every guess that no lane has started; only between steps."""
        self.callbacks.flush()
        self.plugin.cancel_guesses()
        self.residency.reconcile(self.plugin.slot_keys())

    # -- filling

    def fill(self, keys: Iterable[int], progress: Report | None = None) -> int:
        """Read experts into free slots, in the order of the file; how many. Only between steps."""
        residency, slot_bytes = self.residency, self.found.slots.slot_bytes
        placed = residency.fill(keys)
        at_once = max(1, _FILL_BYTES // slot_bytes)
        trunk_bytes = self.budget.needs.trunk
        try:
            for i in range(0, len(placed), at_once):
                step = placed[i : i + at_once]
                self.plugin.fill(step)
                if progress is not None:
                    done = (i + len(step)) * slot_bytes
                    progress(trunk_bytes + done, trunk_bytes + len(placed) * slot_bytes)
        except BaseException:
            residency.reconcile(self.plugin.slot_keys())
            raise
        return len(placed)

    def fill_pools(self) -> None:
        """Bring every expert of the layers that have room for all to the device, by way of slots
        whose experts are forgotten. Before the first step."""
        assert isinstance(self.residency, Tiers)
        n_experts, n_slots = self.residency.n_experts, self.budget.n_slots
        at_once = min(n_slots, max(1, _FILL_BYTES // self.found.slots.slot_bytes))
        for layer in sorted(self.residency.whole):
            for first in range(0, n_experts, at_once):
                experts = range(first, min(n_experts, first + at_once))
                keys = [layer * n_experts + expert for expert in experts]
                self.plugin.fill(list(zip(keys, range(n_slots), strict=False)))
                self.plugin.upload(list(zip(range(n_slots), experts, strict=False)))

    def use_link(self, divide: bool) -> None:
        """Measure the link to the device: whether it is faster with an expert's matrices in one
        call, and for who decides by its speed: which missing experts the processor computes, if
        they are to be divided, or else which guesses are copied ahead.

        With slots whose experts are forgotten; before the first step.
        """
        residency, pools = self.residency, self.pools
        if not isinstance(residency, Tiers) or not residency.pools or pools is None:
            return
        layer = next(iter(residency.pools))
        n_bytes = pools.expert_bytes[layer]
        n = min(residency.n_experts, residency.n_slots, 1 + _LINK_BYTES // n_bytes)
        first = layer * residency.n_experts
        self.plugin.fill([(first + i, i) for i in range(n)])
        for joined in (False, True):
            self.plugin.join_copies(joined)
            self.copy_ns[joined] = self.plugin.copy_ns(layer, n) / n
        self.plugin.join_copies(self.copy_ns[True] < self.copy_ns[False])
        ns = min(self.copy_ns.values())
        if pools.n_windows > 1:
            residency.foresight = Foresight(residency.n_experts, ns)
        if divide:
            residency.dividing = Measured(ns / n_bytes, pools.expert_bytes)
            self.plugin.compute_on_cpu()
        elif self.controller.guessing is not None:
            residency.copying = IdleLink(ns)

    # -- what is known of it

    def demands(self) -> Demands:
        """The counts of demands since the model was opened, those that settled included."""
        self.callbacks.flush()
        asked = self.controller.demands()
        settled, pairs = self.callbacks.settled(self.controller.layers)
        hits = {n: asked.hits.get(n, 0) + settled.get(n, 0) for n in asked.hits.keys() | settled}
        return asked._replace(hits=hits, pairs=asked.pairs + pairs)

    def recall(self) -> dict[int, float]:
        """By layer: how many of the experts a token used were among its best guesses, lately."""
        guessing = self.controller.guessing
        return dict(guessing.predictor.recall) if guessing else {}

    def gate_recall(self) -> dict[int, float]:
        """``recall`` if the guesses were a router's: what a policy may be told of them later."""
        return self.gates.recall if self.gates is not None else {}

    def low_bytes(self, low_loads: Mapping[int, int]) -> int:
        """Bytes of so many low copies by layer."""
        layers = self.found.layout.layers
        return sum(
            low_loads[layer.layer] * layer.copies[1].n_bytes
            for layer in layers
            if layer.layer in low_loads
        )

    def mode_line(self) -> str:
        """The one line that says what is in force."""
        return mode_line.mode_line(
            self.found,
            self.budget,
            self.tables,
            self.is_blind,
            self.pools,
            self.plugin.is_pinned,
        )

    def warm_line(self) -> str:
        """What came of starting warm."""
        return mode_line.warm_line(self.found, self.budget, self.n_warmed)

    def close(self) -> None:
        """Only after the plugin's model is closed, which uses the gates."""
        if self.gates is not None:
            self.gates.close()


def start(
    loaded: Loaded,
    *,
    make_policy: PolicyMaker | None = None,
    budget: Budget | None = None,
    pools: DeviceBudget | None = None,
    routers: RouterReader = read_routers,
    recorder: Recorder | None = None,
    progress: Report | None = None,
) -> Arena:
    """Allocate the slots, bind the controller and start warm.

    Called when trunk, KV cache and context exist: what they really took decides over the number of
    slots, unless a ``budget`` was divided elsewhere. Without ``make_policy``, the one the options
    name.
    """
    measured, plugin = loaded.measured, loaded.binding.plugin
    found = measured.found
    if pools is None:
        pools = measured.divide_rest()
    if budget is None:
        budget = measured.with_process(int(psutil.Process().memory_info().rss)).divide()
    if pools is not None:
        budget = _below(budget, found, pools)
        by_layer = (pools.n_slots.get(n, 0) for n in range(found.layout.layers[-1].layer + 1))
        plugin.allocate_pools(list(by_layer), pools.n_windows)
    plugin.allocate(budget.n_slots)
    n_experts, stored = found.layout.n_experts, _stored(found, pools)
    gates = _GatesMaker(found, plugin, routers, stored)
    facts = replace(_facts(found, budget.n_slots, gates), stored=stored)
    chosen = (make_policy or _named(found.options.policy))(facts)
    guessing = None
    if chosen.predictor is not None:
        blob_bytes = {layer.layer: layer.blob_bytes for layer in found.layout.layers}
        is_native = isinstance(chosen.predictor, PluginGates)
        guessing = Guessing(chosen.predictor, chosen.pace, blob_bytes, MAX_GUESSES, is_native)
    layers = [layer.layer for layer in found.layout.layers]
    residency = _residency(found, budget.n_slots, chosen)
    if pools is not None and pools.n_slots:
        pool_caches = _PoolCaches(facts, make_policy or _named(found.options.policy))
        residency = Tiers(
            budget.n_slots,
            n_experts,
            chosen.cache,
            chosen.order,
            pools.n_slots,
            pool_caches,
            chosen.scan,
        )
    controller = Controller(residency, layers, recorder, guessing)
    # The statistics may be large and have told the policy what they know.
    small = replace(found, statistics=None)
    arena = Arena(
        small, budget, plugin, controller, gates.made, gates.is_blind, measured.tables, pools
    )
    if isinstance(residency, Tiers):
        arena.fill_pools()
        arena.use_link(found.options.cpu_experts == "auto")
    if found.statistics is not None:
        # What is worth most is admitted last.
        uses = found.statistics.uses()
        stored_uses = {key: n for key, n in uses.items() if key // n_experts in stored}
        keys = hottest(stored_uses, budget.n_slots, chosen.cache)[::-1]
        arena.n_warmed = arena.fill(keys, progress)
    return arena


def _stored(found: Found, pools: DeviceBudget | None) -> list[int]:
    """The layers that memory holds experts of: those that are not wholly on the device."""
    on_device = pools.n_slots if pools is not None else {}
    layers = [layer.layer for layer in found.layout.layers]
    return [n for n in layers if on_device.get(n, 0) < found.layout.n_experts]


def _below(budget: Budget, found: Found, pools: DeviceBudget) -> Budget:
    """No more slots in memory than experts of layers that are not wholly on the device, and those
    to fill it through."""
    staging = max(min_slots(found.n_all), _FILL_BYTES // budget.slot_bytes)
    n_stored = len(_stored(found, pools)) * found.layout.n_experts
    return budget._replace(n_slots=min(budget.n_slots, max(staging, n_stored)))


class _PoolCaches:
    """A fresh cache of the same policy for each layer's pool."""

    def __init__(self, facts: Facts, make_policy: PolicyMaker) -> None:
        self._facts = facts
        self._make_policy = make_policy

    def __call__(self, layer: int, n_slots: int) -> CachePolicy:
        facts = replace(
            self._facts,
            n_slots=n_slots,
            layers=[layer],
            stored=(),
            popularity=self._facts.history(layer),
            transitions=lambda: None,
            gates=lambda how: None,
        )
        cache = self._make_policy(facts).cache
        # Alone it needs no quota, and can say whom it evicts.
        return cache.caches[layer] if isinstance(cache, Layered) else cache


class _GatesMaker:
    """Makes the predictor that asks a model's routers, if its policy wants one: those of the layers
    that memory holds experts of, each guessed for from the one before among them."""

    def __init__(
        self, found: Found, plugin: PluginModel, routers: RouterReader, stored: Collection[int]
    ) -> None:
        self._found = found
        self._plugin = plugin
        self._routers = routers
        self._stored = stored
        self.made: NativeGates | None = None
        self.is_blind = False  # one was wanted, but this model's routers are not known

    def __call__(self, how: Gates) -> Predictor | None:
        known = self._routers(self._found.layout, self._plugin)
        self.is_blind = not known
        routers = {layer: router for layer, router in known.items() if layer in self._stored}
        if not routers:
            return None
        self.made = NativeGates(routers, self._found.n_used, how)
        return PluginGates(self.made, self._plugin)


def _named(name: str) -> PolicyMaker:
    return lambda facts: policy(name, facts)


def _facts(found: Found, n_slots: int, gates: GatesMaker) -> Facts:
    layers = [layer.layer for layer in found.layout.layers]
    facts = Facts(
        n_slots,
        found.layout.n_experts,
        found.n_used,
        layers,
        buffered=not found.mode.direct,
        chunk_bytes=GUESS_CHUNK_BYTES,
        gates=gates,
    )
    if found.statistics is None:
        return facts
    return replace(
        facts,
        recall=found.statistics.recalls(),
        popularity=found.statistics.uses(),
        transitions=found.statistics.follows,
    )


def _residency(found: Found, n_slots: int, chosen: Policy) -> Residency:
    n_experts = found.layout.n_experts
    if not found.precision.lossy:
        return Residency(n_slots, n_experts, chosen.cache, chosen.order, chosen.scan)
    first_low_key = (found.layout.layers[-1].layer + 1) * n_experts
    return MixedResidency(
        n_slots,
        n_experts,
        chosen.cache,
        chosen.order,
        found.precision,
        first_low_key,
        chosen.scan,
    )
