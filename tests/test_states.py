"""What was computed is not computed again, and nobody sees what is another's. What a pass proves:

1. For each kind of memory: a start that several running sequences have is computed once, a finished
   sequence is gone on from, in memory, from the shelf and from disk; stock llama.cpp gives the same
   logits when the same is done to its memory, and a fresh computation gives nearly the same.
2. What a kind of memory allows is what llama.cpp then does.
3. One owner's states are never another's, wherever they are.
4. Files are bounded, whole or absent, and used only if they are what was written, for this model.
5. The ledger counts cells as a naive count does; the shelf keeps its limit.
6. While the disk is slow others are computed; who waits for it are those whose start lies there,
   and whoever needs the room of what is not written yet.

That any requests keep the gate, test_engine_identity.py shows.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TinyFile, ZooFile
from harness import Stock, fix_slots, random_tokens, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from tape import Tape, check

from moe_gguf import Engine, UserError
from moe_gguf.policies.base import Phase
from moe_gguf.runtime.engine import store
from moe_gguf.runtime.engine.copies import Shelf
from moe_gguf.runtime.engine.ledger import Ledger
from moe_gguf.runtime.engine.memory import Memory
from moe_gguf.runtime.engine.model import context_shape
from moe_gguf.runtime.engine.request import Cancelled, Finished
from moe_gguf.runtime.engine.schedule import Schedule
from moe_gguf.runtime.engine.states import Kind, common
from moe_gguf.runtime.engine.store import Store, written
from moe_gguf.runtime.sizes import MB

KINDS = {
    "plain": "qwen3moe",
    "window": "gpt-oss",
    "latent": "deepseek2",
    "hybrid": "qwen3next",
    "mamba": "granitehybrid",
    "compressed": "deepseek4",
}
N_CTX, CHUNK, KEPT = 256, 64, 1 << 20

Models = Callable[[str], tuple[Path, Stock]]


@pytest.fixture(scope="module")
def models(tiny_file: TinyFile, zoo_file: ZooFile) -> Iterator[Models]:
    opened: dict[str, tuple[Path, Stock]] = {}

    def get(kind: str) -> tuple[Path, Stock]:
        if kind not in opened:
            path = (tiny_file if kind in ("plain", "window", "latent") else zoo_file)(KINDS[kind])
            opened[kind] = path, Stock(path)
        return opened[kind]

    yield get
    for _, stock in opened.values():
        stock.close()


@contextmanager
def engine_of(path: Path, tape: Tape | None = None, **more: Any) -> Iterator[Engine]:
    parallel = more.setdefault("parallel", 3)
    schedule = Schedule(parallel, 0, CHUNK)
    more = {"kept": KEPT, "n_threads": 1, "n_ctx": N_CTX, "schedule": schedule, **more}
    more.setdefault("repack", "off")  # as the stock that it is compared with
    with pytest.MonkeyPatch.context() as patch:
        fix_slots(patch, 40)
        engine = Engine(path, memory="1GB", reads="buffered", score_rows=1, observer=tape, **more)
    with engine:
        yield engine


def params_of(parallel: int = 3, cells: int | None = None) -> Any:
    shape = context_shape(N_CTX, parallel, cells=cells, chunk=CHUNK, score_rows=1, n_threads=1)
    return shape.params()


def ask(engine: Engine, tokens: Sequence[int], n: int = 3, owner: str = "") -> Finished:
    """The end of a request for ``n`` tokens, greedily."""
    events = list(ask_for(engine, tokens, n, owner))
    assert isinstance(events[-1], Finished)
    return events[-1]


def ask_for(engine: Engine, tokens: Sequence[int], n: int = 3, owner: str = "") -> Any:
    return engine.submit(tokens, max_tokens=n, temp=0.0, ignore_eos=True, owner=owner)


def at_once(engine: Engine, submit: Callable[[], list[Any]]) -> list[Any]:
    """What is submitted in the engine's own thread arrives before its next step."""
    generations: list[Any] = engine._loop.post(submit).result()
    return generations


def answered(engine: Engine, tokens: Sequence[int], n: int = 3) -> list[int]:
    """A prompt with the answer to it."""
    events = ask_for(engine, tokens, n)
    return [*tokens, *(event.token for event in events if hasattr(event, "token"))]


def n_rows(tape: Tape) -> int:
    return sum(step.n_rows for step in tape.steps)


def last_logits(tape: Tape) -> Any:
    """Of the newest prompt whose last row was computed."""
    prompts = [s for s in tape.steps if s.phase is not Phase.DECODE and any(s.columns[3])]
    assert prompts[-1].logits is not None
    return prompts[-1].logits[-1]


def nearly(path: Path, tokens: Sequence[int], logits: Any) -> bool:
    """Whether a fresh computation of these tokens gives nearly these logits."""
    tape = Tape()
    with engine_of(path, tape, kept=0) as engine:
        ask(engine, tokens, n=1)
    fresh = last_logits(tape)
    return bool(np.corrcoef(fresh, logits)[0, 1] > 0.999)


# --- 1: each kind of memory ---------------------------------------------------------------------


def test_a_state_that_nobody_wants_is_given_back_at_once(models: Models) -> None:
    """Not when the garbage collector comes by: a group that ends would leave one per sequence."""
    _, model = models("plain")
    context = model.context()
    context.decode(rows(random_tokens(20)))
    memory = Memory(context.ctx)
    data = memory.save(0)
    assert memory.restore(0, data)
    assert memory.restore(0, bytes(data))
    assert sys.getrefcount(data) == 2  # this name, and the call's
    data.append(0)  # nobody holds its memory


@pytest.mark.parametrize("kind", KINDS)
def test_1_a_start_of_many_is_computed_once(kind: str, models: Models) -> None:
    path, stock = models(kind)
    tape, start = Tape(), random_tokens(90, seed=9)
    prompts = [start + random_tokens(20, seed=i) for i in range(3)]
    with engine_of(path, tape) as engine:
        together = at_once(engine, lambda: [ask_for(engine, prompt) for prompt in prompts])
        ends = [list(generation)[-1] for generation in together]
    assert [end.cached_tokens for end in ends] == [0, 90, 90]
    assert n_rows(tape) == 90 + 3 * (20 + 2)
    check(tape, stock.model, params_of())
    assert nearly(path, prompts[2], last_logits(tape))


@pytest.mark.parametrize("kind", KINDS)
def test_1_a_conversation_goes_on_in_memory(kind: str, models: Models) -> None:
    path, stock = models(kind)
    tape = Tape()
    with engine_of(path, tape, parallel=1) as engine:
        past = answered(engine, random_tokens(60))
        follow = past + random_tokens(20, seed=2)
        end = ask(engine, follow)
        assert end.cached_tokens == len(past) - 1  # the last token was never computed
        again = ask(engine, follow)  # the same once more, as for another answer
        assert again.cached_tokens >= len(follow) - 4
    check(tape, stock.model, params_of(1))
    assert nearly(path, follow, last_logits(tape))


@pytest.mark.parametrize("kind", KINDS)
def test_1_a_conversation_comes_back_from_the_shelf(kind: str, models: Models) -> None:
    path, stock = models(kind)
    tape = Tape()
    with engine_of(path, tape, parallel=1) as engine:
        past = answered(engine, random_tokens(60))
        ask(engine, random_tokens(40, seed=5))  # takes its place
        assert engine.stats()["requests"]["kept_bytes"] > 0
        follow = past + random_tokens(20, seed=2)
        assert ask(engine, follow).cached_tokens == len(past) - 1
    assert len(tape.saves) >= 2
    check(tape, stock.model, params_of(1))
    assert nearly(path, follow, last_logits(tape))


@pytest.mark.parametrize("kept", [0, KEPT])
@pytest.mark.parametrize("kind", KINDS)
def test_1_a_conversation_comes_back_from_disk(
    kind: str, kept: int, models: Models, tmp_path: Path
) -> None:
    path, stock = models(kind)
    tape = Tape()
    with engine_of(path, tape, parallel=1, kept=kept, cache_dir=tmp_path) as engine:
        past = answered(engine, random_tokens(60))
    tape.cleared()  # the next context is a new one
    follow = past + random_tokens(20, seed=2)
    with engine_of(path, tape, parallel=1, cache_dir=tmp_path) as engine:
        assert ask(engine, follow).cached_tokens == len(past) - 1
    assert len(tape.saves) >= 1
    check(tape, stock.model, params_of(1))
    assert nearly(path, follow, last_logits(tape))


@pytest.mark.parametrize("kind", KINDS)
def test_1_what_an_answer_left_out_is_not_computed_again(kind: str, models: Models) -> None:
    """A template leaves thoughts out of the past: the next prompt parts from the last one near its
    end, where a state that cannot be cut has a checkpoint."""
    path, stock = models(kind)
    tape, prompt = Tape(), random_tokens(80)
    with engine_of(path, tape, parallel=1) as engine:
        answered(engine, prompt, n=8)
        follow = prompt[:-2] + random_tokens(20, seed=2)
        assert ask(engine, follow).cached_tokens >= len(prompt) - 4
    check(tape, stock.model, params_of(1))
    assert nearly(path, follow, last_logits(tape))


def test_1_a_preempted_sequence_goes_on_where_it_was(models: Models) -> None:
    path, stock = models("plain")
    tape = Tape()
    with engine_of(path, tape, parallel=3, cells=256) as engine:
        prompts = [random_tokens(60, seed=i) for i in range(3)]
        together = at_once(engine, lambda: [ask_for(engine, prompt, n=80) for prompt in prompts])
        ends = [list(generation)[-1] for generation in together]
        stats = engine.stats()["requests"]
        engine._loop.states.check_integrity()
    assert stats["preempted"] > 0
    assert [end.cached_tokens for end in ends] == [0, 0, 0], "of others, not its own"
    assert n_rows(tape) <= 3 * (60 + 79) + stats["preempted"]
    check(tape, stock.model, params_of(3, cells=256))


# --- 2: kinds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_2_kinds_are_what_llama_cpp_then_does(kind: str, models: Models) -> None:
    _, stock = models(kind)
    context = stock.context(n_seq_max=2, kv_unified=True, swa_full=False)
    memory = Memory(context.ctx)
    found = Kind.of(stock.model, memory)
    context.decode(rows(random_tokens(60)), Phase.PREFILL)
    assert memory.remove(0, 50) is not found.whole
    assert found.whole == (kind in ("hybrid", "mamba", "compressed"))
    assert (found.window > 0) == (kind == "window")


def put(store: Store, owner: str, first: int, state: bytes) -> None:
    """A state of 40 tokens."""
    tokens = list(range(first, first + 40))
    store.write(owner, tokens, len(state), written(tokens, bytes(8) + state), False).result()


def get(store: Store, owner: str) -> bytes:
    (entry,) = store.entries(owner)
    path = store.verified(owner, entry)
    assert path is not None
    return path.read_bytes()[12 + 4 * len(entry.tokens) : -32]


# --- 3: owners ----------------------------------------------------------------------------------


def test_3_nothing_passes_between_owners(models: Models, tmp_path: Path) -> None:
    path, _ = models("plain")
    prompt, other = random_tokens(60), random_tokens(60, seed=2)
    with engine_of(path, parallel=2, cache_dir=tmp_path) as engine:
        running = at_once(engine, lambda: [ask_for(engine, prompt, 20, o) for o in ("a", "b")])
        assert [list(g)[-1].cached_tokens for g in running] == [0, 0], "while they run"
        assert ask(engine, prompt, owner="c").cached_tokens == 0, "in memory"
        assert ask(engine, prompt, owner="").cached_tokens == 0
        for owner in ("d", "e", "f"):
            ask(engine, other, owner=owner)
        assert ask(engine, prompt, owner="g").cached_tokens == 0, "on the shelf"
        assert ask(engine, prompt, owner="a").cached_tokens == 59
    with engine_of(path, parallel=2, cache_dir=tmp_path) as engine:
        assert ask(engine, prompt, owner="h").cached_tokens == 0, "on disk"
        assert ask(engine, prompt, owner="b").cached_tokens == 59
    names = b"".join(file.read_bytes() for file in tmp_path.rglob("*.state"))
    assert b"owner" not in names


def test_3_a_file_under_another_owner_s_name_is_no_state(tmp_path: Path) -> None:
    notes: list[str] = []
    store = Store(tmp_path, b"model", 1 << 20, notes.append)
    put(store, "a", 0, b"state of a")
    (file,) = tmp_path.rglob("*.state")
    theirs = store._name("b", file.name.partition("-")[2].removesuffix(".state"))
    shutil.copy(file, file.with_name(theirs))
    (entry,) = store.entries("b")
    assert store.verified("b", entry) is None
    assert not file.with_name(theirs).exists()
    assert "damaged" in notes[0]
    assert get(store, "a") == b"state of a"


# --- 4: files -----------------------------------------------------------------------------------


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A state of ``a``, of the tokens 0 to 39."""
    put(Store(tmp_path, b"model", 1 << 20, print), "a", 0, b"state" * 100)
    (file,) = tmp_path.rglob("*.state")
    return file


def test_4_a_state_is_found_again(file: Path, tmp_path: Path, notes: list[str]) -> None:
    store = Store(tmp_path, b"model", 1 << 20, notes.append)
    (entry,) = store.entries("a")
    assert entry.tokens == list(range(40))
    assert get(store, "a") == b"state" * 100
    assert Store(tmp_path, b"another model", 1 << 20, notes.append).entries("a") == []
    assert not notes
    assert file.exists()
    assert file.stat().st_mode & 0o077 == 0, "others may read what was talked about"


@pytest.mark.parametrize("where", [0, 20, 33, 50, 205, -1])
def test_4_a_damaged_file_is_removed_with_a_note(
    where: int, file: Path, tmp_path: Path, notes: list[str]
) -> None:
    raw = bytearray(file.read_bytes())
    raw[where] ^= 1
    file.write_bytes(raw)
    store = Store(tmp_path, b"model", 1 << 20, notes.append)
    assert [store.verified("a", entry) for entry in list(store.entries("a"))] in ([], [None])
    assert store.entries("a") == []
    assert not file.exists()
    assert len(notes) == 1


@pytest.mark.parametrize("n", [0, 10, 44, 100, -1])
def test_4_a_short_file_is_removed_with_a_note(
    n: int, file: Path, tmp_path: Path, notes: list[str]
) -> None:
    file.write_bytes(file.read_bytes()[:n])
    assert Store(tmp_path, b"model", 1 << 20, notes.append).entries("a") == []
    assert not file.exists()
    assert len(notes) == 1


def test_4_a_file_that_has_gone_is_no_state(file: Path, tmp_path: Path, notes: list[str]) -> None:
    store = Store(tmp_path, b"model", 1 << 20, notes.append)
    (entry,) = store.entries("a")
    file.unlink()
    assert store.verified("a", entry) is None
    assert store.entries("a") == []


def test_4_the_folder_is_bounded_and_the_oldest_go(tmp_path: Path, notes: list[str]) -> None:
    store = Store(tmp_path, b"model", 10_000, notes.append)
    for i in range(5):
        put(store, "a", i, bytes(3000))
        for age, file in enumerate(
            sorted(tmp_path.rglob("*.state"), key=lambda f: f.stat().st_mtime)
        ):
            os.utime(file, (age, age))
        assert sum(f.stat().st_size for f in tmp_path.rglob("*.state")) <= 10_000
    assert sorted(entry.tokens[0] for entry in store.entries("a")) == [2, 3, 4]
    put(store, "a", 9, bytes(10_000))
    assert len(store.entries("a")) == 3, "what is too large for all of it drives nobody out"
    assert not notes


def test_4_another_model_s_files_count_and_go_too(tmp_path: Path, notes: list[str]) -> None:
    put(Store(tmp_path, b"old", 10_000, notes.append), "a", 1, bytes(6000))
    put(Store(tmp_path, b"new", 10_000, notes.append), "a", 2, bytes(6000))
    assert len(list(tmp_path.rglob("*.state"))) == 1
    assert Store(tmp_path, b"old", 10_000, notes.append).entries("a") == []


def test_4_a_full_disk_costs_a_state_and_leaves_nothing(
    tmp_path: Path, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    store = Store(tmp_path, b"model", 10_000, notes.append)
    monkeypatch.setattr(os, "fsync", full)
    put(store, "a", 1, bytes(100))
    assert "no space left on device" in notes[0]
    assert store.entries("a") == []
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_4_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot hold states .*cache_dir"):
        Store(tmp_path / "file", b"model", 1 << 20, print)


def test_4_other_weights_of_the_same_shapes_are_another_model(
    models: Models, tiny_file: TinyFile, tmp_path: Path
) -> None:
    path, _ = models("plain")
    prompt = random_tokens(60)
    twin = tmp_path / "twin.gguf"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2 :] = bytes(b ^ 0x11 for b in raw[len(raw) // 2 :])
    twin.write_bytes(raw)
    folder = tmp_path / "states"
    with engine_of(path, cache_dir=folder) as engine:
        ask(engine, prompt)
    with engine_of(twin, cache_dir=folder) as engine:
        assert ask(engine, prompt).cached_tokens == 0
    with engine_of(path, cache_dir=folder, experts_used=1) as engine:
        assert ask(engine, prompt).cached_tokens == 0, "computed in another way"
    with engine_of(path, cache_dir=folder) as engine:
        assert ask(engine, prompt).cached_tokens == 59


def test_4_the_command_line_goes_on_from_an_earlier_run(
    tiny_file: TinyFile, tmp_path: Path
) -> None:
    given = ["-p", "word " * 60, "-n", "2", "--temp", "0", "--json", "--memory", "1GB"]
    command = [sys.executable, "-m", "moe_gguf", "run", str(tiny_file("qwen3moe")), *given]
    command += ["--cache-dir", str(tmp_path / "states"), "--cache-size", "10MB"]
    runs = [
        json.loads(subprocess.run(command, capture_output=True, check=True, cwd=sys.prefix).stdout)
        for _ in range(2)
    ]
    assert [run["stats"]["requests"]["cached_tokens"] for run in runs] == [
        0,
        runs[0]["prompt_tokens"] - 1,
    ]
    assert runs[0]["text"] == runs[1]["text"]


def test_4_copies_are_in_the_budget(models: Models) -> None:
    path, _ = models("plain")
    sizes = []
    for kept in (0, 50 * MB):
        with engine_of(path, kept=kept) as engine:
            sizes.append(engine.arena.budget.needs)
    assert sizes[1].states == 50 * MB
    assert sizes[1].total - sizes[0].total > 45 * MB


# --- 5: counting --------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 9), st.integers(0, 3)))
)
@settings(max_examples=100, deadline=None)
def test_5_cells_are_counted_as_by_hand(operations: list[tuple[int, int, int, int]]) -> None:
    ledger, naive, fresh = Ledger(), {i: [] for i in range(4)}, iter(range(10**6))
    for seq, other, n, what in operations:
        if what == 0:
            ledger.grow(seq, n)
            naive[seq] += [next(fresh) for _ in range(n)]
        elif what == 1 and naive[seq]:
            ledger.share(seq, other, n)
            naive[other] = naive[seq][:n]
        elif what == 2:
            ledger.cut(seq, n)
            del naive[seq][n:]
        elif what == 3:
            ledger.drop(seq)
            naive[seq] = []
        assert ledger.used == len({cell for cells in naive.values() for cell in cells})
        assert all(ledger.length(i) == len(cells) for i, cells in naive.items())


TOKENS = st.lists(st.integers(0, 2), max_size=12)


@given(TOKENS, TOKENS, st.integers(0, 12))
@settings(max_examples=100, deadline=None)
def test_5_common_is_the_longest_common_start(a: list[int], b: list[int], most: int) -> None:
    n = common(a, b, most)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b), most) or a[n] != b[n]


def test_5_the_shelf_keeps_its_limit_and_the_latest() -> None:
    shelf = Shelf(100)
    for i in range(8):
        shelf.add("a", [i], 30, lambda: bytearray(30), False)
        assert shelf.n_bytes <= 100
    first = next(copy for copy in shelf.of("a") if copy.tokens == [5])
    shelf.touch(first)
    shelf.add("a", [8], 30, lambda: bytearray(30), False)
    assert [copy.tokens for copy in shelf.of("a")] == [[8], [5], [7]]
    shelf.add("a", [9], 101, lambda: bytearray(101), False)
    assert len(list(shelf.of("a"))) == 3, "what is larger than the shelf drives nobody out"


# --- 6: a slow disk -----------------------------------------------------------------------------


class SlowDisk:
    """Checksums wait until it is ``ready``."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.ready, self.asked, self.by = threading.Event(), threading.Event(), set[str]()
        checksum = store._checksum

        def slow(*arguments: Any) -> bytes:
            self.by.add(threading.current_thread().name)
            self.asked.set()
            assert self.ready.wait(60)
            return checksum(*arguments)

        patch.setattr(store, "_checksum", slow)


def test_6_others_are_computed_while_a_state_is_read(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, stock = models("plain")
    tape = Tape()
    with engine_of(path, tape, cache_dir=tmp_path) as engine:
        past = answered(engine, random_tokens(60))
    tape.cleared()
    disk = SlowDisk(monkeypatch)
    with engine_of(path, tape, cache_dir=tmp_path) as engine:
        follow, given_up = (ask_for(engine, past + random_tokens(20, seed=i)) for i in (2, 3))
        assert disk.asked.wait(60)
        assert ask(engine, random_tokens(40, seed=4), n=20).completion_tokens == 20
        given_up.cancel()
        assert ask(engine, random_tokens(40, seed=5), n=20).completion_tokens == 20
        disk.ready.set()
        assert list(follow)[-1].cached_tokens == len(past) - 1
        with pytest.raises(Cancelled):
            list(given_up)
        engine._loop.states.check_integrity()
    assert all(name.startswith("moe-gguf states") for name in disk.by)
    check(tape, stock.model, params_of())


def test_6_others_are_computed_while_a_state_is_written(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, stock = models("plain")
    tape, disk = Tape(), SlowDisk(monkeypatch)
    with engine_of(path, tape, parallel=1, kept=0, cache_dir=tmp_path) as engine:
        past = answered(engine, random_tokens(60))
        assert ask(engine, random_tokens(40, seed=4), n=20).completion_tokens == 20
        assert disk.asked.wait(60)
        follow = ask_for(engine, past + random_tokens(20, seed=2))
        assert ask(engine, random_tokens(40, seed=5), n=20).completion_tokens == 20
        disk.ready.set()
        assert list(follow)[-1].cached_tokens == len(past) - 1
    assert not list(tmp_path.rglob("*.partial"))
    assert len(list(tmp_path.rglob("*.state"))) >= 3
    check(tape, stock.model, params_of(1))


def test_6_the_older_half_of_the_shelf_is_written_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, folder = SlowDisk(monkeypatch), Store(tmp_path, b"model", 1 << 20, print)
    shelf = Shelf(1000, folder)
    for i in range(3):
        shelf.add("a", [i], 250, lambda: bytearray(250), False)
    first, second, _ = reversed(list(shelf.of("a")))
    assert first.written is not None
    assert not first.written.done()
    assert second.written is None
    assert shelf.n_bytes == 750, "it stays until it is written"
    shelf.add("a", [3], 250, lambda: bytearray(250), False)
    assert second.written is not None
    shelf.remove(second)
    assert second.written.cancelled(), "nobody needs it there"
    threading.Timer(0.05, disk.ready.set).start()
    assert shelf.reserve(500)
    assert [copy.tokens for copy in shelf.of("a")] == [[3], [2]]
    shelf.clear()
    folder.close()
    assert sorted(entry.tokens[0] for entry in folder.entries("a")) == [0, 2, 3]
