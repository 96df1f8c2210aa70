"""Demand that goes round: what stays, what streams, and what Bélády would do."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from conftest import TinyFile
from harness import Model, Ours, ours, random_tokens, rows, stock

from moe_gguf.policies import Facts, Residency, policy
from moe_gguf.policies.base import Guess, Phase, RouteEvent
from moe_gguf.policies.pace import Everything
from moe_gguf.policies.replay import replay
from moe_gguf.policies.scan import Scan
from moe_gguf.policies.trace import Trace, TraceEvent
from moe_gguf.runtime.engine.context import Row
from moe_gguf.runtime.errors import ExpertReadError

N_LAYERS, N_EXPERTS, USED = 4, 16, 2


def cyclic(n_steps: int, n_tokens: int = 8, seed: int = 0) -> Trace:
    """Every step asks for every expert of every layer, in an order of its own."""
    rng = random.Random(seed)
    events = []
    for _ in range(n_steps):
        for layer in range(N_LAYERS):
            ids = np.array(rng.sample(range(N_EXPERTS), N_EXPERTS), np.int16)
            event = TraceEvent(layer, Phase.DECODE, n_tokens, False, ids.reshape(n_tokens, -1))
            events.append(event)
    layers = list(range(N_LAYERS))
    return Trace({"n_experts": N_EXPERTS, "layers": layers, "blob_bytes": [100] * 4}, events)


@pytest.mark.parametrize("n_slots", [8, 16, 24, 40, 56])
def test_a_cyclic_scan_hits_what_belady_hits_but_for_the_ring(n_slots: int) -> None:
    """N = 64 keys, all asked for in each of 31 rounds: C - R hits a round once it has settled, and
    no policy can have more than C."""
    trace, n_rounds = cyclic(31), 31
    ideal, scan = replay(trace, "belady", n_slots), replay(trace, "scan", n_slots)
    ring = policy("scan", Facts(n_slots, N_EXPERTS, USED, range(N_LAYERS))).scan.ring  # type: ignore[union-attr]
    assert ideal.hits == n_slots * (n_rounds - 1)
    assert scan.hits >= (n_slots - ring) * (n_rounds - 2)
    assert scan.hits <= ideal.hits
    assert replay(trace, "lru", n_slots).hits < scan.hits


def event(layer: int, experts: Sequence[int], counts: Sequence[int], n: int = 8) -> RouteEvent:
    return RouteEvent(layer, n, experts, counts, Phase.DECODE, n)


def test_the_likeliest_stay() -> None:
    """Experts 0 to 2 have three votes in each step, the others one now and then."""
    rng = random.Random(1)
    facts = Facts(16, N_EXPERTS, USED, range(N_LAYERS))
    chosen = policy("scan", facts)
    residency = Residency(16, N_EXPERTS, chosen.cache, chosen.order, chosen.scan)
    for _ in range(12):
        for layer in range(N_LAYERS):
            others = rng.sample(range(3, N_EXPERTS), 7)
            residency.plan(event(layer, [*others, 0, 1, 2], [1] * 7 + [3] * 3))
            residency.check_integrity()
    for layer in range(N_LAYERS):
        assert {0, 1, 2} <= set(residency.resident(layer))


def test_one_sequence_and_a_group_that_fits_are_no_scan() -> None:
    chosen = policy("scan", Facts(16, N_EXPERTS, USED, range(N_LAYERS)))
    scan = chosen.scan
    assert isinstance(scan, Scan)
    wide, narrow = list(range(N_EXPERTS)), [0, 1, 2]
    assert not any(scan.observe(event(i % N_LAYERS, wide, [1] * 16, 1)) for i in range(40))
    assert not any(scan.observe(event(i % N_LAYERS, narrow, [1] * 3)) for i in range(40))
    assert [scan.observe(event(i % N_LAYERS, wide, [1] * 16)) for i in range(40)][-1]
    assert not [scan.observe(event(i % N_LAYERS, narrow, [1] * 3)) for i in range(40)][-1]


def test_guesses_stream_too_and_take_nothing_that_stays() -> None:
    """The ring's slots are in use by the event; a guess gets one nevertheless, to be read into when
    its expert was computed, and as many as the ring has."""
    chosen = policy("scan", Facts(16, N_EXPERTS, USED, range(N_LAYERS)))
    residency = Residency(16, N_EXPERTS, chosen.cache, chosen.order, chosen.scan)
    wide = list(range(N_EXPERTS))
    for i in range(3 * N_LAYERS):
        demanded = event(i % N_LAYERS, wide, [1] * 16)
        plan = residency.plan(demanded)
    kept = set(chosen.cache)
    ahead = [Guess(key, 1.0) for key in range(N_EXPERTS) if key not in residency.slot_of]
    placed = residency.guess(demanded, ahead)
    assert chosen.scan is not None
    assert len(placed) == chosen.scan.ring
    assert {slot for _, slot in placed} <= set(plan.slots[plan.n_hits :])
    assert set(chosen.cache) == kept
    residency.check_integrity()


def decode_group(model: Model, n: int, n_steps: int = 6) -> np.ndarray:
    context = model.context(n_seq_max=n, kv_unified=True)
    tokens = random_tokens(n)
    logits = []
    for pos in range(n_steps):
        batch = [Row(token, pos, seq) for seq, token in enumerate(tokens)]
        logits.append(context.decode(batch, Phase.DECODE))
        tokens = logits[-1].argmax(axis=1).tolist()
    return np.concatenate(logits)


@pytest.mark.parametrize("n_slots", [5, 9, 14])
@pytest.mark.parametrize("name", ["scan", "klotski", "fate"])
def test_a_group_that_streams_computes_what_stock_does(
    name: str, n_slots: int, tiny_file: TinyFile
) -> None:
    path = tiny_file("qwen3moe")
    with stock(path) as model:
        expected = decode_group(model, 8)
    with ours(path, n_slots, policy=name) as model:
        assert np.array_equal(decode_group(model, 8), expected)
        scan = model.controller.residency.scan
        assert scan is not None
        assert model.stats().recycled > 0, "no slot was used again within a layer"
        single = model.context()
        single.decode(rows(random_tokens(5)))


def fail(model: Ours, skip: int) -> None:
    """Until a read fails that is demanded: it may be a guess's."""
    for _ in range(10):
        model.plugin.inject(skip, 5)
        decode_group(model, 8)


@pytest.mark.parametrize("name", ["klotski", "fate"])
def test_guesses_follow_experts_into_their_slots(name: str, tiny_file: TinyFile) -> None:
    """Nothing but the ring is free, so a guess that is read was read over an expert of the layer
    before, after that was computed. A read that fails meanwhile fails its step and no other."""
    path = tiny_file("qwen3moe")
    with stock(path) as model:
        expected = decode_group(model, 8)
    with ours(path, 14, policy=name, pace=Everything()) as model:
        assert np.array_equal(decode_group(model, 8), expected)
        assert model.meter.demands().guesses_used > 0
        for skip in (0, 3, 8, 21):
            with pytest.raises(ExpertReadError):
                fail(model, skip)
            model.check()
        assert np.array_equal(decode_group(model, 8), expected)
