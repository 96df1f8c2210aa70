"""Identity gates of devices: logits through pools on a device equal stock's on the same device.

The device is the one of native/lag.cpp, whose kernels are the processor's, so both are also equal
to stock without a device. A pass proves:

 1  whole      layers with room for all experts: nothing is asked, a graph is one launch
 2  pools      room for some: what is missing is copied, exactly that, with one wait per layer
 3  ranges     an event of more experts than a pool has slots, down to what one token uses
 3  window     likewise with room for all of a layer: stock also for prompts, and pools stay
 4  waits      each kind of wait that is left out is seen
 5  memory     slots that are written again while copies read them; memory that is not pinned
 6  layers     some layers on the device, the rest on the processor
 7  contexts   several sequences, and two contexts on one model in turn
 8  policies   every named one, guesses included; what memory is for
 9  failures   a read that fails, and the same step again
10  users      the command line's options, the library's Llama, a plan
11  calls      copies that lie evenly apart go in one, and change nothing
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import tiny
from conftest import TinyFile
from harness import Events, Logits, Model, Ours, Row, ours, random_tokens, rows, same, stock
from lag import COMPUTE_WAITS, COPY_WAITS, HOST_WAITS, NAME, SYNCHRONIZE, Lag, lag

from moe_gguf import Engine, Llama, UserError
from moe_gguf.policies import POLICIES
from moe_gguf.policies.base import Phase
from moe_gguf.policies.layered import Layered
from moe_gguf.policies.pace import Everything
from moe_gguf.policies.tiers import Tiers
from moe_gguf.runtime import logs
from moe_gguf.runtime.budget import DeviceNeeds, fit_pools, pool_slots
from moe_gguf.runtime.cli.plan import plan_document, plan_text
from moe_gguf.runtime.errors import ExpertReadError
from moe_gguf.runtime.options import Options
from moe_gguf.runtime.plugin.devices import choose, devices
from moe_gguf.runtime.sizes import MB

__all__ = ["lag"]  # a fixture

# Where ggml-cpu takes another kernel for 8 rows of an expert and more, a range would show it.
FEW = 12
N_STEPS = 6
N_USED = {"mixtral": 2, "llama4": 1}  # experts per token; of other layouts 4
DEVICE = {"device": NAME.lower()}

Script = Callable[[Model], Logits]
Reference = Callable[[Path, Script], Logits]


@pytest.fixture(scope="module")
def reference(lag: Lag) -> Reference:
    """What stock answers to a script, on the device and without; each is run once."""
    known: dict[tuple[Path, Script], Logits] = {}

    def get(path: Path, script: Script) -> Logits:
        if (path, script) not in known:
            with stock(path, device=NAME) as model:
                known[path, script] = script(model)
            with stock(path) as model:
                assert np.array_equal(known[path, script], script(model))
        return known[path, script]

    return get


def generation(model: Model) -> Logits:
    context = model.context()
    logits = [context.decode(rows(random_tokens(FEW)))]
    for i in range(N_STEPS):
        logits.append(context.decode(rows([int(logits[-1][-1].argmax())], FEW + i)))
    return np.concatenate(logits)


def long_prompt(model: Model) -> Logits:
    return model.context().decode(rows(random_tokens(64)))


def token_by_token(model: Model) -> Logits:
    context = model.context()
    return np.concatenate(
        [context.decode(rows([token], i)) for i, token in enumerate(random_tokens(12))]
    )


def sequences_and_contexts(model: Model) -> Logits:
    contexts = [model.context(n_seq_max=3), model.context()]
    starts = [3, 4, 5]
    batch = [row for s, n in enumerate(starts) for row in rows(random_tokens(n, s), seq=s)]
    logits = [contexts[0].decode(batch), contexts[1].decode(rows(random_tokens(7, 9)))]
    for i in range(4):
        logits.append(contexts[0].decode([Row(i + s, n + i, seq=s) for s, n in enumerate(starts)]))
        logits.append(contexts[1].decode(rows([5 * i], 7 + i)))
    return np.concatenate(logits)


def unread(model: Model) -> Logits:
    """Two contexts, the second of which begins while the first may still compute."""
    contexts = [model.context(), model.context()]
    logits = []
    for i in range(12):
        for context, token in zip(contexts, random_tokens(2, seed=i), strict=True):
            context.batch.clear()
            context.batch.add((token,), i, 0, 1)
            context.step(Phase.DECODE)
        logits += [context.logits(0).copy() for context in contexts]
    return np.stack(logits)


def n_used(layout: str) -> int:
    return N_USED.get(layout, 4)


def n_splits(model: Ours) -> set[int]:
    """Pieces that the scheduler makes of a graph, as llama.cpp says."""
    with logs.capture() as log:
        params = llama_cpp.llama_context_default_params()
        llama_cpp.llama_free(llama_cpp.llama_init_from_model(model.model, params))
    return {int(n) for _, line in log.lines for n in re.findall(r"splits = (\d+)", line)}


def expert_bytes(model: Ours) -> int:
    sizes = {sum(t.expert_bytes for t in layer.tensors) for layer in model.found.layout.layers}
    return sizes.pop()


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_01_whole(layout: str, tiny_file: TinyFile, reference: Reference, lag: Lag) -> None:
    path = tiny_file(layout)
    expected = reference(path, generation)
    with ours(path, **DEVICE) as model:
        lag.count()
        same(generation(model), expected)
        count = lag.count()
        assert model.stats().waits == model.stats().uploads == 0
        assert count.launches == 1 + N_STEPS
        assert n_splits(model) == {2}


def test_01_nothing_begins_before_all_of_it_is_there(
    tiny_file: TinyFile, reference: Reference, lag: Lag
) -> None:
    path = tiny_file("qwen3moe")
    expected = reference(path, generation)
    with lag.delayed(us=100_000), ours(path, **DEVICE) as model:
        same(generation(model), expected)


@pytest.mark.parametrize("layout", [*tiny.LAYOUTS, "scaled", "mixed"])
def test_02_pools(layout: str, tiny_file: TinyFile, reference: Reference, lag: Lag) -> None:
    flags = {"scaled": {"scales": True}, "mixed": {"mixed": True}}.get(layout, {})
    path = tiny_file("qwen3moe" if flags else layout, **flags)
    expected = reference(path, token_by_token)
    with ours(path, n_pool=2 * n_used(layout), **DEVICE) as model:
        lag.count()
        same(token_by_token(model), expected)
        stats, layers = model.stats(), model.found.layout.layers
        assert model.hits > 0
        assert stats.uploads == model.misses > 2 * n_used(layout) * len(layers)
        if layout != "mixed":
            assert stats.upload_bytes == model.misses * expert_bytes(model)
        assert stats.waits == 12 * len(layers)
        assert stats.ranges == 0
        assert lag.count().upload_bytes == stats.upload_bytes
        assert n_splits(model) == {2}


@pytest.mark.parametrize("layout", [*tiny.LAYOUTS, "scaled"])
def test_03_ranges(layout: str, tiny_file: TinyFile, reference: Reference) -> None:
    path = tiny_file("qwen3moe", scales=True) if layout == "scaled" else tiny_file(layout)
    with ours(path, n_pool=n_used(layout), **DEVICE) as model:
        same(generation(model), reference(path, generation))
        assert model.stats().ranges > 0


def pairs_of_tokens(model: Model) -> Logits:
    context = model.context(n_seq_max=2)
    steps = [[Row(3 * i + s, i, seq=s) for s in range(2)] for i in range(24)]
    return np.concatenate([context.decode(step) for step in steps])


@pytest.mark.parametrize("n_windows", [1, 2])
def test_03_window_now_and_then(
    n_windows: int, tiny_file: TinyFile, reference: Reference, lag: Lag
) -> None:
    """One graph whose events now fit the pool and now do not: the device records its launches."""
    path, events = tiny_file("qwen3moe"), Events()
    with (
        lag.delayed(us=1000),
        ours(path, n_pool=6, n_windows=n_windows, recorder=events, **DEVICE) as model,
    ):
        same(pairs_of_tokens(model), reference(path, pairs_of_tokens))
        widths = [len(set(ids)) for ids in events.ids]
        assert min(widths) <= 6 < max(widths)
        assert model.stats().ranges == 0


@pytest.mark.parametrize("n_windows", [1, 2])
@pytest.mark.parametrize("n_slots", [None, 3])
@pytest.mark.parametrize("layout", [*tiny.LAYOUTS, "scaled"])
def test_03_window(
    layout: str, n_slots: int | None, n_windows: int, tiny_file: TinyFile, reference: Reference
) -> None:
    path = tiny_file("qwen3moe", scales=True) if layout == "scaled" else tiny_file(layout)
    with ours(path, n_slots, n_pool=n_used(layout), n_windows=n_windows, **DEVICE) as model:
        context = model.context()
        for i, token in enumerate(random_tokens(8, seed=2)):
            context.decode(rows([token], i))
        held = [model.plugin.pool_keys(n.layer) for n in model.found.layout.layers]
        same(long_prompt(model), reference(path, long_prompt))
        assert model.stats().ranges == 0
        assert held == [model.plugin.pool_keys(n.layer) for n in model.found.layout.layers]
        same(generation(model), reference(path, generation))


def prompts(model: Model) -> Logits:
    return np.concatenate([long_prompt(model) for _ in range(3)])


def test_03_the_next_layer_comes_meanwhile(
    tiny_file: TinyFile, reference: Reference, lag: Lag
) -> None:
    """Prompts that ask for all experts: the last layer's are copied before it asks. The first and
    the last share a window; the layer between them has the other one to itself, and keeps it."""
    path = tiny_file("qwen3moe")
    expected = reference(path, prompts)
    with lag.delayed(us=1000), ours(path, n_pool=4, n_windows=2, **DEVICE) as model:
        same(long_prompt(model), expected[: len(expected) // 3])  # fills memory
        before, misses = model.stats(), model.misses
        same(prompts(model), expected)
        now, missing = model.stats(), 3 * (16 - 4)  # of one layer
        assert model.misses - misses == 3 * missing
        assert now.uploads - before.uploads == 2 * missing
        assert now.uploads_ahead - before.uploads_ahead == missing
        assert before.uploads_ahead == 0


def test_03_a_first_prompt_brings_each_expert_once(
    tiny_file: TinyFile, reference: Reference, lag: Lag
) -> None:
    """What came ahead goes from the window to the pool, which keeps what it has room for."""
    path = tiny_file("qwen3moe")
    expected = reference(path, prompts), reference(path, token_by_token)
    with lag.delayed(us=1000), ours(path, n_pool=6, n_windows=2, **DEVICE) as model:
        model.arena.fill(range(48))
        same(prompts(model), expected[0])
        stats = model.stats()
        assert stats.uploads == 48 + 2 * 2 * (16 - 6)  # the layer between keeps its window
        assert stats.uploads_ahead > 0
        same(token_by_token(model), expected[1])


def one_prompt_again(model: Model) -> Logits:
    """The last layer is computed for one token, whose experts its pool soon has."""
    context = model.context(n_seq_max=7)
    tokens = random_tokens(40)
    logits = [context.decode(rows(tokens, seq=6))]  # brings all into memory
    for s in range(6):
        prompt = [Row(t, i, s, i == len(tokens) - 1) for i, t in enumerate(tokens)]
        logits.append(context.decode(prompt))
    return np.concatenate(logits)


def test_03_what_was_foreseen_in_vain_is_on_its_way_still(
    tiny_file: TinyFile, reference: Reference, lag: Lag
) -> None:
    """Into the window that the next prompt's first layer has, when that fills it."""
    path = tiny_file("qwen3moe")
    expected = reference(path, one_prompt_again)
    with (
        lag.delayed(us=0, bytes_per_s=4 * 10**6),
        ours(path, n_pool=6, n_windows=2, **DEVICE) as model,
    ):
        same(one_prompt_again(model), expected)
        assert model.stats().uploads_ahead > 0


WAITS: dict[str, tuple[int, dict[str, Any]]] = {
    "for ids": (SYNCHRONIZE, {"n_pool": 8}),
    "for copies": (COMPUTE_WAITS, {"n_pool": 8}),
    "for copies to the window": (COMPUTE_WAITS, {"n_pool": 4, "n_windows": 1}),
    "for copies ahead": (COMPUTE_WAITS, {"n_pool": 4, "n_windows": 2}),
    "for the range before": (COPY_WAITS, {"n_pool": 4}),
    "for what a copy reads": (HOST_WAITS, {"n_pool": 4, "n_slots": 4}),
}


@pytest.mark.parametrize("kind", WAITS)
def test_04_waits(kind: str, tiny_file: TinyFile, reference: Reference, lag: Lag) -> None:
    path = tiny_file("qwen3moe")
    expected = reference(path, generation)
    waits, sizes = WAITS[kind]
    with lag.delayed(us=1000):
        with ours(path, **sizes, **DEVICE) as model:
            same(generation(model), expected)
        model = Ours(path, **sizes, **DEVICE)
        with contextlib.closing(model), lag.ignoring(waits):
            assert is_seen(model, expected), "nothing tests this wait"


def is_seen(model: Ours, expected: Logits) -> bool:
    """Whether a generation goes wrong; ids that are read too early may not even be any."""
    try:
        return not np.array_equal(generation(model), expected)
    except RuntimeError as error:
        return "damaged" in str(error)


@pytest.mark.parametrize("reads", ["buffered", "direct"])
def test_05_memory(
    reads: str, tiny_file: TinyFile, reference: Reference, direct_io: None, lag: Lag
) -> None:
    path = tiny_file("qwen3moe")
    with ours(path, 4, n_pool=5, reads=reads, **DEVICE) as model:
        same(generation(model), reference(path, generation))
        stats = model.stats()
        assert stats.read_bytes > stats.upload_bytes // 2
        assert model.plugin.is_pinned
        assert "pageable" not in model.arena.mode_line()
    with lag.refusing_pinned_memory(), ours(path, 4, n_pool=5, reads=reads, **DEVICE) as model:
        same(generation(model), reference(path, generation))
        assert not model.plugin.is_pinned
        assert "pageable" in model.arena.mode_line()


@pytest.mark.parametrize("gpu_layers", [0, 1, 2, 3, 4])
def test_06_layers(gpu_layers: int, tiny_file: TinyFile, reference: Reference) -> None:
    path = tiny_file("qwen3moe")
    with ours(path, 11, n_pool=6, gpu_layers=gpu_layers, **DEVICE) as model:
        same(generation(model), reference(path, generation))
        stats = model.stats()
        assert (stats.uploads > 0) == (gpu_layers > 1)
        assert model.arena.found.device == ("cpu" if gpu_layers == 0 else NAME.lower())


@pytest.mark.parametrize("n_pool", [None, 4, 10])
def test_07_contexts(n_pool: int | None, tiny_file: TinyFile, reference: Reference) -> None:
    path = tiny_file("qwen3moe")
    with ours(path, 9, n_pool=n_pool, **DEVICE) as model:
        same(sequences_and_contexts(model), reference(path, sequences_and_contexts))


def test_07_a_context_while_another_computes(
    tiny_file: TinyFile, reference: Reference, lag: Lag
) -> None:
    """The one layer on the device is the last one: its launch has no later one to wait for."""
    path = tiny_file("qwen3moe")
    with lag.delayed(us=3000), ours(path, n_pool=4, gpu_layers=2, **DEVICE) as model:
        same(unread(model), reference(path, unread))


@pytest.mark.parametrize("policy", POLICIES)
def test_08_policies(policy: str, tiny_file: TinyFile, reference: Reference) -> None:
    path = tiny_file("qwen3moe")
    guesses = policy in ("eap", "fate", "fate-paper", "klotski")
    pace = Everything() if guesses else None
    with ours(path, 19, n_pool=6, policy=policy, pace=pace, **DEVICE) as model:
        same(token_by_token(model), reference(path, token_by_token))
        same(generation(model), reference(path, generation))
        assert (model.stats().guess_loads > 0) == guesses


def in_groups(model: Model) -> Logits:
    context = model.context(n_seq_max=8)
    steps = [[Row(7 * i + s, i, seq=s) for s in range(8)] for i in range(10)]
    return np.concatenate([context.decode(step) for step in steps])


@pytest.mark.parametrize("n_windows", [1, 2])
@pytest.mark.parametrize("policy", ["fate", "klotski", "scan"])
def test_08_a_group_that_goes_round(
    policy: str, n_windows: int, tiny_file: TinyFile, reference: Reference
) -> None:
    """What memory does not keep streams through a few of its slots to the device."""
    path = tiny_file("qwen3moe")
    with ours(path, 19, n_pool=5, n_windows=n_windows, policy=policy, **DEVICE) as model:
        residency = model.controller.residency
        assert isinstance(residency, Tiers)
        scan, scans = residency.scan, []
        assert scan is not None
        observe = scan.observe
        scan.observe = lambda event: (  # type: ignore[method-assign]
            scans.append(observe(event)) or scans[-1]
        )
        same(in_groups(model), reference(path, in_groups))
        assert sum(scans) > len(scans) // 2


def test_08_memory_is_for_what_the_device_lacks(tiny_file: TinyFile) -> None:
    path = tiny_file("qwen3moe")
    pools = {0: 4, 1: 16, 2: 4}
    with ours(path, 32, n_pool=pools, policy="layered-lfu", **DEVICE) as model:
        residency = model.controller.residency
        assert isinstance(residency, Tiers)
        assert isinstance(residency.cache, Layered)
        assert residency.cache.quotas == {0: 16, 2: 16}
        model.arena.fill(range(48))
        assert sorted(residency.slot_of) == [*range(16), *range(32, 48)]
        assert residency.is_complete([0, 1, 2])
        token_by_token(model)


def test_09_a_read_that_fails(tiny_file: TinyFile, reference: Reference) -> None:
    """The step fails with the read's sentence, and the tables are true again."""
    path = tiny_file("qwen3moe")
    with ours(path, 7, n_pool=6, **DEVICE) as model:
        model.plugin.inject(9, 5)
        with pytest.raises(ExpertReadError):
            generation(model)
        model.check()
        same(generation(model), reference(path, generation))


def test_10_devices_by_name(lag: Lag) -> None:
    assert choose("cpu") is None
    chosen = choose(NAME.lower())
    assert chosen is not None
    assert chosen == choose("auto") == devices()[0]
    with pytest.raises(UserError, match=f"no device 'cuda7' here: .* {NAME.lower()}"):
        choose("cuda7")


def test_10_llama(tiny_file: TinyFile, lag: Lag) -> None:
    path = str(tiny_file("qwen3moe"))

    def text(**options: Any) -> tuple[str, dict[str, Any]]:
        llama = Llama(path, memory="1GB", repack="off", n_ctx=256, **options)
        try:
            answer = llama.create_completion("Hello", max_tokens=8, temperature=0.0)
            return answer["choices"][0]["text"], llama.stats()
        finally:
            llama.close()

    plain, _ = text()
    on_device, stats = text(**DEVICE, device_memory="6MB")
    assert on_device == plain
    assert stats["device"] == NAME.lower()
    assert 0 < stats["device_slots"] < 48
    assert stats["bytes_uploaded"] > 0


def test_10_engine(tiny_file: TinyFile, lag: Lag) -> None:
    """Several at once, on the device and on the processor."""
    path = tiny_file("qwen3moe")

    def texts(**options: Any) -> list[str]:
        with contextlib.closing(
            Engine(path, memory="1GB", repack="off", n_ctx=256, parallel=3, **options)
        ) as engine:
            asked = [engine.submit(random_tokens(9, s), temp=0.0, max_tokens=6) for s in range(3)]
            return [generation.result().text for generation in asked]

    assert texts(**DEVICE, device_memory="11MB") == texts()


def test_10_plan(tiny_file: TinyFile, lag: Lag) -> None:
    """Three tiers, and the pools that a run then has."""
    path = tiny_file("qwen3moe")
    given = {**DEVICE, "device_memory": "6MB", "memory": "1GB"}
    document = plan_document(path, n_ctx=256, **given)
    llama = Llama(str(path), n_ctx=256, **given)
    try:
        # Graph buffers of the library's context are a little larger.
        slots = document["on_device"]["slots"]
        assert llama.stats()["device_slots"] == pytest.approx(slots, abs=5)
    finally:
        llama.close()
    text = plan_text(document)
    assert f"on {NAME.lower()}" in text
    with pytest.raises(UserError, match=r"device memory .* the smallest that works is \d+MB"):
        Llama(str(path), n_ctx=256, **{**given, "device_memory": "1MB"})
    with pytest.raises(UserError, match="a device computes with weights as the file has them"):
        Llama(str(path), n_ctx=256, repack="on", **given)


def test_10_pools_share_what_is_left() -> None:
    needs = DeviceNeeds(10 * MB, 20 * MB, 30 * MB)
    sizes = {0: MB, 1: 2 * MB, 5: MB}
    budget = fit_pools(60 * MB + 22 * MB, needs, sizes, n_experts=8, n_used=2)
    assert budget.n_slots == {0: 6, 1: 5, 5: 6} or budget.experts <= 22 * MB
    assert budget.experts <= 22 * MB
    assert max(budget.n_slots.values()) - min(budget.n_slots.values()) <= 1
    everything = fit_pools(1000 * MB, needs, sizes, n_experts=8, n_used=2)
    assert set(everything.n_slots.values()) == {8}
    with pytest.raises(UserError, match="69MB"):
        fit_pools(60 * MB, needs, sizes, n_experts=8, n_used=2)


@pytest.mark.parametrize(
    ("room", "n_whole", "least"),
    [(48, 0, 4), (96, 0, 8), (168, 6, 8), (192, 8, 8), (240, 12, 20)],
)
def test_10_what_is_beyond_two_fifths_makes_layers_whole(
    room: int, n_whole: int, least: int
) -> None:
    slots = pool_slots(room * MB, dict.fromkeys(range(12), MB), 20, 4)
    assert sum(slots.values()) == room
    assert sum(n == 20 for n in slots.values()) == n_whole
    assert min(slots.values()) == least
    asked = [layer for layer, n in slots.items() if n < 20]
    assert asked == [(i + 1) * 12 // len(asked) - 1 for i in range(len(asked))]


def test_10_options_of_devices() -> None:
    named = {field.name for field in dataclasses.fields(Options)}
    assert {"device", "device_memory", "gpu_layers"} <= named
    with pytest.raises(UserError, match="layers make no sense"):
        Options(gpu_layers=-1)


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_11_an_experts_matrices_in_one_call(
    layout: str, tiny_file: TinyFile, reference: Reference, lag: Lag
) -> None:
    path = tiny_file(layout)
    expected = reference(path, token_by_token)
    calls = {}
    for joined in (False, True):
        with ours(path, n_pool=2 * n_used(layout), **DEVICE) as model:
            model.arena.plugin.join_copies(joined)
            lag.count()
            same(token_by_token(model), expected)
            count, stats, layers = lag.count(), model.stats(), model.found.layout.layers
            assert count.upload_bytes == stats.upload_bytes
            calls[joined] = count.upload_calls / stats.uploads
            n_weights = len(layers[0].tensors)
            sizes = {t.expert_bytes for layer in layers for t in layer.tensors}
    assert calls[False] == n_weights
    if len(sizes) == 1:
        assert calls[True] == 1
    else:
        assert calls[True] < n_weights


@pytest.mark.parametrize("n_windows", [1, 2])
def test_11_neighbours_in_one_call(
    n_windows: int, tiny_file: TinyFile, reference: Reference, lag: Lag
) -> None:
    """Prompts that ask for all experts; memory was filled as they were asked for, and has room for
    all: then what no pool has are runs of neighbours, each matrix of which is a call."""
    path = tiny_file("qwen3moe")
    expected = reference(path, prompts)
    calls = {}
    for joined in (False, True):
        with ours(path, n_pool=4, n_windows=n_windows, **DEVICE) as model:
            residency, n_layers = model.controller.residency, len(model.found.layout.layers)
            same(long_prompt(model), expected[: len(expected) // 3])  # fills memory
            keys = sorted(residency.slot_of, key=residency.slot_of.__getitem__)
            assert keys == list(range(16 * n_layers))
            model.arena.plugin.join_copies(joined)
            lag.count()
            uploads = model.stats().uploads
            same(prompts(model), expected)
            calls[joined] = lag.count().upload_calls
            uploads = model.stats().uploads - uploads
    assert calls[False] == 3 * uploads
    # Four experts in a pool leave at most five runs.
    assert calls[True] <= 3 * n_layers * 5 * 3 < calls[False]
