"""Experts of a device's layers that the processor computes: logits equal stock's all the same.

The device is the one of native/lag.cpp, whose kernels are the processor's. A pass proves:

 1  all       the device has the trunk alone: as stock with experts in the processor's memory
 2  any       whatever part of the missing experts is computed where: decoding, groups, prompts;
              what is copied is what the plan says, with one wait per layer
 3  auto      a slow link makes the processor compute, and carries little
 4  failures  a read that fails for the processor, and the same step again
 5  users     the option, the statistics, the library's Llama
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import TinyFile
from harness import Logits, Model, Ours, Row, ours, random_tokens, rows, same, stock
from lag import NAME, Lag, lag

from moe_gguf import Llama, UserError
from moe_gguf.policies import POLICIES
from moe_gguf.policies.coexecution import Division
from moe_gguf.policies.tiers import Tiers
from moe_gguf.runtime.cli.plan import plan_document, plan_text
from moe_gguf.runtime.errors import ExpertReadError
from moe_gguf.runtime.options import CPU_EXPERTS, Options

__all__ = ["lag"]  # a fixture

DEVICE = {"device": NAME.lower()}
AUTO = {**DEVICE, "cpu_experts": "auto"}
FEW = 12
N_USED = {"mixtral": 2, "llama4": 1}  # experts per token; of other layouts 4


def generation(model: Model) -> Logits:
    context = model.context()
    logits = [context.decode(rows(random_tokens(FEW)))]
    for i in range(6):
        logits.append(context.decode(rows([int(logits[-1][-1].argmax())], FEW + i)))
    return np.concatenate(logits)


@pytest.mark.parametrize("n_slots", [None, 7])
@pytest.mark.parametrize("layout", [*tiny.LAYOUTS, "scaled"])
def test_1_all(layout: str, n_slots: int | None, tiny_file: TinyFile, lag: Lag) -> None:
    path = tiny_file("qwen3moe", scales=True) if layout == "scaled" else tiny_file(layout)
    with stock(path, device=NAME, experts_on_cpu=True) as model:
        expected = generation(model)
    with ours(path, n_slots, cpu_experts="all", **DEVICE) as model:
        lag.count()
        same(generation(model), expected)
        assert lag.count().launches > 0
        assert model.stats().uploads == model.stats().generic == 0
        assert "cpu-experts all" in model.arena.mode_line()


class Forced:
    """Decides by chance; counts what it decides."""

    rest = 0

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.n_computed = self.n_passing = self.n_pairs = 0

    def learn(self, now_ns: int, n_experts: int, n_pairs: int, ns: int) -> None:
        assert n_pairs >= n_experts
        assert (ns > 0) == (n_experts > 0)

    def divide(self, layer: int, counts: Sequence[int]) -> Division:
        share = self.rng.choice([0.0, 0.5, 1.0])
        computed = {i for i in range(len(counts)) if self.rng.random() < share}
        passing = {i for i in computed if self.rng.random() < 0.5}
        self.n_computed += len(computed)
        self.n_passing += len(passing)
        self.n_pairs += sum(counts[i] for i in computed)
        return Division(frozenset(computed), frozenset(passing))


def forced(model: Ours, seed: int) -> Forced:
    residency = model.controller.residency
    assert isinstance(residency, Tiers)
    residency.dividing = chance = Forced(seed)
    return chance


def token_by_token(model: Model) -> Logits:
    context = model.context()
    return np.concatenate([context.decode(rows([t], i)) for i, t in enumerate(random_tokens(16))])


def several(model: Model) -> Logits:
    """Three sequences, decoding together."""
    context = model.context(n_seq_max=3)
    steps = [[Row(7 * i + 3 * s, i, seq=s) for s in range(3)] for i in range(12)]
    return np.concatenate([context.decode(step) for step in steps])


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("n_slots", [None, 5])
@pytest.mark.parametrize("layout", [*tiny.LAYOUTS, "scaled", "mixed"])
def test_2_any(layout: str, n_slots: int | None, seed: int, tiny_file: TinyFile, lag: Lag) -> None:
    flags = {"scaled": {"scales": True}, "mixed": {"mixed": True}}.get(layout, {})
    path = tiny_file("qwen3moe" if flags else layout, **flags)
    with stock(path, device=NAME) as model:
        expected = token_by_token(model), several(model), generation(model)
    n_pool = 2 * N_USED.get(layout, 4)
    with ours(path, n_slots, n_pool=n_pool, **AUTO) as model:
        chance = forced(model, seed)
        model.reset_stats()
        lag.count()
        same(token_by_token(model), expected[0])
        stats = model.stats()
        assert stats.cpu_experts == chance.n_computed > 0
        assert stats.cpu_pairs == chance.n_pairs
        assert stats.uploads == model.misses - chance.n_passing
        assert lag.count().upload_bytes == stats.upload_bytes
        assert stats.waits == 16 * len(model.found.layout.layers)
        model.check()
        same(several(model), expected[1])
        same(generation(model), expected[2])


def test_2_groups(tiny_file: TinyFile, lag: Lag) -> None:
    path = tiny_file("qwen3moe")
    with stock(path, device=NAME) as model:
        expected = several(model)
    with ours(path, n_pool=13, **AUTO) as model:
        chance = forced(model, 3)
        same(several(model), expected)
        assert model.stats().cpu_pairs == chance.n_pairs > chance.n_computed > 0


@pytest.mark.parametrize("policy", POLICIES)
def test_2_policies(policy: str, tiny_file: TinyFile, lag: Lag) -> None:
    path = tiny_file("qwen3moe")
    with stock(path, device=NAME) as model:
        expected = token_by_token(model)
    with ours(path, 19, n_pool=6, policy=policy, **AUTO) as model:
        forced(model, 5)
        same(token_by_token(model), expected)
        assert model.stats().cpu_experts > 0


@pytest.mark.parametrize("n_slots", [None, 5])
@pytest.mark.parametrize("layout", [*tiny.LAYOUTS, "scaled"])
def test_2_a_window(layout: str, n_slots: int | None, tiny_file: TinyFile, lag: Lag) -> None:
    """Also of events with more experts than slots: the window lacks what it computes."""
    path = tiny_file("qwen3moe", scales=True) if layout == "scaled" else tiny_file(layout)
    with stock(path, device=NAME) as model:
        expected = wide(model)
    with ours(path, n_slots, n_pool=N_USED.get(layout, 4), n_windows=2, **AUTO) as model:
        chance = forced(model, 13)
        model.reset_stats()
        lag.count()
        same(wide(model), expected)
        stats = model.stats()
        assert stats.cpu_pairs == chance.n_pairs > chance.n_computed > 0
        assert stats.ranges == 0
        assert lag.count().upload_bytes == stats.upload_bytes


def test_2_slow_streams(tiny_file: TinyFile, lag: Lag) -> None:
    """Results go behind the launch, and no slot is written over that is still read."""
    path = tiny_file("qwen3moe")
    with stock(path, device=NAME) as model:
        expected = token_by_token(model)
    with lag.delayed(us=1000), ours(path, 4, n_pool=5, **AUTO) as model:
        forced(model, 7)
        same(token_by_token(model), expected)


def wide(model: Model) -> Logits:
    """Prompts, the longest beyond what the processor helps with, and a group of eight."""
    context = model.context(n_seq_max=8)
    logits = [context.decode(rows(random_tokens(n, n), seq=i)) for i, n in enumerate((9, 33, 140))]
    steps = [[Row(7 * i + 3 * s, 140 + i, seq=s) for s in range(3, 8)] for i in range(3)]
    return np.concatenate(logits + [context.decode(step) for step in steps])


def prompts_between(model: Model) -> Logits:
    context, logits = model.context(n_seq_max=2), []
    for i in range(6):
        logits.append(context.decode([Row(5 * i, i)]))
        logits.append(context.decode(rows(random_tokens(12, seed=i), 12 * i, seq=1)))
    return np.concatenate(logits)


def test_2_a_prompt_behind_a_slow_link(tiny_file: TinyFile, lag: Lag) -> None:
    """What a pool gets afterwards, for nobody to wait for, is soon wanted in the window."""
    path = tiny_file("qwen3moe")
    with stock(path, device=NAME) as model:
        expected = prompts_between(model)
    with (
        lag.delayed(us=0, bytes_per_s=4 * 10**6),
        ours(path, n_pool=6, n_windows=2, gpu_layers=2, **AUTO) as model,
    ):
        forced(model, 11)
        same(prompts_between(model), expected)


def test_3_auto_on_a_slow_link(tiny_file: TinyFile, lag: Lag) -> None:
    path = tiny_file("qwen3moe")
    with stock(path, device=NAME) as model:
        expected = token_by_token(model)
    with lag.delayed(us=0, bytes_per_s=10**6), ours(path, n_pool=6, **AUTO) as model:
        model.reset_stats()
        same(token_by_token(model), expected)
        stats = model.stats()
        assert stats.cpu_experts > 0.9 * model.misses
        assert stats.uploads < model.misses


def prompt(model: Model) -> Logits:
    return model.context().decode(rows(random_tokens(FEW)))


@pytest.mark.parametrize("script", [token_by_token, several, prompt])
def test_3_a_slow_link_carries_little(
    script: Callable[[Model], Logits], tiny_file: TinyFile, lag: Lag
) -> None:
    """Decoding, groups and prompts, also with more experts than slots: once the processor is known,
    uploads are what it has time for, and all takes a fraction of the time."""
    path = tiny_file("qwen3moe")
    seconds = {}
    with lag.delayed(us=0, bytes_per_s=10**6):
        for mode in ("off", "auto"):
            how = {**DEVICE, "cpu_experts": mode}
            with ours(path, n_pool=5, n_windows=2, **how) as model:
                script(model)
                model.reset_stats()
                start = time.perf_counter()
                script(model)
                seconds[mode] = time.perf_counter() - start
                if mode == "auto":
                    assert model.stats().uploads < 0.15 * model.misses
    assert seconds["auto"] < seconds["off"] / 4


def test_4_a_read_that_fails(tiny_file: TinyFile, lag: Lag) -> None:
    path = tiny_file("qwen3moe")
    with stock(path, device=NAME) as model:
        expected = token_by_token(model)
    with ours(path, 7, n_pool=6, **AUTO) as model:
        for skip in (3, 9, 14):
            forced(model, skip)
            model.plugin.inject(skip, 5)
            with pytest.raises(ExpertReadError):
                token_by_token(model)
            model.check()
        same(token_by_token(model), expected)


def test_5_llama(tiny_file: TinyFile, lag: Lag) -> None:
    path, tables = str(tiny_file("qwen3moe")), {}
    for mode in CPU_EXPERTS:
        options: dict[str, Any] = {**DEVICE, "device_memory": "6MB", "cpu_experts": mode}
        llama = Llama(path, memory="1GB", repack="off", n_ctx=256, **options)
        try:
            answer = llama.create_completion("Hello", max_tokens=8, temperature=0.0)
            tables[mode] = answer["choices"][0]["text"], llama.stats()
        finally:
            llama.close()
    assert len({text for text, _ in tables.values()}) == 1
    assert tables["off"][1]["cpu_experts"] == 0 < tables["off"][1]["uploads"]
    assert tables["all"][1]["uploads"] == tables["all"][1]["device_slots"] == 0
    assert tables["auto"][1]["cpu_pairs"] >= tables["auto"][1]["cpu_experts"] > 0


def test_5_plan_of_all(tiny_file: TinyFile, lag: Lag) -> None:
    given = {**DEVICE, "memory": "1GB", "cpu_experts": "all"}
    document = plan_document(tiny_file("qwen3moe"), n_ctx=256, **given)
    assert document["on_device"]["slots"] == 0
    assert f"on {NAME.lower()}" in plan_text(document)


def test_5_options() -> None:
    with pytest.raises(UserError, match="'some' names no experts: use auto, off, all"):
        Options(cpu_experts="some")
