"""Tiny models opened at llama.cpp's low level, stock and ours, for comparing them bit for bit.

Ours is everything the runtime does except dividing the budget: the number of slots is the test's
choice, because a tiny model fits into any budget that also holds Python.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import llama_cpp._logger
import numpy as np
import pytest
from conftest import missing

from moe_gguf.policies.base import (
    CachePolicy,
    Guess,
    Ids,
    Inputs,
    LoadOrder,
    Phase,
    Predictor,
    RouteEvent,
)
from moe_gguf.policies.cache import LRU
from moe_gguf.policies.pace import Everything, Pace
from moe_gguf.policies.precision import MixedResidency
from moe_gguf.policies.presets import PolicyMaker, policy
from moe_gguf.policies.tiers import Tiers
from moe_gguf.runtime import logs, opening
from moe_gguf.runtime.arena import Arena, RouterReader, start
from moe_gguf.runtime.binding import BuftOverride
from moe_gguf.runtime.budget import Budget, DeviceBudget, DeviceNeeds, Needs
from moe_gguf.runtime.controller import Recorder
from moe_gguf.runtime.engine import context as contexts
from moe_gguf.runtime.engine.context import Logits, Row
from moe_gguf.runtime.opening import Measured
from moe_gguf.runtime.options import Options
from moe_gguf.runtime.placement import expert_bytes
from moe_gguf.runtime.plugin.abi import Stats
from moe_gguf.runtime.plugin.devices import address
from moe_gguf.runtime.routers import read_routers
from moe_gguf.runtime.sizes import GB
from moe_gguf.runtime.stats import Meter

llama_cpp._logger.set_verbose(False)


def rows(tokens: Sequence[int], pos: int = 0, seq: int = 0) -> list[Row]:
    return [Row(token, pos + i, seq) for i, token in enumerate(tokens)]


def random_tokens(n: int, seed: int = 1) -> list[int]:
    return [random.Random(seed * 1000 + i).randrange(256) for i in range(n)]


class Context(contexts.Context):
    """A Context with what tests want by default; the phase, left out, is that of the shape."""

    def __init__(self, model: int, arena: Arena | None, meter: Meter | None, **params: Any) -> None:
        values = llama_cpp.llama_context_default_params()
        settings = {
            "n_ctx": 512,
            "n_batch": 512,
            "n_ubatch": 512,
            "n_threads": 1,
            "n_threads_batch": 1,
            "flash_attn_type": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
        } | params
        for name, value in settings.items():
            setattr(values, name, value)
        self._keep = settings  # callbacks among them must outlive the context
        super().__init__(model, values, arena, meter)

    def decode(self, batch: Sequence[Row], phase: Phase | None = None) -> Logits:
        if phase is None:
            one_each = len({row.seq for row in batch}) == len(batch)
            phase = Phase.DECODE if one_each else Phase.PREFILL
        return super().decode(batch, phase)


class Model:
    """What stock and ours have in common: contexts, closed with the model."""

    arena: Arena | None = None
    meter: Meter | None = None

    def __init__(self, model: int) -> None:
        self.model = model
        self._contexts: list[Context] = []

    def context(self, **params: Any) -> Context:
        context = Context(self.model, self.arena, self.meter, **params)
        self._contexts.append(context)
        return context

    def close(self) -> None:
        for context in self._contexts:
            context.close()
        llama_cpp.llama_model_free(self.model)


class Stock(Model):
    """llama.cpp alone, the whole model in memory; ``repack``: in the layout its kernels like best.

    That crashes stock llama.cpp where the processor has AMX.
    """

    def __init__(
        self,
        path: Path,
        repack: bool = False,
        device: str | None = None,
        experts_on_cpu: bool = False,
    ) -> None:
        if repack and " amx_tile" in Path("/proc/cpuinfo").read_text():
            missing("stock llama.cpp crashes in its AMX kernels when it repacks on this processor")
        params = llama_cpp.llama_model_default_params()
        params.use_extra_bufts = repack
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        devices = (ctypes.c_void_p * 2)()
        if device is not None:
            devices[0] = address(device)
            params.n_gpu_layers = 999
        params.devices = ctypes.cast(devices, ctypes.c_void_p).value
        if experts_on_cpu:
            library = llama_cpp.llama_cpp._lib
            library.ggml_backend_cpu_buffer_type.restype = ctypes.c_void_p
            cpu = library.ggml_backend_cpu_buffer_type()
            overrides = (BuftOverride * 2)(BuftOverride(b"exps", cpu), BuftOverride(None, None))
            params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p).value
        with logs.capture() as log:
            model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert model, log.reason()
        super().__init__(model)


def fixed(measured: Measured, n_slots: int | None) -> Budget:
    """A budget of so many slots, whatever they need; None: one for every expert."""
    found, needs = measured.found, measured.needs
    slot_bytes = found.slots.slot_bytes
    n_slots = n_slots or found.n_all
    total = max(found.total, needs.with_slots(n_slots, slot_bytes))
    return Budget(total, needs, slot_bytes, n_slots, found.n_all, found.working_set)


def fixed_pools(
    measured: Measured, n_slots: int | Mapping[int, int] | None, n_windows: int = 0
) -> DeviceBudget | None:
    """So many slots of each of a device's layers, or by layer, whatever they need; None: one per
    expert."""
    layout, placement = measured.found.layout, measured.found.placement
    if placement is None:
        return None
    layers = {layer.layer: expert_bytes(layer) for layer in placement.layers(layout)}
    n = layout.n_experts if n_slots is None else n_slots
    slots = n if isinstance(n, Mapping) else dict.fromkeys(layers, n)
    return DeviceBudget(GB, DeviceNeeds(), slots, layers, layout.n_experts, 0, n_windows)


def with_parts(name: str, **given: Any) -> PolicyMaker:
    """A named policy with some of its parts replaced.

    Of a predictor that is given everything is read, unless there is a pace too.
    """
    if given.get("predictor") is not None and given.get("pace") is None:
        given["pace"] = Everything()
    parts = {k: v for k, v in given.items() if v is not None}  # an empty cache is falsy
    return lambda facts: policy(name, facts)._replace(**parts)


class Ours(Model):
    """A model through the plugin with ``n_slots`` slots (None: one for every expert), on a device
    ``n_pool`` of each layer there."""

    arena: Arena

    def __init__(
        self,
        path: Path,
        n_slots: int | None = None,
        *,
        policy: str = "lru",
        reads: str = "buffered",
        lanes: int = 2,
        recorder: Recorder | None = None,
        cache: CachePolicy | None = None,
        order: LoadOrder | None = None,
        predictor: Predictor | None = None,
        pace: Pace | None = None,
        routers: RouterReader = read_routers,
        n_pool: int | Mapping[int, int] | None = None,
        n_windows: int = 0,
        **more: Any,
    ) -> None:
        more.setdefault("repack", "off")
        found = opening.find(path, Options(GB, policy, reads, lanes, **more))
        self.binding = found.bind()
        params = llama_cpp.llama_model_default_params()
        measured = opening.place_tables(Measured(found, Needs(0, 0, 0, 0), 0))
        loaded = opening.load(measured, self.binding, params)
        super().__init__(loaded.model)
        self.arena = start(
            loaded,
            make_policy=with_parts(
                policy, cache=cache, order=order, predictor=predictor, pace=pace
            ),
            budget=fixed(loaded.measured, n_slots),
            pools=fixed_pools(loaded.measured, n_pool, n_windows),
            routers=routers,
            recorder=recorder,
        )
        self.found = self.arena.found
        self.plugin = self.arena.plugin
        self.controller = self.arena.controller
        self.meter = Meter(self.arena)

    @property
    def n_slots(self) -> int:
        return self.arena.budget.n_slots

    def stats(self, reset: bool = False) -> Stats:
        """The plugin's counters since the last reset."""
        stats = self.meter.native()
        if reset:
            self.meter.reset()
        return stats

    def reset_stats(self) -> None:
        self.meter.reset()

    @property
    def hits(self) -> int:
        """Demands that were found, since the last reset."""
        return sum(self.meter.demands().hits.values())

    @property
    def misses(self) -> int:
        return sum(self.meter.demands().misses.values())

    def check(self) -> None:
        """The table is consistent, and the slots hold what it says, but for wrong guesses: the
        plugin may have given one up and not told yet."""
        self.check_table()
        self.check_pools()
        residency = self.controller.residency
        held = self.plugin.slot_keys()
        for key, slot in residency.slot_of.items():
            if isinstance(residency, MixedResidency) and slot in residency.low:
                key += residency.first_low_key
                assert held[slot] == key, "the slot has no low copy of its expert"
            assert held[slot] == key or (held[slot] == -1 and key not in residency.cache)

    def check_pools(self) -> None:
        """The device holds what the table says."""
        residency = self.controller.residency
        if isinstance(residency, Tiers):
            for layer, pool in residency.pools.items():
                held = self.plugin.pool_keys(layer)
                for key, slot in pool.slot_of.items():
                    assert held[slot] == key, "a pool does not hold its expert"

    def check_table(self) -> None:
        """The table alone: a guess that failed stays in it until someone wants it."""
        self.arena.callbacks.flush()
        self.controller.residency.check_integrity()

    def close(self) -> None:
        super().close()
        self.binding.close()
        self.arena.close()


@contextmanager
def stock(path: Path, **how: Any) -> Iterator[Stock]:
    model = Stock(path, **how)
    try:
        yield model
    finally:
        model.close()


@contextmanager
def ours(path: Path, n_slots: int | None = None, **kwargs: Any) -> Iterator[Ours]:
    """An Ours, checked for integrity at the end."""
    model = Ours(path, n_slots, **kwargs)
    try:
        yield model
        model.check()
    finally:
        model.close()


def fix_slots(monkeypatch: pytest.MonkeyPatch, n_slots: int) -> None:
    """Every budget divided from now on has this many slots."""
    monkeypatch.setattr(Measured, "divide", lambda measured: fixed(measured, n_slots))


def same(got: Logits, expected: Logits) -> None:
    """Equal to the last bit, and numbers at all."""
    assert got.shape == expected.shape
    assert np.isfinite(expected).all()
    difference = float(np.abs(got - expected).max())
    assert np.array_equal(got, expected), f"logits differ by up to {difference}"


# --- scripted policies ----------------------------------------------------------------------------


def token_by_token(model: Model) -> Logits:
    context = model.context()
    return np.concatenate([context.decode(rows([t], i)) for i, t in enumerate(random_tokens(24))])


class Events:
    """A recorder that keeps what a gate wants to know."""

    def __init__(self) -> None:
        self.n_tokens: list[int] = []
        self.ids: list[list[int]] = []
        self.most_rows = 0  # of one expert in one event
        self.widest = 0  # experts in one event
        self.demanded = 0  # experts, each once per layer and step
        self.continuations = 0  # events for further tensors of the layer before
        self.continued = 0  # (token, rank) pairs of those

    def record(
        self, event: RouteEvent, ids: list[int], continuation: bool, cancelled: Sequence[int]
    ) -> None:
        self.n_tokens.append(event.n_tokens)
        self.ids.append(ids)
        counts = np.bincount(ids)
        self.most_rows = max(self.most_rows, int(counts.max()))
        distinct = int((counts > 0).sum())
        self.widest = max(self.widest, distinct)
        self.demanded += 0 if continuation else distinct
        self.continuations += continuation
        self.continued += len(ids) if continuation else 0

    def record_guesses(self, offered: Sequence[Guess], chosen: Sequence[Guess]) -> None:
        pass


class Guesser:
    """A predictor that learns nothing and is sure of what ``keys`` says."""

    recall: Mapping[int, float] = {}

    def observe(self, event: RouteEvent, ids: Callable[[], Ids]) -> None:
        pass

    def guess(self, event: RouteEvent, x: Callable[[], Inputs]) -> Sequence[Guess]:
        return [Guess(key, 1.0) for key in self.keys(event)]

    def keys(self, event: RouteEvent) -> Sequence[int]:
        raise NotImplementedError


class RandomGuesses(Guesser):
    """Guesses ``n`` random experts of random layers at every event."""

    def __init__(self, layers: Sequence[int], n_experts: int, n: int, seed: int = 0) -> None:
        self.all = [layer * n_experts + e for layer in layers for e in range(n_experts)]
        self.n = n
        self.rng = random.Random(seed)

    def keys(self, event: RouteEvent) -> Sequence[int]:
        return self.rng.sample(self.all, min(self.n, len(self.all)))


class WorstGuesses(Guesser):
    """Guesses what helps least: of this very layer, the experts it just asked for and all that it
    did not, each twice."""

    def __init__(self, n_experts: int) -> None:
        self.n_experts = n_experts

    def keys(self, event: RouteEvent) -> Sequence[int]:
        base = event.layer * self.n_experts
        rest = [e for e in range(self.n_experts) if e not in event.experts]
        return [base + e for e in [*event.experts, *rest] * 2]


class ScriptedGuesses(Guesser):
    """Guesses given keys after given events, counted from 0."""

    def __init__(self, answers: Mapping[int, Sequence[int]]) -> None:
        self.answers = answers
        self.n = -1

    def keys(self, event: RouteEvent) -> Sequence[int]:
        self.n += 1
        return self.answers.get(self.n, [])


class Leaky(LRU):
    """LRU that refuses to keep every third expert: slots become free all the time, so that
    guesses always find some."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def admit(self, key: int, votes: int = 1) -> bool:
        self.n += 1
        return self.n % 3 != 0 and super().admit(key, votes)


class Shuffled:
    """A random load order."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = random.Random(seed)

    def order(self, experts: Sequence[int], counts: Sequence[int]) -> Sequence[int]:
        return self.rng.sample(range(len(experts)), len(experts))
