"""Threads that each compute whole experts: the same bits as stock llama.cpp, whatever arrives when.

Nearly every case has fewer slots than a layer has experts, so that some are read anew within it,
and proves from the timeline that experts were computed so; the tiny models have as many as two
threads need.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeBundle, TinyFile
from harness import Logits, Model, Ours, RandomGuesses, ours, random_tokens, rows, same, stock

from moe_gguf.policies import POLICIES
from moe_gguf.runtime.errors import ExpertReadError
from moe_gguf.runtime.plugin import abi

LAYOUTS = ("qwen3moe", "gpt-oss", "deepseek2", "gemma4", "updown")
SLOW_MS = 100
MANY = 40  # tokens at once, so that every expert is asked for


def script(model: Model) -> Logits:
    """Two wide steps, and one of a single token, which no such thread computes."""
    context = model.context(n_threads=2, n_threads_batch=2)
    first = context.decode(rows(random_tokens(MANY, 1)))
    second = context.decode(rows(random_tokens(MANY, 2), MANY))
    return np.concatenate([first, second, context.decode(rows([7], 2 * MANY))])


def alone(model: Ours) -> dict[int, int]:
    """How many experts each thread computed by itself since recording began."""
    n: dict[int, int] = {}
    while events := model.plugin.timeline_read(1000):
        for event in events:
            if event.kind == abi.EVENT_COMPUTE and event.lane >= 0:
                n[event.lane] = n.get(event.lane, 0) + 1
    return n


def check(path: Path, expected: Logits, n_slots: int, **how: Any) -> None:
    with ours(path, n_slots, **how) as model:
        model.plugin.timeline(1 << 16)
        same(script(model), expected)
        stats, by_thread = model.stats(), alone(model)
        assert by_thread
        assert sum(by_thread.values()) <= stats.rounds


@pytest.mark.parametrize("n_slots", [4, 9, 14])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, n_slots: int, tiny_file: TinyFile) -> None:
    path = tiny_file(layout)
    with stock(path) as model:
        expected = script(model)
    check(path, expected, n_slots)


@pytest.mark.parametrize("policy", POLICIES)
def test_policies(policy: str, tiny_file: TinyFile) -> None:
    path = tiny_file("qwen3moe")
    with stock(path) as model:
        expected = script(model)
    for n_slots in (12, 15):
        check(path, expected, n_slots, policy=policy)


@pytest.mark.parametrize("lanes", [1, 8])
def test_guesses(lanes: int, tiny_file: TinyFile) -> None:
    path = tiny_file("qwen3moe")
    with stock(path) as model:
        expected = script(model)
    for n_slots in (9, 14):
        predictor = RandomGuesses(range(3), 16, 5)
        check(path, expected, n_slots, lanes=lanes, predictor=predictor)


def test_repacked(tiny_file: TinyFile, bundle: MakeBundle) -> None:
    path = tiny_file("qwen3moe")
    with stock(path, repack=True) as model:
        expected = script(model)
    check(bundle(path, "repacked"), expected, 14)


def test_a_thread_waits_for_a_slow_read(tiny_file: TinyFile) -> None:
    """The other one goes on: what is waited for counts by half."""
    path = tiny_file("qwen3moe")
    with stock(path) as model:
        expected = script(model)
    with ours(path, 19) as model:
        model.plugin.inject(20, -SLOW_MS)
        same(script(model), expected)
        assert model.stats().stall_ns / 1e6 > SLOW_MS / 2 - 10


def test_both_threads_compute(tiny_file: TinyFile) -> None:
    with ours(tiny_file("qwen3moe"), 4) as model:
        context = model.context(n_threads=2, n_threads_batch=2)
        model.plugin.timeline(1 << 16)
        for i in range(10):
            context.decode(rows(random_tokens(MANY, i), i * MANY))
        assert set(alone(model)) == {0, 1}


@pytest.mark.parametrize("skip", [0, 3, 17, 40])
def test_a_failed_read_fails_the_step_alone(skip: int, tiny_file: TinyFile) -> None:
    path = tiny_file("qwen3moe")
    with stock(path) as model:
        expected = script(model)
    with ours(path, 19) as model:
        context = model.context(n_threads=2, n_threads_batch=2)
        model.plugin.inject(skip, errno.EIO)
        with pytest.raises(ExpertReadError):
            context.decode(rows(random_tokens(MANY, 1)))
        same(script(model), expected)
