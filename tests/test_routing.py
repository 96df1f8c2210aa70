"""Routing statistics survive the disk and add up, and a warm start does what it says.

A warm start may change time, never output; without --warm nothing may know of the file.
"""

from __future__ import annotations

import errno
import itertools
import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Command, TinyFile
from gguf import GGUFReader
from harness import Logits, Model, ours, random_tokens, rows, stock
from test_bench import REQUEST
from test_replay import random_trace

from moe_gguf.policies import POLICIES, Facts, policy
from moe_gguf.policies.base import Phase, RouteEvent
from moe_gguf.policies.cache import LFU
from moe_gguf.policies.eap import ExpertPaths, PathPredictor
from moe_gguf.policies.layered import Layered, hottest
from moe_gguf.policies.trace import Trace, TraceEvent, TraceRecorder
from moe_gguf.runtime.bench.report import table
from moe_gguf.runtime.bench.rounds import bench
from moe_gguf.runtime.cli.replay import replay_document
from moe_gguf.runtime.errors import ExpertReadError, UserError
from moe_gguf.runtime.formats.bundle import TRUNK
from moe_gguf.runtime.formats.gguf_header import ValueType
from moe_gguf.runtime.formats.open import read_layout
from moe_gguf.runtime.history import Identity, Routing, count, load, routing_path
from moe_gguf.runtime.llama import Llama
from moe_gguf.runtime.options import Options

IDENTITY = Identity("qwen3moe", (0, 1, 2), 10, 3)
N_SLOTS = 30


def same(a: Routing, b: Routing) -> bool:
    assert (a.transitions is None) == (b.transitions is None)
    pairs = [(a.popularity, b.popularity), (a.recall, b.recall)]
    if a.transitions is not None and b.transitions is not None:
        pairs.append((a.transitions, b.transitions))
    heads = (a.identity, a.tokens) == (b.identity, b.tokens)
    return heads and all(np.array_equal(x, y) for x, y in pairs)


def counted(seed: int) -> Routing:
    return count(random_trace(seed), IDENTITY, {1: 0.5, 2: 0.25})


# --- counting -----------------------------------------------------------------------------------


def test_counts_are_those_of_a_walk_over_the_tokens() -> None:
    trace = random_trace(3)
    popularity: Counter[tuple[int, int]] = Counter()
    transitions: Counter[tuple[int, int, int]] = Counter()
    events = []
    for first in range(0, len(trace.events), 3):
        step = [event.ids for event in trace.events[first : first + 3]]
        step[2] = step[2][-1:]  # as llama.cpp computes the last layer of a prompt
        for layer, ids in enumerate(step):
            events.append(TraceEvent(layer, Phase.PREFILL, 1, False, ids))
            events.append(TraceEvent(layer, Phase.PREFILL, 1, True, ids))  # its further tensors
            popularity.update((layer, int(e)) for e in ids.ravel())
        for t in range(len(step[0])):
            pairs = itertools.product(step[0][t].tolist(), step[1][t].tolist())
            transitions.update((0, a, b) for a, b in pairs)
        pairs = itertools.product(step[1][-1].tolist(), step[2][0].tolist())
        transitions.update((1, a, b) for a, b in pairs)
    got = count(Trace(trace.metadata, events), IDENTITY, {})
    assert got.tokens == sum(len(e.ids) for e in trace.events if e.layer == 0)
    assert all(got.popularity[key] == n for key, n in popularity.items())
    assert got.popularity.sum() == popularity.total()
    assert got.transitions is not None
    assert all(got.transitions[key] == n for key, n in transitions.items())
    assert got.transitions.sum() == transitions.total()
    assert (got.recall == -1).all()


def test_per_token() -> None:
    got = counted(1)
    uses = got.uses()
    for i, layer in enumerate(IDENTITY.layers):
        of_layer = [u for key, u in uses.items() if key // 10 == layer]
        assert sum(of_layer) == pytest.approx(3)
        assert len(of_layer) == np.count_nonzero(got.popularity[i])
    follows = got.follows()
    assert follows is not None
    assert follows.sum(axis=(1, 2)) == pytest.approx([9, 9])
    assert got.recalls() == {1: 0.5, 2: 0.25}


def test_runs_add_up() -> None:
    a, b = random_trace(1), random_trace(2)
    both = Trace(a.metadata, [*a.events, *b.events])
    known = {1: 0.5, 2: 0.25}
    assert same(count(a, IDENTITY, known) + count(b, IDENTITY, known), count(both, IDENTITY, known))


def test_recall_is_weighed_by_tokens_and_survives_a_run_without_guesses() -> None:
    a = count(random_trace(1, n_events=30), IDENTITY, {1: 0.2})
    b = count(random_trace(1, n_events=90), IDENTITY, {1: 0.6, 2: 0.4})
    sums = (a + b).recalls()
    assert sums.keys() == {1, 2}
    assert sums[1] == pytest.approx((0.2 * a.tokens + 0.6 * b.tokens) / (a.tokens + b.tokens))
    assert sums[2] == pytest.approx(0.4)
    assert (b + count(random_trace(2), IDENTITY, {})).recalls() == pytest.approx(b.recalls())


def test_counts_stop_at_what_the_file_can_hold() -> None:
    one = counted(1)
    assert one.transitions is not None
    full = np.full_like(one.transitions, 2**32 - 2)
    most = Routing(IDENTITY, 2**64 - 2, np.full_like(one.popularity, 2**64 - 2), full, one.recall)
    total = most + one
    assert total.tokens == 2**64 - 1
    assert total.popularity.max() == 2**64 - 1
    assert total.transitions is not None
    assert total.transitions.min() >= 2**32 - 2


def test_transitions_that_would_be_too_big_are_not_kept(tmp_path: Path) -> None:
    identity = IDENTITY._replace(layers=tuple(range(62)), n_experts=525)
    ids = np.array([[1, 2, 524]], np.int16)
    trace = Trace({}, [TraceEvent(0, Phase.DECODE, 1, False, ids)])
    stats = count(trace, identity, {})
    assert stats.transitions is None
    assert stats.follows() is None
    stats.save(tmp_path / "routing.gguf")
    loaded = load(tmp_path / "routing.gguf", identity)
    assert loaded is not None
    assert same(loaded, stats)


# --- the file -----------------------------------------------------------------------------------


def test_statistics_survive_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "model.routing.gguf"
    assert load(path, IDENTITY) is None
    stats = counted(1)
    stats.save(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "a temporary file is left"
    loaded = load(path, IDENTITY)
    assert loaded is not None
    assert same(loaded, stats)
    reader = GGUFReader(path)
    assert reader.fields["GGUF.version"].contents() == 3
    assert reader.fields["moe_gguf.routing.version"].contents() == 1
    assert reader.fields["moe_gguf.routing.layers"].contents() == [0, 1, 2]
    popularity = reader.fields["moe_gguf.routing.popularity"]
    assert popularity.contents() == stats.popularity.ravel().tolist()
    assert popularity.types[1] == ValueType.UINT64


def test_where_statistics_lie(tmp_path: Path) -> None:
    assert routing_path(tmp_path / "a.b.gguf") == tmp_path / "a.b.routing.gguf"
    assert routing_path(tmp_path / "plain") == tmp_path / "plain.routing.gguf"
    (tmp_path / TRUNK).touch()
    assert routing_path(tmp_path) == tmp_path / "routing.gguf"


@pytest.mark.parametrize(
    "other",
    [{"architecture": "olmoe"}, {"layers": (0, 1, 3)}, {"n_experts": 11}, {"n_used": 2}],
    ids=lambda other: next(iter(other)),
)
def test_another_model_s_statistics_are_refused(other: dict[str, object], tmp_path: Path) -> None:
    counted(1).save(tmp_path / "routing.gguf")
    with pytest.raises(UserError, match="of another model") as error:
        load(tmp_path / "routing.gguf", IDENTITY._replace(**other))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("seed", range(150))
def test_a_damaged_file_is_refused_or_harmless(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    path = tmp_path / "routing.gguf"
    counted(1).save(path)
    data = bytearray(path.read_bytes())
    if seed % 5 == 0:
        del data[rng.randrange(len(data)) :]
    for _ in range(rng.choice([1, 1, 4]) if data else 0):
        data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(data)
    sentence, stats = "", None
    try:
        stats = load(path, IDENTITY)
    except UserError as error:
        sentence = str(error)
    if stats is None:
        assert str(path) in sentence
        assert "\n" not in sentence
        return
    (stats + counted(2)).save(path)
    assert load(path, IDENTITY) is not None
    for name in POLICIES:
        facts = Facts(
            12,
            10,
            3,
            [0, 1, 2],
            recall=stats.recalls(),
            popularity=stats.uses(),
            transitions=stats.follows,
        )
        cache = policy(name, facts).cache
        for key in hottest(stats.uses(), 12, cache)[::-1]:
            cache.admit(key)
        cache.check_integrity()


# --- policies -----------------------------------------------------------------------------------


def test_lfu_begins_where_an_endless_mix_would_have_led() -> None:
    shares = {0: 4, 1: 2, 2: 1, 3: 1}
    mixed = LFU(half_life=200.0)  # so slow that the order within the mix does not show
    cycle = [key for key, n in shares.items() for _ in range(n)]
    random.Random(1).shuffle(cycle)
    for key in dict.fromkeys(cycle):
        mixed.admit(key)
    for _ in range(2000):
        for key in cycle:
            mixed.touch(key)
    seeded = LFU(200.0, {key: n / 8 for key, n in shares.items()})
    for key in shares:
        assert seeded._scores[key] == pytest.approx(mixed._scores[key] / mixed._weight, rel=0.01)


def test_lfu_evicts_by_what_it_knows_of_earlier_runs() -> None:
    cache = LFU(history={1: 0.1, 2: 0.7, 3: 0.9, 4: 0.3})
    for key in (1, 4, 2, 3):
        cache.admit(key)
    cache.check_integrity()
    assert [cache.evict(()) for _ in range(4)] == [1, 4, 2, 3]


def test_hottest_keeps_to_quotas() -> None:
    popularity = {0: 0.9, 1: 0.8, 2: 0.7, 10: 0.1, 11: 0.2, 20: 0.3}
    assert hottest(popularity, 4, LFU()) == [0, 1, 2, 20]
    layered = Layered(10, {0: 2, 1: 1, 2: 0}, lambda layer, quota: LFU())
    assert hottest(popularity, 4, layered) == [0, 1, 11]


def test_measured_recall_gives_fate_s_layers_their_quotas() -> None:
    stats = count(random_trace(1), IDENTITY, {1: 0.2, 2: 0.9})
    cold = policy("fate-paper", Facts(24, 10, 3, IDENTITY.layers)).cache
    warm = policy("fate-paper", Facts(24, 10, 3, IDENTITY.layers, recall=stats.recalls())).cache
    assert isinstance(cold, Layered)
    assert isinstance(warm, Layered)
    assert cold.quotas == {0: 10, 1: 7, 2: 7}
    assert warm.quotas == {0: 10, 1: 10, 2: 4}


def test_paths_guess_and_judge_from_the_first_token_on() -> None:
    transitions = np.zeros((1, 8, 8), np.float32)
    transitions[0, 1, [5, 6]] = 0.5
    paths = ExpertPaths([0, 1], 8, {3: 0.2, 8 + 2: 0.9}, transitions)
    worth = paths.worth()
    assert worth[1].argmax() == 2
    predictor = PathPredictor(paths)
    event = RouteEvent(0, 1, [0, 1], [1, 1], Phase.DECODE, 1)
    predictor.observe(event, lambda: np.array([[0, 1]], np.int32))
    guesses = predictor.guess(event, lambda: np.zeros((1, 4), np.float32))
    assert {guess.key for guess in guesses} == {8 + 5, 8 + 6}
    paths.begin_sequence()
    assert paths.uses[1, 2] == np.float32(0.9)


# --- starting warm --------------------------------------------------------------------------------


def generation(model: Model) -> Logits:
    context = model.context()
    logits = [context.decode(rows(random_tokens(24)))]
    for i in range(8):
        logits.append(context.decode(rows([int(logits[-1][-1].argmax())], 24 + i)))
    return np.concatenate(logits)


@pytest.fixture(scope="module")
def reference(tiny_file: TinyFile) -> Logits:
    with stock(tiny_file("qwen3moe")) as model:
        return generation(model)


@pytest.fixture
def recorded(tiny_file: TinyFile, tmp_path: Path) -> Path:
    """A model with statistics of the very run that the tests repeat."""
    path = shutil.copy(tiny_file("qwen3moe"), tmp_path / "model.gguf")
    recorder = TraceRecorder()
    with ours(path, recorder=recorder, policy="fate") as model:
        generation(model)
        found, layout = model.found, model.found.layout
        metadata = {
            "n_experts": layout.n_experts,
            "layers": [layer.layer for layer in layout.layers],
            "blob_bytes": [layer.blob_bytes for layer in layout.layers],
        }
        trace = recorder.save(tmp_path / "trace", metadata)
        recall = model.arena.gate_recall()
        assert recall.keys() == {layer.layer for layer in layout.layers[1:]}
        count(trace, found.identity, recall).save(found.history_path)
    return path


@pytest.mark.parametrize("name", POLICIES)
def test_a_warm_run_gives_the_same_logits(name: str, recorded: Path, reference: Logits) -> None:
    with ours(recorded, N_SLOTS, policy=name, warm=True) as model:
        assert model.arena.n_warmed == (0 if name == "load-on-demand" else N_SLOTS)
        assert np.array_equal(generation(model), reference)


@pytest.mark.parametrize("name", ["lru", "lfu", "layered-lfu"])
def test_a_warm_start_reads_what_it_says_and_no_more(name: str, recorded: Path) -> None:
    with ours(recorded, N_SLOTS, policy=name, warm=True) as model:
        found, residency = model.found, model.controller.residency
        stats = load(found.history_path, found.identity)
        assert stats is not None
        wanted = hottest(stats.uses(), N_SLOTS, residency.cache)
        assert set(residency.slot_of) == set(wanted)
        assert len(wanted) == N_SLOTS == model.arena.n_warmed
        held = model.plugin.slot_keys()
        assert all(held[slot] == key for key, slot in residency.slot_of.items())
        blob_bytes = {layer.layer: layer.blob_bytes for layer in found.layout.layers}
        n_experts = found.layout.n_experts
        assert model.plugin.stats().read_bytes == sum(
            blob_bytes[key // n_experts] for key in wanted
        )
        assert model.hits == model.misses == 0
        assert f"{N_SLOTS} of {N_SLOTS} slots" in model.arena.warm_line()


@pytest.mark.parametrize("name", ["lru", "lfu", "layered-lfu", "eap"])
def test_the_first_token_hits_more_when_warm(name: str, recorded: Path) -> None:
    hits = {}
    for warm in (False, True):
        with ours(recorded, 60, policy=name, warm=warm) as model:
            context = model.context()
            for i, token in enumerate(random_tokens(3)):
                context.decode(rows([token], i))
            hits[warm] = model.hits
    assert hits[True] > 1.5 * hits[False]


def test_more_slots_than_experts_ever_used(recorded: Path) -> None:
    with ours(recorded, warm=True) as model:
        stats = load(model.found.history_path, model.found.identity)
        assert stats is not None
        assert model.arena.n_warmed == np.count_nonzero(stats.popularity)
        generation(model)
        assert model.misses == 0


@pytest.mark.parametrize("err", [errno.EIO, 0])
def test_a_read_error_while_warming_leaves_nothing_half_loaded(
    err: int, recorded: Path, reference: Logits
) -> None:
    with ours(recorded, N_SLOTS) as model:
        residency = model.controller.residency
        stats = load(model.found.history_path, model.found.identity)
        assert stats is not None
        model.plugin.inject(7, err)
        keys = hottest(stats.uses(), N_SLOTS, residency.cache)
        with pytest.raises(ExpertReadError, match=r"model\.gguf"):
            model.arena.fill(keys)
        assert len(residency.slot_of) < N_SLOTS
        model.check()
        assert np.array_equal(generation(model), reference)


def test_ctrl_c_while_warming(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def progress(done: float, total: float) -> None:
        if done > read_layout(recorded).trunk_bytes:
            assert done <= total
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Llama(recorded, memory="1GB", n_threads=1, warm=True, progress=progress)


def test_llama_starts_warm(recorded: Path) -> None:
    reports: list[tuple[float, float]] = []
    llama = Llama(
        recorded,
        memory="1GB",
        n_threads=1,
        warm=True,
        progress=lambda done, total: reports.append((done, total)),
    )
    assert llama.arena.n_warmed
    assert reports[-1][0] == reports[-1][1]
    assert llama.stats()["bytes_read"] == 0  # of opening, not of generating
    llama.close()


# --- the command line -----------------------------------------------------------------------------

ONE = ("--threads", 1)


@pytest.fixture
def model_copy(tiny_file: TinyFile, tmp_path: Path) -> Path:
    return Path(shutil.copy(tiny_file("qwen3moe"), tmp_path / "model.gguf"))


def traced(model: Path, to: Path) -> tuple[object, ...]:
    """A command that records a short run, by a policy whose replay is the run's own."""
    return ("trace", model, *ONE, "-p", "Hello", "-n", 4, "-o", to, "--policy", "lru")


def test_trace_adds_and_run_starts_warm(
    moe_gguf: Command,
    model_copy: Path,
    tmp_path: Path,
) -> None:
    file = tmp_path / "model.routing.gguf"
    said = moe_gguf("run", model_copy, *ONE, "--warm", "-p", "Hello", "-n", 4, "--temp", 0)
    assert said.code == 0
    assert f"nothing to start warm from: {file} does not exist" in said.err
    trace = traced(model_copy, tmp_path / "t")
    first = moe_gguf(*trace, "--save-routing")
    assert first.code == 0
    assert f"wrote {file}: routing statistics of 5 tokens" in first.err
    assert "of 10 tokens" in moe_gguf(*trace, "--save-routing").err
    warm = moe_gguf("run", model_copy, *ONE, "--warm", "-p", "Hello", "-n", 4, "--temp", 0)
    assert warm.out == said.out
    assert "started warm: " in warm.err
    # What was recorded cold can be replayed, file or no file; a warm run cannot.
    assert replay_document(tmp_path / "t", "lru", None)["recorded"]["reproduced"]
    assert moe_gguf(*trace, "--warm").code == 0
    assert replay_document(tmp_path / "t", "lru", None)["recorded"] is None


def test_mistakes_with_statistics_are_told_before_the_work(
    moe_gguf: Command,
    model_copy: Path,
    tmp_path: Path,
) -> None:
    file = tmp_path / "model.routing.gguf"
    counted(1).save(file)
    trace = traced(model_copy, tmp_path / "t")
    assert "of another model" in moe_gguf("run", model_copy, "--warm", "-p", "x").error(2)
    refused = moe_gguf(*trace, "--save-routing")
    assert (refused.code, refused.out) == (2, "")
    assert "of another model" in refused.err
    file.write_bytes(b"GGUF")
    assert f"delete {file}" in moe_gguf("run", model_copy, "--warm", "-p", "x").error(2)
    file.unlink()
    file.mkdir()
    refused = moe_gguf(*trace, "--save-routing")
    assert (refused.code, refused.out) == (2, "")
    assert "it is a folder" in refused.err


@pytest.mark.usefixtures("known_disk")
def test_bench_starts_warm_or_not_at_all(recorded: Path) -> None:
    request = replace(REQUEST, model=recorded, rows="lru", options=Options(warm=True))
    outcome = bench(request, note=lambda text: None)
    assert not outcome.errors
    (run,) = outcome.document["rows"][0]["runs"]
    assert run["warmed"] > 0
    assert "filled from routing statistics in capped rows" in table(outcome.document)
    routing_path(recorded).unlink()
    with pytest.raises(UserError, match="trace --save-routing"):
        bench(request, note=lambda text: None)
