"""Identity gates: logits through the plugin equal stock llama.cpp's, to the last bit.

Stock is the same build with ``use_extra_bufts=False`` on the same file. Every gate also proves,
from counters, that what it is about really happened. A pass proves:

 1  resident      all experts in slots: later steps read nothing and run the graph's own nodes
 2  tight         40 % of the slots: hits, misses, evictions; misses are read while hits compute
 3  recycling     two slots, fewer than one layer's union: slots are used again within a layer
 4  long prefill  320 tokens at once: 8 and more rows per expert take ggml's tiled kernels
 5  sequences     three sequences in one batch, prefill and decode
 6  contexts      two contexts on one model, in turn and in two threads at once
 7  split         experts spread over several files
 8  mixed         types that differ between layers and between gate, up and down
 9  reads         buffered; direct through bounce buffers; direct in place; one lane and eight
10  guesses       random and useless guesses, with and without room: read, used, evicted, cancelled;
                  under every policy's cache; those of routers, also of wrong ones
11  policies      every named policy, and experts loaded in random order
12  pieces        graphs handed over node by node, and cut in the middle of an expert chain
13  ubatches      a batch in several pieces, of which all but the last may have no outputs, also
                  under every policy that guesses
14  threads       two compute threads
15  power         one wrong byte in one expert is seen: these gates can fail
"""

from __future__ import annotations

import ctypes
import itertools
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adversarial
import llama_cpp
import numpy as np
import pytest
import tiny
from conftest import TinyFile
from harness import (
    Context,
    Events,
    Leaky,
    Logits,
    Model,
    RandomGuesses,
    Row,
    ScriptedGuesses,
    Shuffled,
    WorstGuesses,
    ours,
    random_tokens,
    rows,
    same,
    stock,
    token_by_token,
)

from moe_gguf.policies import POLICIES
from moe_gguf.policies.base import CachePolicy, Predictor
from moe_gguf.policies.cache import LRU
from moe_gguf.policies.pace import Everything
from moe_gguf.runtime.routers import read_routers

# scaled: qwen3moe with a scale per expert for gate, up and down (as NVFP4 conversions have).
LAYOUTS = (*tiny.LAYOUTS, "scaled")
TIGHT = {"mixtral": 10, "llama4": 12}  # slots for 40 % of the experts; of other layouts 19
N_STEPS = 8
LONG = 320

Script = Callable[[Model], Logits]
Reference = Callable[[Path, Script], Logits]


def model_file(tiny_file: TinyFile, layout: str, **flags: Any) -> Path:
    if layout == "scaled":
        return tiny_file("qwen3moe", scales=True, **flags)
    return tiny_file(layout, **flags)


@pytest.fixture(scope="module")
def reference() -> Reference:
    """What stock answers to a script; each is run once."""
    known: dict[tuple[Path, Script], Logits] = {}

    def get(path: Path, script: Script) -> Logits:
        if (path, script) not in known:
            with stock(path) as model:
                known[path, script] = script(model)
        return known[path, script]

    return get


# --- scripts: the same work for stock and for ours ------------------------------------------------


def prefill_and_decode(context: Context, seed: int = 1) -> Logits:
    logits = [context.decode(rows(random_tokens(40, seed)))]
    for i in range(N_STEPS):
        logits.append(context.decode(rows([int(logits[-1][-1].argmax())], 40 + i)))
    return np.concatenate(logits)


def generation(model: Model) -> Logits:
    return prefill_and_decode(model.context())


def long_prefill(model: Model) -> Logits:
    context = model.context()
    first = context.decode(rows(random_tokens(LONG)))
    return np.concatenate([first, context.decode(rows([7], LONG))])


def three_sequences(model: Model) -> Logits:
    context = model.context(n_seq_max=3)
    starts = [5, 9, 13]
    batch = [row for s, n in enumerate(starts) for row in rows(random_tokens(n, s), seq=s)]
    logits = [context.decode(batch)]
    last = [starts[0] - 1, sum(starts[:2]) - 1, sum(starts) - 1]
    for i in range(4):
        batch = [Row(int(logits[-1][last[s]].argmax()), n + i, seq=s) for s, n in enumerate(starts)]
        logits.append(context.decode(batch))
        last = [0, 1, 2]
    return np.concatenate(logits)


def two_contexts(model: Model) -> Logits:
    contexts = [model.context(), model.context()]
    logits = [c.decode(rows(random_tokens(20, s))) for s, c in enumerate(contexts)]
    for i in range(4):
        logits += [c.decode(rows([i + 3 * s], 20 + i)) for s, c in enumerate(contexts)]
    return np.concatenate(logits)


def last_of_many(model: Model) -> Logits:
    context = model.context(n_ubatch=32)
    batch = [row._replace(output=i == 99) for i, row in enumerate(rows(random_tokens(100)))]
    return np.concatenate([context.decode(batch), context.decode(rows([5, 6], 100))])


def four_ubatches(model: Model) -> Logits:
    context = model.context(n_ubatch=32)
    return np.concatenate(
        [context.decode(rows(random_tokens(100))), context.decode(rows([5], 100))]
    )


def two_threads(model: Model) -> Logits:
    return prefill_and_decode(model.context(n_threads=2, n_threads_batch=2))


# --- gates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_01_everything_resident(layout: str, tiny_file: TinyFile, reference: Reference) -> None:
    path = model_file(tiny_file, layout)
    expected = reference(path, generation)
    with ours(path) as model:
        same(generation(model), expected)
        while model.controller.residency.free:  # what random tokens missed
            model.context().decode(rows(random_tokens(LONG, len(model.controller.residency.free))))
        model.reset_stats()
        same(generation(model), expected)
        stats = model.stats()
        assert model.misses == stats.reads == stats.rounds == stats.generic == 0
        assert stats.whole == stats.events > 0
        assert model.hits > 0


class Counting(LRU):
    touched = 0

    def touch(self, key: int, votes: int = 1) -> None:
        self.touched += 1
        super().touch(key, votes)


def test_01_a_token_that_finds_everything_asks_in_its_first_layer(
    tiny_file: TinyFile, reference: Reference
) -> None:
    path = tiny_file("qwen3moe")
    cache = Counting()
    with ours(path, cache=cache) as model:
        layout, n_used = model.found.layout, model.found.n_used
        n_layers, n_experts = len(layout.layers), layout.n_experts
        model.arena.fill(range(n_layers * n_experts))
        same(token_by_token(model), reference(path, token_by_token))
        assert cache.touched == 24 * n_used
        assert model.hits == 24 * n_layers * n_used
        assert model.misses == 0
        assert model.stats().events == 24 * n_layers


@pytest.mark.parametrize("layout", LAYOUTS)
def test_02_tight_budget(
    layout: str, tiny_file: TinyFile, reference: Reference, direct_io: None
) -> None:
    path = model_file(tiny_file, layout)
    expected = reference(path, generation)
    n_slots = TIGHT.get(layout, 19)
    # Direct and alone: a tiny expert in the page cache is read before anyone looks.
    with ours(path, n_slots, reads="direct", lanes=1) as model:
        same(generation(model), expected)
        stats = model.stats()
        assert model.misses > n_slots, "nothing was ever evicted"
        assert model.hits > 0
        assert stats.rounds > 0
        assert stats.generic == 0, "the executor did not recognise this layout"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n_slots", [1, 2])
def test_03_arena_smaller_than_a_layers_union(
    layout: str, n_slots: int, tiny_file: TinyFile, reference: Reference
) -> None:
    path = model_file(tiny_file, layout)
    events = Events()
    with ours(path, n_slots, recorder=events) as model:
        same(generation(model), reference(path, generation))
        assert events.widest > n_slots
        assert model.stats().recycled >= events.widest - n_slots


@pytest.mark.parametrize("n_slots", [None, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_04_prefill_of_many_tokens(
    layout: str, n_slots: int | None, tiny_file: TinyFile, reference: Reference, direct_io: None
) -> None:
    path = model_file(tiny_file, layout)
    events = Events()
    with ours(path, n_slots, reads="direct", recorder=events) as model:
        same(long_prefill(model), reference(path, long_prefill))
        assert max(events.n_tokens) == LONG
        assert events.most_rows >= 8
        assert model.stats().rounds > 0
        if n_slots is not None:
            assert model.stats().recycled > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_05_several_sequences_in_one_batch(
    layout: str, tiny_file: TinyFile, reference: Reference
) -> None:
    path = model_file(tiny_file, layout)
    events = Events()
    with ours(path, 9, recorder=events) as model:
        same(three_sequences(model), reference(path, three_sequences))
        # 15: llama.cpp cuts the prompts into pieces that are equally long in every sequence.
        assert {15, 3} <= set(events.n_tokens)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_06_two_contexts_in_turn(layout: str, tiny_file: TinyFile, reference: Reference) -> None:
    path = model_file(tiny_file, layout)
    with ours(path, 15) as model:
        same(two_contexts(model), reference(path, two_contexts))
        n_layers = len(model.found.layout.layers)
        assert model.stats().events == 2 * (1 + 4) * n_layers
        assert model.hits > 0


def test_06_two_contexts_in_two_threads(tiny_file: TinyFile) -> None:
    path = tiny_file("qwen3moe")
    n_rounds = 4
    with stock(path) as model:
        expected = [prefill_and_decode(model.context(), seed) for seed in (1, 2)]
    with ours(path, 15) as model:
        contexts = [[model.context() for _ in range(n_rounds)] for _ in range(2)]
        got: list[list[Logits]] = [[], []]
        together = threading.Barrier(2)

        def work(i: int) -> None:
            for context in contexts[i]:
                together.wait(timeout=30)
                got[i].append(prefill_and_decode(context, seed=i + 1))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i in range(2):
            assert len(got[i]) == n_rounds
            for logits in got[i]:
                same(logits, expected[i])
        assert model.misses > model.n_slots


@pytest.mark.parametrize("layout", LAYOUTS)
def test_07_split_files(layout: str, tiny_file: TinyFile, reference: Reference) -> None:
    path = model_file(tiny_file, layout, split=True)
    with ours(path, 11) as model:
        same(generation(model), reference(path, generation))
        layers = model.found.layout.layers
        assert len(model.found.layout.files) == tiny.SPLIT_FILES
        assert len({int(p.file[0]) for layer in layers for p in layer.copies[0].pieces}) > 1
        assert model.misses > model.n_slots


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("script", [generation, long_prefill])
def test_08_mixed_types(
    layout: str, script: Script, tiny_file: TinyFile, reference: Reference
) -> None:
    path = model_file(tiny_file, layout, mixed=True, split=True, align=64)
    with ours(path, 11) as model:
        same(script(model), reference(path, script))
        layers = model.found.layout.layers
        types = {tuple(tensor.ggml_type for tensor in layer.tensors) for layer in layers}
        assert len(types) == min(3, len(layers))
        assert len(max(types, key=len)) > 1
        assert model.misses > model.n_slots


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lanes", [1, 8])
@pytest.mark.parametrize("reads", ["buffered", "direct"])
def test_09_reads(
    layout: str,
    lanes: int,
    reads: str,
    tiny_file: TinyFile,
    reference: Reference,
    direct_io: None,
) -> None:
    path = model_file(tiny_file, layout)
    with ours(path, 11, reads=reads, lanes=lanes) as model:
        same(generation(model), reference(path, generation))
        stats = model.stats()
        assert model.found.mode.name == reads
        assert model.found.mode.lanes == lanes
        assert stats.reads > 0
        blobs = {layer.blob_bytes for layer in model.found.layout.layers}
        assert len(blobs) > 1 or stats.read_bytes == model.misses * blobs.pop()
        if reads == "buffered":
            assert stats.bounced == 0
        elif layout in ("gpt-oss", "deepseek2"):  # experts that are no multiple of any block
            assert stats.bounced > 0


def test_09_direct_reads_in_place(
    tiny_file: TinyFile, reference: Reference, direct_io: None
) -> None:
    path = tiny_file("mixtral", align=4096)
    with ours(path, 11, reads="direct") as model:
        same(generation(model), reference(path, generation))
        stats = model.stats()
        assert stats.reads > stats.bounced, "no read went straight into a slot"


GUESSES: dict[str, tuple[int | None, Callable[[], CachePolicy]]] = {
    "room for all": (None, LRU),
    "a full arena": (19, LRU),  # guesses evict
    "slots falling free": (19, Leaky),
    "hardly any slot": (6, Leaky),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("room", GUESSES)
@pytest.mark.parametrize("kind", ["random", "worst"])
def test_10_guesses(
    layout: str, room: str, kind: str, tiny_file: TinyFile, reference: Reference
) -> None:
    path = model_file(tiny_file, layout)
    n_slots, cache = GUESSES[room]
    n_experts = 8 if layout == "mixtral" else 16
    predictor: Predictor = WorstGuesses(n_experts)
    if kind == "random":
        layers = {"deepseek2": [1, 2, 3], "llama4": [1, 3], "updown": [1, 3, 4]}
        predictor = RandomGuesses(layers.get(layout, [0, 1, 2]), n_experts, n=12)
    with ours(path, n_slots, lanes=1, cache=cache(), predictor=predictor) as model:
        same(token_by_token(model), reference(path, token_by_token))
        assert model.stats().guess_loads > 0
        same(generation(model), reference(path, generation))
        if room == "slots falling free" and kind == "random":
            assert model.controller.residency.guesses_used > 0
            assert model.misses > model.n_slots


@pytest.mark.parametrize("kind", ["random", "worst"])
@pytest.mark.parametrize("policy", POLICIES)
def test_10_wrong_guesses_under_every_cache(
    policy: str, kind: str, tiny_file: TinyFile, reference: Reference
) -> None:
    path = tiny_file("qwen3moe")
    wrong = {"random": RandomGuesses([0, 1, 2], 16, n=12), "worst": WorstGuesses(16)}
    with ours(path, 19, policy=policy, predictor=wrong[kind]) as model:
        same(token_by_token(model), reference(path, token_by_token))
        assert model.stats().guess_loads > 0
        assert model.misses > model.n_slots


@pytest.mark.parametrize("row", [*adversarial.LIES, "fate", "fate-paper"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_10_guesses_of_gates(
    layout: str,
    row: str,
    tiny_file: TinyFile,
    reference: Reference,
) -> None:
    path = model_file(tiny_file, layout)
    lies = adversarial.LIES.get(row)
    routers = read_routers if lies is None else adversarial.lying(lies)
    with ours(
        path, 19, policy="fate" if lies else row, pace=Everything(), routers=routers
    ) as model:
        same(token_by_token(model), reference(path, token_by_token))
        assert model.stats().guess_loads > 0


# A slow first guess: before it come the reads of layer 0's four experts, three parts each.
SLOW_GUESS = {"skip": 4 * 3, "err": -60}  # milliseconds


def first_routes(path: Path) -> list[list[int]]:
    """What the first token of ``token_by_token`` asks of each layer."""
    events = Events()
    with ours(path, recorder=events) as model:
        token_by_token(model)
    return events.ids[:3]


@pytest.mark.parametrize("lanes", [1, 2])
def test_10_demands_take_the_slots_of_guesses(
    lanes: int, tiny_file: TinyFile, reference: Reference
) -> None:
    """A lane that still writes a wrong guess is waited for; reads not begun are dropped."""
    path = tiny_file("qwen3moe")
    routes = first_routes(path)
    guesses = [2 * 16 + e for e in range(16) if e not in routes[2]][:5]
    predictor = ScriptedGuesses({1: guesses})
    with ours(path, 8 + 5, lanes=lanes, predictor=predictor) as model:
        model.arena.plugin.inject(2 * SLOW_GUESS["skip"], SLOW_GUESS["err"])
        same(token_by_token(model), reference(path, token_by_token))
        stats = model.stats()
        assert stats.guess_loads == 5
        # The slow one is met in the act; with one lane the four behind it wait for it.
        assert stats.guess_cancelled == 5 if lanes == 1 else stats.guess_cancelled >= 1


def test_10_guesses_are_promoted(tiny_file: TinyFile, reference: Reference) -> None:
    """Right guesses that are still being read when they are demanded are waited for, not reread."""
    path = tiny_file("qwen3moe")
    right = [16 + e for e in first_routes(path)[1]]
    with ours(path, 4 + 4, lanes=1, predictor=ScriptedGuesses({0: right})) as model:
        model.arena.plugin.inject(**SLOW_GUESS)
        context = model.context()
        got = context.decode(rows(random_tokens(1)))
        same(got, reference(path, token_by_token)[:1])
        stats = model.stats()
        assert stats.guess_promoted == 4
        assert stats.stall_ns > 30e6
        assert model.hits == model.controller.residency.guesses_used == 4
        assert stats.reads == 3 * (model.misses + 4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("policy", POLICIES)
def test_11_policies(policy: str, layout: str, tiny_file: TinyFile, reference: Reference) -> None:
    path = model_file(tiny_file, layout)
    with ours(path, 12, policy=policy) as model:
        same(generation(model), reference(path, generation))
        assert model.misses > model.n_slots
        assert (model.hits == 0) == (policy == "load-on-demand")


@pytest.mark.parametrize("n_slots", [3, 19])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_11_any_load_order(
    layout: str, n_slots: int, tiny_file: TinyFile, reference: Reference
) -> None:
    path = model_file(tiny_file, layout)
    with ours(path, n_slots, order=Shuffled()) as model:
        same(generation(model), reference(path, generation))
        assert model.misses > n_slots


class Cuts:
    """A scheduler callback that wants to see some nodes; each ends the graph handed over."""

    def __init__(self, wanted: Callable[[int], bool]) -> None:
        self.seen = 0

        def ask(tensor: int, asking: bool, _: object) -> bool:
            if asking:
                return wanted(tensor)
            self.seen += 1
            return True

        self.callback = llama_cpp.ggml_backend_sched_eval_callback(ask)


def every(stride: int) -> Callable[[int], bool]:
    count = itertools.count(1)
    return lambda tensor: next(count) % stride == 0


def after_matmul(nth: int, per_layer: int) -> Callable[[int], bool]:
    """After the nth (from 0) of each layer's expert matmuls."""
    op_desc = llama_cpp.llama_cpp._lib.ggml_op_desc
    op_desc.argtypes, op_desc.restype = [ctypes.c_void_p], ctypes.c_char_p
    count = itertools.count()
    return lambda tensor: op_desc(tensor) == b"MUL_MAT_ID" and next(count) % per_layer == nth


@pytest.mark.parametrize("n_slots", [2, 19])
@pytest.mark.parametrize("cut", ["every node", "every 3", "every 5", "first", "before down"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_12_graphs_in_pieces(
    layout: str, cut: str, n_slots: int, tiny_file: TinyFile, reference: Reference
) -> None:
    path = model_file(tiny_file, layout)
    expected = reference(path, generation)
    events = Events()
    with ours(path, n_slots, recorder=events) as model:
        layers = model.found.layout.layers
        per_layer = len(layers[0].tensors)
        cuts = Cuts(
            {
                "every node": every(1),
                "every 3": every(3),
                "every 5": every(5),
                "first": after_matmul(0, per_layer),
                "before down": after_matmul(per_layer - 2, per_layer),
            }[cut]
        )
        same(prefill_and_decode(model.context(cb_eval=cuts.callback)), expected)
        stats = model.stats()
        n_events = (1 + N_STEPS) * len(layers)
        assert cuts.seen > 0
        assert stats.events == n_events + events.continuations
        if cut == "every node":
            assert stats.events == n_events * per_layer
        if cut == "before down":
            assert stats.generic > 0, "no graph was cut inside a chain"
        # A layer's experts are demanded once, however many pieces it comes in.
        assert model.hits + model.misses == events.demanded


@pytest.mark.parametrize("layout", LAYOUTS)
def test_13_batch_in_ubatches(layout: str, tiny_file: TinyFile, reference: Reference) -> None:
    path = model_file(tiny_file, layout)
    events = Events()
    with ours(path, 11, recorder=events) as model:
        same(last_of_many(model), reference(path, last_of_many))
        assert max(events.n_tokens) == 32


@pytest.mark.parametrize("tiny_arena", [True, False])
@pytest.mark.parametrize("policy", ["eap", "fate", "fate-paper", "klotski"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_13_guesses_between_ubatches(
    layout: str, policy: str, tiny_arena: bool, tiny_file: TinyFile, reference: Reference
) -> None:
    path = model_file(tiny_file, layout)
    n_slots = 3 if tiny_arena else TIGHT.get(layout, 19)
    events = Events()
    with ours(path, n_slots, policy=policy, pace=Everything(), recorder=events) as model:
        for script in (four_ubatches, last_of_many):
            same(script(model), reference(path, script))
        stats = model.stats()
        assert events.n_tokens.count(32) >= 2 * 3
        if tiny_arena:
            assert events.widest > n_slots
            assert stats.recycled > 0
        else:
            assert stats.guess_loads > 0


@pytest.mark.parametrize("layout", ["qwen3moe", "mixtral"])  # slow where cores are busy
def test_14_two_compute_threads(layout: str, tiny_file: TinyFile, reference: Reference) -> None:
    path = model_file(tiny_file, layout)
    with ours(path, 11) as model:
        same(two_threads(model), reference(path, two_threads))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_15_a_wrong_byte_is_seen(
    layout: str, tiny_file: TinyFile, reference: Reference, tmp_path: Path
) -> None:
    path = model_file(tiny_file, layout)
    expected = reference(path, long_prefill)
    wrong = Path(shutil.copy(path, tmp_path))
    with ours(wrong, 11) as model:
        piece = model.found.layout.layers[-1].copies[0].pieces[-1]
        with wrong.open("r+b") as file:
            # In the middle of an expert in the middle of the tensor; every layout's prompt uses it.
            file.seek(piece.offset[len(piece.offset) // 2] + 1 + 64)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 0x55]))
        assert not np.array_equal(long_prefill(model), expected)
