"""Tiny models opened at llama.cpp's low level, stock and ours, for comparing them bit for bit.

Ours is everything the runtime does except dividing the budget: the number of slots is the test's
choice, because a tiny model fits into any budget that also holds Python.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp
import llama_cpp._logger
import numpy as np
import numpy.typing as npt
import pytest
from conftest import missing

from moe_gguf.policies.base import CachePolicy, Guess, Ids, Inputs, LoadOrder, Predictor, RouteEvent
from moe_gguf.policies.cache import LRU
from moe_gguf.policies.pace import Everything, Pace
from moe_gguf.policies.precision import MixedResidency
from moe_gguf.policies.presets import Policy
from moe_gguf.runtime import llama as runtime_llama
from moe_gguf.runtime import logs
from moe_gguf.runtime.budget import Budget, Needs
from moe_gguf.runtime.controller import Controller, Recorder
from moe_gguf.runtime.opening import OpenModel
from moe_gguf.runtime.options import Options
from moe_gguf.runtime.plugin.abi import Stats

Logits = npt.NDArray[np.float32]

llama_cpp._logger.set_verbose(False)


class Row(NamedTuple):
    """One token of a batch."""

    token: int
    pos: int
    seq: int = 0
    output: bool = True


def rows(tokens: Sequence[int], pos: int = 0, seq: int = 0) -> list[Row]:
    return [Row(token, pos + i, seq) for i, token in enumerate(tokens)]


def random_tokens(n: int, seed: int = 1) -> list[int]:
    return [random.Random(seed * 1000 + i).randrange(256) for i in range(n)]


class Context:
    """One llama_context; ``fail`` turns a failed step into what to raise."""

    def __init__(self, model: int, fail: Callable[[int], BaseException], **params: Any) -> None:
        self._fail = fail
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
        with logs.capture() as log:
            self.ctx = llama_cpp.llama_init_from_model(model, values)
        assert self.ctx, log.reason()
        vocab = llama_cpp.llama_model_get_vocab(model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(vocab)

    def decode(self, batch: Sequence[Row]) -> Logits:
        """Logits of the rows that ask for output."""
        raw = llama_cpp.llama_batch_init(len(batch), 0, 1)
        try:
            raw.n_tokens = len(batch)
            for i, row in enumerate(batch):
                raw.token[i], raw.pos[i] = row.token, row.pos
                raw.n_seq_id[i], raw.seq_id[i][0] = 1, row.seq
                raw.logits[i] = row.output
            code = llama_cpp.llama_decode(self.ctx, raw)
        finally:
            llama_cpp.llama_batch_free(raw)
        if code != 0:
            raise self._fail(code)
        return np.stack([self._logits(i) for i, row in enumerate(batch) if row.output])

    def _logits(self, i: int) -> Logits:
        pointer = llama_cpp.llama_get_logits_ith(self.ctx, i)
        return np.ctypeslib.as_array(pointer, (self.n_vocab,)).copy()

    def close(self) -> None:
        llama_cpp.llama_free(self.ctx)


class Model:
    """What stock and ours have in common: contexts, closed with the model."""

    def __init__(self, model: int) -> None:
        self.model = model
        self._contexts: list[Context] = []

    def context(self, **params: Any) -> Context:
        context = Context(self.model, self._fail, **params)
        self._contexts.append(context)
        return context

    def _fail(self, code: int) -> BaseException:
        return RuntimeError(f"llama_decode returned {code}")

    def close(self) -> None:
        for context in self._contexts:
            context.close()
        llama_cpp.llama_model_free(self.model)


class Stock(Model):
    """llama.cpp alone, the whole model in memory; ``repack``: in the layout its kernels like best.

    That crashes stock llama.cpp where the processor has AMX.
    """

    def __init__(self, path: Path, repack: bool = False) -> None:
        if repack and " amx_tile" in Path("/proc/cpuinfo").read_text():
            missing("stock llama.cpp crashes in its AMX kernels when it repacks on this processor")
        params = llama_cpp.llama_model_default_params()
        params.use_extra_bufts = repack
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        with logs.capture() as log:
            model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert model, log.reason()
        super().__init__(model)


class FixedModel(OpenModel):
    """An OpenModel whose number of slots and policy the test chooses.

    Of a predictor that is given everything is read, unless there is a pace too.
    """

    def __init__(
        self,
        path: Path,
        options: Options,
        n_slots: int | None = None,
        cache: CachePolicy | None = None,
        order: LoadOrder | None = None,
        predictor: Predictor | None = None,
        pace: Pace | None = None,
    ) -> None:
        super().__init__(path, options)
        self.n_slots = n_slots or self.n_all
        if predictor is not None and pace is None:
            pace = Everything()
        given = {"cache": cache, "order": order, "predictor": predictor, "pace": pace}
        self.given = {k: v for k, v in given.items() if v is not None}  # an empty cache is falsy

    def make_policy(self, n_slots: int) -> Policy:
        return super().make_policy(n_slots)._replace(**self.given)

    def divide(self) -> Budget:
        needs = self.needs or Needs(0, 0, 0, 0)
        slot_bytes = self.slots.slot_bytes
        total = max(self.total, needs.with_slots(self.n_slots, slot_bytes))
        self.budget = Budget(total, needs, slot_bytes, self.n_slots, self.n_all, self.working_set)
        return self.budget


class Ours(Model):
    """A model through the plugin with ``n_slots`` slots (None: one for every expert)."""

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
        warm: bool = False,
        low_share: float = 0.0,
        low_on_miss: bool = False,
    ) -> None:
        more = {"warm": warm, "low_share": low_share, "low_on_miss": low_on_miss}
        options = Options("1GB", policy, reads, lanes, **more)
        self.opened = FixedModel(path, options, n_slots, cache, order, predictor, pace)
        params = self.opened.model_params(llama_cpp.llama_model_default_params())
        super().__init__(self.opened.load(params))
        self.opened.needs = Needs(0, 0, 0, 0)
        self.controller: Controller = self.opened.start(recorder)

    @property
    def n_slots(self) -> int:
        return self.opened.n_slots

    def stats(self, reset: bool = False) -> Stats:
        return self.opened.plugin.stats(reset)

    def reset_stats(self) -> None:
        self.stats(reset=True)
        self.controller.reset_stats()

    def check(self) -> None:
        """The table is consistent, and the slots hold what it says, but for wrong guesses: the
        plugin may have given one up and not told yet."""
        self.check_table()
        residency = self.controller.residency
        held = self.opened.plugin.slot_keys()
        for key, slot in residency.slot_of.items():
            if isinstance(residency, MixedResidency) and slot in residency.low:
                key += residency.first_low_key
                assert held[slot] == key, "the slot has no low copy of its expert"
            assert held[slot] == key or (held[slot] == -1 and key not in residency.cache)

    def check_table(self) -> None:
        """The table alone: a guess that failed stays in it until someone wants it."""
        self.controller.residency.check_integrity()

    def _fail(self, code: int) -> BaseException:
        return self.controller.recover() if code < 0 else super()._fail(code)

    def close(self) -> None:
        super().close()
        self.opened.close()


@contextmanager
def stock(path: Path, repack: bool = False) -> Iterator[Stock]:
    model = Stock(path, repack)
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


def fix_slots(monkeypatch: pytest.MonkeyPatch, n_slots: int, **kwargs: Any) -> None:
    """Every moe_gguf.Llama opened from now on has this many slots."""

    def opened(path: Path, options: Options) -> FixedModel:
        return FixedModel(path, options, n_slots, **kwargs)

    monkeypatch.setattr(runtime_llama, "OpenModel", opened)


# --- scripted policies ----------------------------------------------------------------------------


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
        self, layer: int, n_tokens: int, n_used: int, ids: list[int], continuation: bool
    ) -> None:
        self.n_tokens.append(n_tokens)
        self.ids.append(ids)
        counts = np.bincount(ids)
        self.most_rows = max(self.most_rows, int(counts.max()))
        distinct = int((counts > 0).sum())
        self.widest = max(self.widest, distinct)
        self.demanded += 0 if continuation else distinct
        self.continuations += continuation
        self.continued += len(ids) if continuation else 0


class Guesser:
    """A predictor that learns nothing and is sure of what ``keys`` says."""

    recall: Mapping[int, float] = {}

    def observe(self, event: RouteEvent, ids: Ids) -> None:
        pass

    def guess(self, event: RouteEvent, x: Inputs) -> Sequence[Guess]:
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
    """Guesses given keys after given events, counted from 0; ``pause_s`` may delay an event."""

    def __init__(
        self, answers: Mapping[int, Sequence[int]], pause_s: Mapping[int, float] | None = None
    ) -> None:
        self.answers = answers
        self.pause_s = pause_s or {}
        self.n = -1

    def keys(self, event: RouteEvent) -> Sequence[int]:
        self.n += 1
        time.sleep(self.pause_s.get(self.n, 0.0))
        return self.answers.get(self.n, [])


class Leaky(LRU):
    """LRU that refuses to keep every third expert: slots become free all the time, so that
    guesses always find some."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def admit(self, key: int) -> bool:
        self.n += 1
        return self.n % 3 != 0 and super().admit(key)


class Shuffled:
    """A random load order."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = random.Random(seed)

    def order(self, experts: Sequence[int], counts: Sequence[int]) -> Sequence[int]:
        return self.rng.sample(range(len(experts)), len(experts))
