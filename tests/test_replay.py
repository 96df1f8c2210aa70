"""Traces survive the disk, and replaying one tells what the engine would have counted."""

from __future__ import annotations

import ctypes
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from conftest import TinyFile
from harness import Ours, ours, random_tokens, rows

from moe_gguf.policies import POLICIES, Facts, Residency, policy
from moe_gguf.policies.base import Guess, Ids, Inputs, Phase, RouteEvent
from moe_gguf.policies.pace import Everything, Meters, Pace
from moe_gguf.policies.replay import replay, replay_table
from moe_gguf.policies.trace import Offers, Trace, TraceEvent, TraceRecorder, load_trace
from moe_gguf.runtime.engine.context import Row

ROWS = [*POLICIES, "belady"]


def metadata(n_layers: int, n_experts: int) -> dict[str, Any]:
    layers = list(range(n_layers))
    return {"n_experts": n_experts, "layers": layers, "blob_bytes": [100 + n for n in layers]}


def make_trace(events: Sequence[tuple[int, Sequence[Sequence[int]]]], n_experts: int) -> Trace:
    """A trace from (layer, ids by token) pairs."""
    n_layers = 1 + max(layer for layer, _ in events)
    rows = [trace_event(layer, np.array(ids, np.int16)) for layer, ids in events]
    return Trace(metadata(n_layers, n_experts), rows)


def trace_event(layer: int, ids: Ids, continuation: bool = False) -> TraceEvent:
    """Of a prompt, or of one sequence decoding."""
    phase = Phase.DECODE if len(ids) == 1 else Phase.PREFILL
    return TraceEvent(layer, phase, 1, continuation, ids)


def random_trace(seed: int, n_experts: int = 10, n_layers: int = 3, n_events: int = 120) -> Trace:
    """Skewed routing of one to a few tokens per step, the same number in each layer of a step."""
    rng = random.Random(seed)
    weights = [[rng.random() ** 3 for _ in range(n_experts)] for _ in range(n_layers)]

    def token(layer: int) -> list[int]:
        drawn: dict[int, None] = {}
        while len(drawn) < 3:
            drawn[rng.choices(range(n_experts), weights[layer])[0]] = None
        return list(drawn)

    events = []
    for step in range(n_events // n_layers):
        n_tokens = 8 if step % 10 == 0 else 1
        events += [(x, [token(x) for _ in range(n_tokens)]) for x in range(n_layers)]
    return make_trace(events, n_experts)


def golden_trace() -> Trace:
    """The same on every machine and version: a prompt of 12 tokens, then 100 single ones.

    A linear congruential generator chooses; the expert drifts with the step, and half of each
    token's experts are the previous token's, so that there is something to cache.
    """
    n_layers, n_experts, n_used = 6, 16, 4
    state = 2024

    def draws() -> Iterator[int]:
        nonlocal state
        while True:
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            yield (state >> 33) % 1000

    numbers = draws()
    previous: list[list[int]] = [[] for _ in range(n_layers)]

    def token(layer: int, step: int) -> list[int]:
        chosen = previous[layer][: n_used // 2]
        while len(chosen) < n_used:
            number = next(numbers)
            expert = (number * number // 62500 + step // 25 + layer) % n_experts
            if expert not in chosen:
                chosen.append(expert)
        previous[layer] = chosen[::-1]
        return chosen

    events = []
    for step in range(101):
        n_tokens = 12 if step == 0 else 1
        events += [(x, [token(x, step) for _ in range(n_tokens)]) for x in range(n_layers)]
    return make_trace(events, n_experts)


def record(trace: Trace) -> TraceRecorder:
    recorder = TraceRecorder()
    for event in trace.events:
        ids = event.ids.ravel().tolist()
        recorder.record(event.route(), ids, event.continuation, event.cancelled)
        if event.offers.keys:
            offered = list(map(Guess, event.offers.keys, event.offers.chances))
            recorder.record_guesses(offered, list(compress(offered, event.offers.chosen)))
    return recorder


def with_guesses(trace: Trace, seed: int = 0) -> Trace:
    """The trace with something offered after every other event, and some of that cancelled."""
    rng = random.Random(seed)
    keys = [layer * 10 + e for layer in range(3) for e in range(10)]
    events = []
    cancelled: list[int] = []
    for event in trace.events:
        offered = rng.sample(keys, 5) if rng.random() < 0.5 else []
        chosen = [rng.random() < 0.5 for _ in offered]
        chances = [rng.randrange(5) / 4 for _ in offered]
        events.append(event._replace(cancelled=cancelled, offers=Offers(offered, chances, chosen)))
        cancelled = [key for key in compress(offered, chosen) if rng.random() < 0.3]
    return Trace(trace.metadata, events)


def arrays_of(path: Path) -> dict[str, Any]:
    with np.load(path) as archive:
        return dict(archive)


# --- the file ----------------------------------------------------------------------------------


def test_a_route_event_lists_experts_as_first_seen() -> None:
    ids = np.array([[7, 2, 5], [5, 7, 1], [9, 7, 2]], np.int16)
    event = TraceEvent(3, Phase.MIXED, 2, False, ids).route()
    assert event == (3, 3, [7, 2, 5, 1, 9], [3, 2, 2, 1, 1], Phase.MIXED, 2, False)


@pytest.mark.parametrize("n_experts", [10, 40000])
def test_a_trace_survives_the_disk(n_experts: int, tmp_path: Path) -> None:
    last = np.array([[n_experts - 1]])
    events = [*with_guesses(random_trace(1)).events]
    events += [
        TraceEvent(1, Phase.DECODE, 8, False, last),
        TraceEvent(1, Phase.MIXED, 3, True, last),
    ]
    trace = Trace({**metadata(3, n_experts), "model": "größer", "hits": 5}, events)
    record(trace).save(tmp_path / "run.npz", trace.metadata)
    assert [p.name for p in tmp_path.iterdir()] == ["run.npz"], "a temporary file is left"
    loaded = load_trace(tmp_path / "run.npz")
    assert loaded.metadata.items() >= trace.metadata.items()
    assert len(loaded.events) == len(trace.events)
    for a, b in zip(loaded.events, trace.events, strict=True):
        assert a[:4] == b[:4]
        assert np.array_equal(a.ids, b.ids)
        assert a.cancelled == list(b.cancelled)
        assert [list(column) for column in a.offers] == [list(column) for column in b.offers]
        assert a.ids.dtype == (np.int16 if n_experts < 1 << 15 else np.int32)


def test_an_empty_trace_is_a_trace(tmp_path: Path) -> None:
    TraceRecorder().save(tmp_path / "run.npz", metadata(2, 8))
    trace = load_trace(tmp_path / "run.npz")
    assert not trace.events
    assert all(
        row.hits == row.misses == row.hit_rate == 0 for row in replay_table(trace, ROWS, [4])
    )


def test_a_trace_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    old = tmp_path / "run.npz"
    old.write_bytes(b"the previous one")
    recorder = record(random_trace(1))
    with pytest.raises(ValueError, match="n_experts is not"):
        recorder.save(old, {})
    with pytest.raises(ValueError, match="layer is not among"):
        recorder.save(old, metadata(2, 10))
    with pytest.raises(ValueError, match="an expert is not below"):
        recorder.save(old, metadata(3, 9))
    recorder.record(RouteEvent(0, 2, (), (), Phase.PREFILL, 1), [1, 2, 3], False)  # half an event
    with pytest.raises(ValueError, match="do not add up"):
        recorder.save(old, metadata(3, 10))
    assert old.read_bytes() == b"the previous one"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_is_no_trace_is_refused_in_one_sentence(tmp_path: Path) -> None:
    good = tmp_path / "good.npz"
    record(with_guesses(random_trace(1))).save(good, metadata(3, 10))
    arrays = arrays_of(good)
    meta = json.loads(arrays["metadata"].tobytes())
    raw = good.read_bytes()

    def patched(**changes: Any) -> dict[str, Any]:
        return {k: v for k, v in {**arrays, **changes}.items() if v is not None}

    def described(**changes: Any) -> dict[str, Any]:
        text = json.dumps({k: v for k, v in {**meta, **changes}.items() if v is not None})
        return patched(metadata=np.frombuffer(text.encode(), np.uint8))

    def first(name: str, value: float) -> dict[str, Any]:
        array = arrays[name].copy()
        array[0] = value
        return patched(**{name: array})

    forged = arrays["n_tokens"].astype(np.int64)
    forged[:2] = 2**62, 2**62
    archives = [
        *(patched(**{name: None}) for name in arrays),
        *(described(**{name: None}) for name in metadata(1, 1)),
        described(version=1),
        described(version=3),
        described(format="something else"),
        described(n_experts=9),
        described(n_experts=True),
        described(n_sequences="two"),
        described(blob_bytes=[1, 2]),
        described(layers=[0, 1, "2"]),
        patched(metadata=np.frombuffer(b"[1]", np.uint8)),
        patched(metadata=np.frombuffer(b"{\xff", np.uint8)),
        patched(metadata=np.frombuffer(b"[" * 100_000, np.uint8)),
        patched(ids=arrays["ids"][:-1]),
        patched(ids=arrays["ids"].astype(np.float32)),
        patched(layer=arrays["layer"].reshape(-1, 1)),
        patched(layer=arrays["layer"][:-1]),
        patched(ids=np.array([{}], object)),
        patched(n_tokens=forged),
        first("n_tokens", 0),
        first("n_used", -3),
        first("ids", -1),
        first("ids", 10),
        first("layer", 3),
        first("continuation", 1),
        first("phase", 3),
        first("phase", -1),
        first("n_sequences", 0),
        first("n_cancelled", -1),
        first("n_cancelled", 1),
        first("n_offered", 7),
        first("cancelled", 30),
        first("offered", -1),
        first("chances", 2),
        first("chances", float("nan")),
        patched(chosen=arrays["chosen"][1:]),
        patched(chances=arrays["chances"].astype(np.int32)),
        patched(continuation=np.ones_like(arrays["continuation"])),
    ]
    path = tmp_path / "bad.npz"
    for archive in archives:
        np.savez(path, **archive)
        with pytest.raises(ValueError, match=r"bad\.npz is not a routing trace"):
            load_trace(path)
    single = tmp_path / "single.npy"
    np.save(single, arrays["ids"])
    for blob in (b"", b"GGUF", raw[:-100], raw[:60], single.read_bytes(), b"PK\3\4" + raw[:9]):
        path.write_bytes(blob)
        with pytest.raises(ValueError, match=r"bad\.npz is not a routing trace"):
            load_trace(path)
    with pytest.raises(FileNotFoundError):
        load_trace(tmp_path / "nowhere.npz")


def test_damaged_bytes_raise_nothing_but_value_error(tmp_path: Path) -> None:
    path = tmp_path / "run.npz"
    record(with_guesses(random_trace(1, n_events=12))).save(path, metadata(3, 10))
    raw = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(raw)
        damaged[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            load_trace(path)
        except ValueError:
            refused += 1
    assert refused > 150  # a zip file has many bytes that nobody reads


# --- the replay --------------------------------------------------------------------------------


# Hits among 2480 demands, by arena size: one event's 4 experts do not fit into 3 slots, one token's
# 24 not into 20. When a policy changes on purpose, enter the new counts.
GOLDEN = {
    "load-on-demand": {3: 0, 20: 0, 32: 0, 48: 0, 96: 0},
    "lru": {3: 0, 20: 0, 32: 1440, 48: 1744, 96: 2384},
    "lfu": {3: 0, 20: 653, 32: 1058, 48: 1734, 96: 2384},
    "arc": {3: 0, 20: 0, 32: 1404, 48: 1732, 96: 2384},
    "eap": {3: 0, 20: 687, 32: 1103, 48: 1541, 96: 2384},
    "layered-lfu": {3: 0, 20: 1020, 32: 1573, 48: 1794, 96: 2384},
    "scan": {3: 0, 20: 1020, 32: 1573, 48: 1794, 96: 2384},
    "klotski": {3: 0, 20: 1020, 32: 1573, 48: 1794, 96: 2384},
    "fate": {3: 0, 20: 1020, 32: 1573, 48: 1794, 96: 2384},
    "fate-paper": {3: 0, 20: 1215, 32: 1525, 48: 1766, 96: 2384},
    "belady": {3: 300, 20: 1607, 32: 1899, 48: 2111, 96: 2384},
}


@pytest.mark.parametrize("name", ROWS)
def test_golden_counts(name: str) -> None:
    rows = replay_table(golden_trace(), [name], [3, 20, 32, 48, 96])
    assert {row.n_slots: row.hits for row in rows} == GOLDEN[name]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("n_slots", [2, 7, 12, 30])
def test_replay_counts_what_the_run_counted(name: str, n_slots: int, tmp_path: Path) -> None:
    """A run as the engine does it, with some layers in two parts and guesses by a pace that nobody
    understands, some of them given up; then its trace from disk."""
    rng = random.Random(n_slots)
    facts = Facts(n_slots, 10, 3, range(3), gates=lambda how: RandomOffers(rng))
    chosen_policy = policy(name, facts)
    predictor = chosen_policy.predictor
    residency = Residency(n_slots, 10, chosen_policy.cache, chosen_policy.order, chosen_policy.scan)
    recorder = TraceRecorder()
    hits = misses = n_placed = loaded = 0
    for recorded in random_trace(7).events:
        for continuation in (False, True) if rng.random() < 0.3 else (False,):
            guesses = [*residency.guessed, *residency.stale]
            cancelled = rng.sample(guesses, rng.randrange(len(guesses) + 1) // 2)
            residency.drop(cancelled)
            event, ids = recorded.route(), recorded.ids
            plan = residency.plan(event)
            recorder.record(event, ids.ravel().tolist(), continuation, cancelled)
            loaded += sum(plan.loads) * (100 + event.layer)
            if continuation:
                continue
            hits += plan.n_hits
            misses += sum(plan.loads)
            if predictor is None:
                continue
            predictor.observe(event, lambda ids=ids: ids)
            offered = predictor.guess(event, lambda: np.zeros((1, 0), np.float32))
            missing = [guess for guess in offered if guess.key not in residency.slot_of]
            chosen = [guess for guess in missing if rng.random() < 0.6]
            recorder.record_guesses(offered, chosen)
            placed = residency.guess(event, chosen, [guess.key for guess in offered])
            n_placed += len(placed)
            loaded += sum(100 + key // 10 for key, _ in placed)
    recorder.save(tmp_path / "run.npz", metadata(3, 10))
    row = replay(load_trace(tmp_path / "run.npz"), name, n_slots)
    assert row[2:7] == (hits, misses, n_placed, residency.guesses_used, loaded)
    # These two offer what they have seen, and 30 slots keep all of that.
    seen = name in ("eap", "klotski") and n_slots == 30
    assert predictor is None or n_placed > 0 or n_slots == 2 or seen


class RandomOffers:
    """Gates that offer experts of the next layer at random, none after the last."""

    recall: Mapping[int, float] = {}

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def observe(self, event: RouteEvent, ids: Callable[[], Ids]) -> None:
        pass

    def guess(self, event: RouteEvent, x: Callable[[], Inputs]) -> Sequence[Guess]:
        experts = self.rng.sample(range(10), 6) if event.layer < 2 else []
        return [Guess(10 * (event.layer + 1) + e, 0.5) for e in experts]


def test_a_recording_without_guesses_replays_the_cache_of_fate_alone() -> None:
    trace = random_trace(4)
    assert not trace.has_offers
    for name, alone in (("fate", "layered-lfu"), ("eap", "eap")):
        row, without = replay(trace, name, 12), replay(trace, alone, 12)
        assert row[2:] == without[2:]
        assert row.guesses == row.guesses_used == 0


def test_right_guesses_turn_misses_into_hits_and_wrong_ones_cost_their_bytes() -> None:
    """Two layers, one token: of layer 1's experts 12 and 13 it is offered 12, 14 and 13, and reads
    the first two."""
    ids = np.array([[1, 2]], np.int16), np.array([[2, 3]], np.int16)
    offers = Offers([12, 14, 13], [0.9, 0.8, 0.1], [True, True, False])
    first, second = trace_event(0, ids[0])._replace(offers=offers), trace_event(1, ids[1])
    trace = Trace(metadata(2, 10), [first, second])
    row = replay(trace, "fate", 8)
    assert (row.hits, row.misses, row.guesses, row.guesses_used) == (1, 3, 2, 1)
    assert row.bytes_read == 2 * 100 + (2 + 1) * 101
    # A guess that the run gave up before the layer came is none.
    given_up = Trace(trace.metadata, [first, second._replace(cancelled=[12])])
    assert replay(given_up, "fate", 8).hits == 0
    assert replay(trace, "lru", 8).misses == 4


def test_other_sizes_read_ahead_no_more_than_the_recorded_run() -> None:
    trace = with_guesses(random_trace(5, n_events=300))
    most = sum(sum(event.offers.chosen) for event in trace.events)
    for row in replay_table(trace, ["fate", "fate-paper", "eap"], [4, 9, 15, 24, 30]):
        assert row.guesses <= most
        assert row.guesses > 0 or row.n_slots not in (9, 15)
    assert replay(trace, "lru", 9).guesses == replay(trace, "belady", 9).guesses == 0


def test_a_trace_of_version_1_is_to_be_recorded_again(tmp_path: Path) -> None:
    path = tmp_path / "old.npz"
    record(random_trace(1)).save(path, metadata(3, 10))
    arrays = arrays_of(path)
    old = {**json.loads(arrays["metadata"].tobytes()), "version": 1}
    arrays["metadata"] = np.frombuffer(json.dumps(old).encode(), np.uint8)
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=r"its version is 1, not 2.*record it again with"):
        load_trace(path)


@pytest.mark.parametrize("seed", range(10))
def test_belady_bounds_every_policy(seed: int) -> None:
    trace = random_trace(seed)
    repeated = [e for event in trace.events for e in (event, event._replace(continuation=True))]
    for some in (trace, Trace(trace.metadata, repeated)):
        sizes = [1, 2, 3, 5, 8, 12, 20, 30]
        table = replay_table(some, ROWS, sizes)
        best = {row.n_slots: row.hits for row in table if row.policy == "belady"}
        assert all(row.hits <= best[row.n_slots] for row in table)
        assert len({row.hits + row.misses for row in table}) == 1


def fewest_misses(events: Sequence[frozenset[int]], n_slots: int) -> int:
    """By trying every victim everywhere: costs[arena] = misses so far on the best way there."""
    costs: dict[frozenset[int], int] = {frozenset(): 0}
    for wanted in events:
        after: dict[frozenset[int], int] = {}
        for arena, cost in costs.items():
            pool = arena | wanted
            for kept in itertools.combinations(sorted(pool), min(n_slots, len(pool))):
                state = frozenset(kept)
                paid = cost + len(wanted - arena)
                after[state] = min(paid, after.get(state, paid))
        costs = after
    return min(costs.values())


@pytest.mark.parametrize("seed", range(60))
def test_belady_is_the_optimum(seed: int) -> None:
    rng = random.Random(seed)
    layers = [0, 1] * 5
    chosen = [rng.sample(range(4), rng.choice([1, 1, 2, 2, 3, 4])) for _ in layers]
    trace = make_trace([(x, [c]) for x, c in zip(layers, chosen, strict=True)], 4)
    events = [frozenset(4 * x + e for e in c) for x, c in zip(layers, chosen, strict=True)]
    for n_slots in (1, 2, 3, 4, 5):
        assert replay(trace, "belady", n_slots).misses == fewest_misses(events, n_slots)


def test_below_one_tokens_working_set_lru_hits_nothing() -> None:
    """The cliff: an order of demand that repeats exactly evicts each expert just before its use."""
    token = [(layer, [[2 * layer, 2 * layer + 1]]) for layer in range(4)]  # 8 keys per token
    trace = make_trace(token * 50, 8)
    assert [replay(trace, "lru", n).hits for n in (1, 2, 5, 6)] == [0, 0, 0, 0]
    # With one slot short the first half of each event is a hit, pinned while the other half loads.
    # So the edge lies one event below the working set, not at it.
    assert replay(trace, "lru", 7).hits == 4 * 49
    assert replay(trace, "lru", 8).misses == 8
    # Nothing forces the fall: one may keep what fits beside two slots that all the rest share.
    assert replay(trace, "belady", 6).hit_rate > 0.6


def test_layers_add_up() -> None:
    for row in replay_table(random_trace(2), ROWS, [2, 9]):
        assert sum(row.layer_hits.values()) == row.hits
        assert sum(row.layer_misses.values()) == row.misses
        assert row.bytes_read == sum(n * (100 + x) for x, n in row.layer_misses.items())
        for layer, rate in row.layer_hit_rate.items():
            total = row.layer_hits[layer] + row.layer_misses[layer]
            assert rate == row.layer_hits[layer] / total


def test_a_table_has_a_row_per_policy_and_size() -> None:
    trace = random_trace(2)
    table = replay_table(trace, ["lru", "belady"], [4, 9])
    assert [(row.policy, row.n_slots) for row in table] == [
        ("lru", 4),
        ("lru", 9),
        ("belady", 4),
        ("belady", 9),
    ]
    assert table == [replay(trace, row.policy, row.n_slots) for row in table]


def test_unusable_requests_name_the_mend() -> None:
    trace = random_trace(2)
    with pytest.raises(ValueError, match="at least 1"):
        replay(trace, "lru", 0)
    with pytest.raises(ValueError, match="choose one of"):
        replay(trace, "mru", 4)


# --- against the engine --------------------------------------------------------------------------

N_TOKENS = 16


def slowly() -> Any:
    """A scheduler callback that lets the lanes finish before each layer asks for its experts."""
    op_desc = llama_cpp.llama_cpp._lib.ggml_op_desc
    op_desc.argtypes, op_desc.restype = [ctypes.c_void_p], ctypes.c_char_p

    def ask(tensor: int, asking: bool, _: object) -> bool:
        if op_desc(tensor) == b"MUL_MAT_ID":
            time.sleep(0.003)
        return False

    return llama_cpp.ggml_backend_sched_eval_callback(ask)


def three_sequences(model: Ours, **params: Any) -> None:
    """Prompts one after another, decoding together, and a prompt among the decoding."""
    context = model.context(n_seq_max=3, **params)
    for seq in range(2):
        context.decode(rows(random_tokens(9, seq + 1), seq=seq), Phase.PREFILL)
    for i in range(N_TOKENS):
        context.decode([Row(7 * i + seq, 9 + i, seq) for seq in range(2)], Phase.DECODE)
    mixed = [Row(5, 9 + N_TOKENS), *rows(random_tokens(20), seq=2)]
    context.decode(mixed, Phase.MIXED)
    for i in range(N_TOKENS):
        context.decode(rows([11 * i], 20 + i, seq=2), Phase.DECODE)


@pytest.mark.parametrize("pace", [Everything, lambda: SomeTime(3)], ids=["everything", "some"])
@pytest.mark.parametrize("policy", ["fate", "fate-paper", "eap", "klotski"])
@pytest.mark.parametrize("n_slots", [5, 14, 30])
def test_a_guessing_run_is_replayed_exactly(
    policy: str, n_slots: int, pace: Callable[[], Pace], tiny_file: TinyFile, tmp_path: Path
) -> None:
    recorder = TraceRecorder()
    with ours(
        tiny_file("qwen3moe"), n_slots, policy=policy, pace=pace(), recorder=recorder
    ) as model:
        three_sequences(model)
        trace = recorder.save(tmp_path / "t.npz", described(model))
        counted = counts(model)
    row = replay(load_trace(tmp_path / "t.npz"), policy, n_slots)
    assert (row.hits, row.misses, row.guesses, row.guesses_used) == counted
    assert row.guesses > 0
    # A step may come in several pieces, each of which is of the whole step's phase.
    steps = ((event.phase, event.n_sequences) for event in trace.events)
    said = [(Phase.PREFILL, 1), (Phase.DECODE, 2), (Phase.MIXED, 2), (Phase.DECODE, 1)]
    assert [step for step, _ in itertools.groupby(steps)] == said


def test_and_so_are_its_bytes_where_no_guess_is_given_up(
    tiny_file: TinyFile, tmp_path: Path
) -> None:
    recorder, callback = TraceRecorder(), slowly()
    with ours(
        tiny_file("qwen3moe"), 19, policy="fate", pace=Everything(), recorder=recorder
    ) as model:
        three_sequences(model, cb_eval=callback)
        trace = recorder.save(tmp_path / "t.npz", described(model))
        counted, n_bytes = counts(model), model.stats().read_bytes
    assert not any(event.cancelled for event in trace.events)
    row = replay(trace, "fate", 19)
    assert (row.hits, row.misses, row.guesses, row.guesses_used) == counted
    assert row.bytes_read == n_bytes


def test_a_recording_guesses_no_more_than_any_run(tiny_file: TinyFile, tmp_path: Path) -> None:
    """Where guessing does not pay, what is offered is recorded, and nothing of it is read."""
    recorder = TraceRecorder()
    with ours(tiny_file("qwen3moe"), 19, policy="fate", pace=Never(), recorder=recorder) as model:
        three_sequences(model)
        trace = recorder.save(tmp_path / "t.npz", described(model))
        assert model.stats().guess_loads == 0
        hits = model.hits
    assert trace.has_offers
    assert not any(any(event.offers.chosen) for event in trace.events)
    assert replay(trace, "fate", 19).hits == hits


class SomeTime(Everything):
    """Time for ``n`` guesses after two events of three."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.events = 0

    def event(self, meters: Meters) -> bool:
        self.events += 1
        return self.events % 3 != 0

    def choose(self, guesses: Sequence[Guess], n_bytes: int) -> list[Guess]:
        return [guess for i, guess in enumerate(guesses) if i % 2][: self.n]


class Never(Everything):
    """A pace to which no guess ever pays."""

    def event(self, meters: Meters) -> bool:
        return False


def described(model: Ours) -> dict[str, Any]:
    layout = model.found.layout
    return {
        "n_experts": layout.n_experts,
        "layers": [layer.layer for layer in layout.layers],
        "blob_bytes": [layer.blob_bytes for layer in layout.layers],
    }


def counts(model: Ours) -> tuple[int, int, int, int]:
    used = model.meter.demands().guesses_used
    return model.hits, model.misses, model.stats().guess_loads, used
