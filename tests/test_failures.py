"""Failure gates: what goes wrong while a model runs surfaces as itself, and the model goes on.

After each failure the slot table is consistent, the same call repeated gives stock's logits, and
nothing waits for ever. A pass proves:

 1  read errors     EIO and short reads, injected into prefill and decode, buffered and direct
 2  truncation      a file that really lost its end while open, and is whole again later
 3  callback        what a policy, predictor, order or recorder raises arrives as that exception
 4  interrupt       Ctrl-C during a step is KeyboardInterrupt, wherever it strikes
 5  lying plans     a plan that contradicts the slots is refused: an error, never wrong logits
 6  cancelled       guesses dropped from outside, failed guesses, and llama.cpp's own abort callback
 7  budget          a refused budget names one that works, and exactly that one works
 8  limit           a process in a memory cgroup of exactly its budget survives, below the budget
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import llama_cpp
import numpy as np
import pytest
from conftest import TinyFile, missing
from harness import (
    Events,
    Leaky,
    Logits,
    Ours,
    RandomGuesses,
    ScriptedGuesses,
    fix_slots,
    ours,
    random_tokens,
    rows,
    stock,
)

import moe_gguf
from moe_gguf import ExpertReadError
from moe_gguf.policies.base import Guess, RouteEvent
from moe_gguf.policies.cache import LFU
from moe_gguf.policies.residency import Plan
from moe_gguf.runtime.bench import cgroup

LAYOUTS = ("qwen3moe", "gemma4", "gpt-oss")
PROMPT = random_tokens(40)
N_SLOTS = 11


@pytest.fixture(scope="module")
def expected(tiny_file: TinyFile) -> Callable[[str], Logits]:
    """Stock's logits of the last prompt token and of one more token, per layout."""
    known: dict[str, Logits] = {}

    def get(layout: str) -> Logits:
        if layout not in known:
            with stock(tiny_file(layout)) as model:
                context = model.context()
                first = context.decode(rows(PROMPT))[-1:]
                known[layout] = np.concatenate([first, context.decode(rows([7], len(PROMPT)))])
        return known[layout]

    return get


@pytest.fixture
def llama(
    request: pytest.FixtureRequest, tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch
) -> Iterator[moe_gguf.Llama]:
    """A Llama of 11 slots; the parameters are its layout and keyword arguments."""
    layout, kwargs = getattr(request, "param", ("qwen3moe", {}))
    fix_slots(monkeypatch, N_SLOTS)
    model = open_llama(tiny_file(layout), **kwargs)
    yield model
    model.close()


def open_llama(path: Path, **kwargs: Any) -> moe_gguf.Llama:
    settings = {"memory": "1GB", "reads": "buffered", "lanes": 2, "n_ctx": 256, "n_threads": 1}
    # Not the default: guesses may fail unnoticed, and how many there are depends on time.
    settings["policy"] = "lru"
    settings["repack"] = "off"
    return moe_gguf.Llama(path, **(settings | kwargs))


def logits(llama: moe_gguf.Llama) -> Logits:
    pointer = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
    return np.ctypeslib.as_array(pointer, (llama.n_vocab(),)).copy()


def evaluate(llama: moe_gguf.Llama) -> Logits:
    """From the start: the prompt, then one token."""
    llama.reset()
    llama.eval(PROMPT)
    first = logits(llama)
    llama.eval([7])
    return np.stack([first, logits(llama)])


def check(llama: moe_gguf.Llama) -> None:
    residency = llama.arena.controller.residency
    residency.check_integrity()
    held = llama.arena.plugin.slot_keys()
    assert all(held[slot] == key for key, slot in residency.slot_of.items())


def check_usable(llama: moe_gguf.Llama, expected: Logits) -> None:
    check(llama)
    assert np.array_equal(evaluate(llama), expected)
    check(llama)


# --- 1: read errors -------------------------------------------------------------------------------

READ_MODES = [
    (layout, {"reads": reads, "lanes": lanes})
    for layout, reads, lanes in [
        ("qwen3moe", "buffered", 1),
        ("qwen3moe", "direct", 4),
        ("gemma4", "direct", 1),
        ("gpt-oss", "buffered", 4),
        ("gpt-oss", "direct", 2),
    ]
]


@pytest.mark.parametrize("llama", READ_MODES, indirect=True, ids=str)
@pytest.mark.parametrize("skip", [0, 1, 2, 7, 30])
@pytest.mark.parametrize("err", [errno.EIO, 0])
def test_read_error_in_prefill(
    llama: moe_gguf.Llama, skip: int, err: int, expected: Callable[[str], Logits], direct_io: None
) -> None:
    llama.arena.plugin.inject(skip, err)
    with pytest.raises(ExpertReadError, match=r"\.gguf") as caught:
        evaluate(llama)
    assert str(llama.found.layout.path) in str(caught.value)
    assert ("Input/output error" if err else "ended early") in str(caught.value)
    layout = llama.found.layout.architecture
    check_usable(llama, expected(layout))


@pytest.mark.parametrize("llama", READ_MODES, indirect=True, ids=str)
@pytest.mark.parametrize("err", [errno.EIO, 0])
def test_read_error_in_decode(
    llama: moe_gguf.Llama, err: int, expected: Callable[[str], Logits], direct_io: None
) -> None:
    """The failed token alone is repeated: what came before it is still there."""
    want = expected(llama.found.layout.architecture)
    for skip in range(0, 12, 3):
        llama.reset()
        llama.eval(PROMPT)
        assert np.array_equal(logits(llama), want[0])
        # A demand that must be read: drop everything, as a long pause would.
        residency = llama.arena.controller.residency
        residency.drop(list(residency.slot_of))
        llama.arena.plugin.inject(skip, err)
        with pytest.raises(ExpertReadError):
            llama.eval([7])
        check(llama)
        llama.eval([7])
        assert np.array_equal(logits(llama), want[1])
        check(llama)


def test_every_read_of_a_step_may_fail(
    llama: moe_gguf.Llama, expected: Callable[[str], Logits]
) -> None:
    n_failed = 0
    for skip in itertools.count():
        residency = llama.arena.controller.residency
        residency.drop(list(residency.slot_of))
        llama.reset()
        llama.arena.plugin.inject(skip, errno.EIO)
        try:
            llama.eval(PROMPT)
        except ExpertReadError:
            n_failed += 1
            check(llama)
        else:
            break
    n_experts = 16 + 16 + 4  # the last layer computes the last token only
    assert n_failed == n_experts * 3
    llama.arena.plugin.inject(-1, 0)
    check_usable(llama, expected("qwen3moe"))


def test_read_error_leaves_no_step_half_counted(llama: moe_gguf.Llama) -> None:
    llama.arena.plugin.inject(0, errno.EIO)
    with pytest.raises(ExpertReadError):
        llama.create_completion("Hello", max_tokens=4)
    out = llama.create_completion("Hello", max_tokens=4, temperature=0)
    assert out["usage"]["completion_tokens"] == 4
    assert llama.stats()["decode_tokens"] == 3


# --- 2: truncation --------------------------------------------------------------------------------


@pytest.mark.parametrize("reads", ["buffered", "direct"])
def test_truncated_file(
    reads: str,
    tiny_file: TinyFile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expected: Callable[[str], Logits],
    direct_io: None,
) -> None:
    whole = tiny_file("qwen3moe")
    path = Path(shutil.copy(whole, tmp_path / "cut.gguf"))
    fix_slots(monkeypatch, N_SLOTS)
    llama = open_llama(path, reads=reads)
    os.truncate(path, path.stat().st_size // 2 + 100)
    for _ in range(3):
        with pytest.raises(ExpertReadError, match=r"cut\.gguf ended early: expected \d+ bytes"):
            evaluate(llama)
        check(llama)
    path.write_bytes(whole.read_bytes())  # the same inode: the download was completed
    check_usable(llama, expected("qwen3moe"))
    llama.close()


# --- 3: exceptions in the callback ----------------------------------------------------------------


class Fuse:
    """Raises what it is given at the nth call, once."""

    def __init__(self, nth: int, error: BaseException) -> None:
        self.left = nth
        self.error = error

    def burn(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error


class FusedCache(LFU):
    def __init__(self, fuse: Fuse) -> None:
        super().__init__()
        self.fuse = fuse

    def touch(self, key: int, votes: int = 1) -> None:
        self.fuse.burn()
        super().touch(key, votes)

    def admit(self, key: int, votes: int = 1) -> bool:
        self.fuse.burn()
        return super().admit(key, votes)

    def evict(self, pinned: Any, incoming: int = -1, demanded: bool = True) -> int | None:
        self.fuse.burn()
        return super().evict(pinned)


class FusedPart:
    """As predictor, load order or recorder."""

    def __init__(self, fuse: Fuse) -> None:
        self.fuse = fuse

    def observe(self, event: RouteEvent, ids: Any) -> None:
        pass

    def guess(self, event: RouteEvent, x: Any) -> Sequence[Guess]:
        self.fuse.burn()
        return []

    def order(self, experts: Sequence[int], counts: Sequence[int]) -> Sequence[int]:
        self.fuse.burn()
        return range(len(experts))

    def record(self, *args: Any) -> None:
        self.fuse.burn()


def broken(part: str, fuse: Fuse) -> dict[str, Any]:
    return {"cache": FusedCache(fuse)} if part == "cache" else {part: FusedPart(fuse)}


@pytest.mark.parametrize("part", ["cache", "predictor", "order", "recorder"])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("nth", [1, 3, 6])
def test_exception_in_the_callback_arrives_as_itself(
    part: str,
    error: type[BaseException],
    nth: int,
    tiny_file: TinyFile,
    expected: Callable[[str], Logits],
    capfd: pytest.CaptureFixture[str],
) -> None:
    raised = error("from within")
    with ours(tiny_file("qwen3moe"), N_SLOTS, **broken(part, Fuse(nth, raised))) as model:
        with pytest.raises(error) as caught:
            play(model)
        assert caught.value is raised
        model.check()
        assert np.array_equal(play(model), expected("qwen3moe"))
    assert "ctypes" not in capfd.readouterr().err


def play(model: Ours) -> Logits:
    context = model.context()
    first = context.decode(rows(PROMPT))[-1:]
    return np.concatenate([first, context.decode(rows([7], len(PROMPT)))])


def test_exception_at_every_policy_call(
    tiny_file: TinyFile, expected: Callable[[str], Logits]
) -> None:
    """Wherever inside a plan it strikes, the table is true again."""
    n_raised = 0
    for nth in range(1, 1000, 5):
        fuse = Fuse(nth, ZeroDivisionError(nth))
        with ours(tiny_file("qwen3moe"), 7, cache=FusedCache(fuse)) as model:
            with contextlib.suppress(ZeroDivisionError):
                play(model)
            if fuse.left > 0:
                break  # there are fewer calls
            n_raised += 1
            model.check()
            assert np.array_equal(play(model), expected("qwen3moe"))
    assert n_raised > 15


def test_exception_through_the_public_api(
    llama: moe_gguf.Llama, expected: Callable[[str], Logits], monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(event: RouteEvent) -> NoReturn:
        raise ZeroDivisionError("from a policy")

    with monkeypatch.context() as patch:
        patch.setattr(llama.arena.controller.residency, "plan", plan)
        with pytest.raises(ZeroDivisionError, match="from a policy"):
            llama.create_completion("Hello")
        with pytest.raises(ZeroDivisionError, match="from a policy"):
            list(llama.create_completion("Hello", stream=True))
    check_usable(llama, expected("qwen3moe"))


# --- 4: interrupts --------------------------------------------------------------------------------


def test_ctrl_c_during_a_step(
    llama: moe_gguf.Llama,
    expected: Callable[[str], Logits],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Real signals, which Python delivers at the first bytecode after llama.cpp: the callback's."""
    for delay_ms in range(20, 120, 10):
        alarm = threading.Timer(delay_ms / 1000, signal.raise_signal, [signal.SIGINT])
        alarm.start()
        with pytest.raises(KeyboardInterrupt):
            evaluate_for_ever(llama)
        alarm.join()
        check(llama)
    check_usable(llama, expected("qwen3moe"))
    assert "ctypes" not in capfd.readouterr().err


def evaluate_for_ever(llama: moe_gguf.Llama) -> NoReturn:
    while True:
        llama.reset()
        llama.eval(PROMPT * 5)


# --- 5: lying plans -------------------------------------------------------------------------------

Lie = Callable[[RouteEvent, Plan], Plan]

LIES: dict[str, tuple[Lie, str]] = {
    "all are resident": (
        lambda event, plan: plan._replace(loads=[0] * len(plan.loads)),
        "resident that is not",
    ),
    "another's slot": (
        lambda event, plan: plan._replace(
            slots=plan.slots[1:] + plan.slots[:1], loads=[0] * len(plan.loads)
        ),
        "resident that is not",
    ),
    "slot too high": (
        lambda event, plan: plan._replace(slots=[10**6] * len(plan.slots)),
        "slot that does not exist",
    ),
    "slot below zero": (
        lambda event, plan: plan._replace(slots=[-1] * len(plan.slots)),
        "slot that does not exist",
    ),
    "one expert twice": (
        lambda event, plan: plan._replace(experts=plan.experts[:1] * len(plan.experts)),
        "one twice",
    ),
    "an expert nobody asked for": (
        lambda event, plan: plan._replace(experts=[16] * len(plan.experts)),
        "was not asked for",
    ),
    "a negative expert": (
        lambda event, plan: plan._replace(experts=[-1] * len(plan.experts)),
        "was not asked for",
    ),
    # Slow, but right for once: what is wrong afterwards is the table.
    "one slot for all": (
        lambda event, plan: plan._replace(slots=[plan.slots[0]] * len(plan.slots)),
        "resident that is not",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_plan(
    lie: str,
    tiny_file: TinyFile,
    expected: Callable[[str], Logits],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    change, sentence = LIES[lie]
    with ours(tiny_file("qwen3moe"), N_SLOTS) as model:
        assert np.array_equal(play(model), expected("qwen3moe"))
        residency = model.controller.residency
        truth = residency.plan
        with monkeypatch.context() as patch:
            patch.setattr(residency, "plan", lambda event: change(event, truth(event)))
            with pytest.raises(RuntimeError, match=sentence):
                play_singly(model)
        model.check()
        assert np.array_equal(play(model), expected("qwen3moe"))


# What a residency that lies about guesses answers, and the sentence that must come of it.
NO_SUCH = "guesses an expert or into a slot that does not exist"
FALSE_GUESSES = {
    "of no expert": (3 * 16, 0, NO_SUCH),
    "negative": (-1, 0, NO_SUCH),
    "outside the arena": (0, N_SLOTS, NO_SUCH),
    # A slot may be guessed into while the event computes on it; but what was there is gone then.
    "over an expert that stays": (47, None, "takes an expert for resident that is not"),
}


@pytest.mark.parametrize("lie", FALSE_GUESSES)
def test_lying_guess(
    lie: str,
    tiny_file: TinyFile,
    expected: Callable[[str], Logits],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    predictor = RandomGuesses([0, 1, 2], 16, n=1)
    with ours(tiny_file("qwen3moe"), N_SLOTS, predictor=predictor) as model:
        assert np.array_equal(play(model), expected("qwen3moe"))
        residency = model.controller.residency

        def guess(event: RouteEvent, *_: Any) -> list[tuple[int, int]]:
            key, slot, _ = FALSE_GUESSES[lie]
            in_use = residency.slot_of[event.layer * 16 + event.experts[-1]]
            return [(key, in_use if slot is None else slot)]

        with monkeypatch.context() as patch:
            patch.setattr(residency, "guess", guess)
            # A guess may be given up before it is read, and the table never knew of this one.
            patch.setattr(residency, "drop", lambda keys: None)
            with pytest.raises(RuntimeError, match=FALSE_GUESSES[lie][2]):
                play_singly(model)
        model.check()
        assert np.array_equal(play(model), expected("qwen3moe"))


def play_singly(model: Ours) -> None:
    """Token by token, so that no slot is used twice in an event."""
    context = model.context()
    for i, token in enumerate(random_tokens(20)):
        context.decode(rows([token], i))


def test_plan_of_another_step_is_refused(tiny_file: TinyFile) -> None:
    """A callback that returns without an answer (as ctypes does when it raises) fails the step."""
    with ours(tiny_file("qwen3moe"), N_SLOTS) as model:
        play(model)
        model.arena.plugin.bind(lambda: 0, lambda: 0, lambda: 0)
        with pytest.raises(RuntimeError, match="could not compute"):
            play(model)


# --- 6: cancelling --------------------------------------------------------------------------------


def test_guesses_cancelled_from_outside(
    tiny_file: TinyFile, expected: Callable[[str], Logits], direct_io: None
) -> None:
    """Between steps, from the thread that steps: whatever was not yet read is forgotten."""
    cancelled = 0
    predictor = RandomGuesses([0, 1, 2], 16, n=24)
    options = {"lanes": 1, "reads": "direct", "cache": Leaky(), "predictor": predictor}
    with ours(tiny_file("qwen3moe"), 40, **options) as model:
        context = model.context()
        with stock(tiny_file("qwen3moe")) as other:
            reference = other.context()
            for i, token in enumerate(random_tokens(60)):
                want = reference.decode(rows([token], i))
                assert np.array_equal(context.decode(rows([token], i)), want)
                model.arena.cancel_guesses()
                model.check()
                cancelled = model.stats().guess_cancelled
        assert 0 < cancelled < model.stats().guess_loads
        assert np.array_equal(play(model), expected("qwen3moe"))


@pytest.mark.parametrize("err", [errno.EIO, 0])
def test_a_failed_guess_is_read_again(
    err: int, tiny_file: TinyFile, expected: Callable[[str], Logits]
) -> None:
    """It failed before anyone asked for it, so it is no error."""
    path, events = tiny_file("qwen3moe"), Events()
    with ours(path, recorder=events) as model:
        play(model)
    right = [16 + e for e in range(16) if e in events.ids[1]]

    class Wait(Events):
        """Layer 1's event asks for nothing until the guesses for it are read."""

        def record(
            self, event: RouteEvent, ids: list[int], continuation: bool, cancelled: Sequence[int]
        ) -> None:
            if len(self.ids) == 1:
                time.sleep(1)  # what counts them is locked while a step runs
            super().record(event, ids, continuation, cancelled)

    predictor = ScriptedGuesses({0: right})
    with ours(path, recorder=Wait(), lanes=1, predictor=predictor) as model:
        n_demanded = 3 * len(set(events.ids[0]))
        model.arena.plugin.inject(n_demanded, err)
        assert np.array_equal(play(model), expected("qwen3moe"))
        assert model.controller.residency.guesses_used > 0
        stats = model.stats()
        assert stats.guess_loads == len(right)
        # Only reads that succeeded count, and of the failed guess no further part was tried.
        assert stats.reads == 3 * (model.misses + len(right))


@pytest.mark.parametrize("err", [errno.EIO, 0])
def test_guesses_that_fail_at_any_time(
    err: int, tiny_file: TinyFile, expected: Callable[[str], Logits]
) -> None:
    """A failed guess is read again or, when someone waited for it, reported; never used."""
    want = expected("qwen3moe")
    n_failed = n_silent = 0
    for skip in range(12, 140, 8):
        predictor = RandomGuesses([0, 1, 2], 16, n=8, seed=skip)
        with ours(tiny_file("qwen3moe"), 30, lanes=1, predictor=predictor) as model:
            model.arena.plugin.inject(skip, err)
            context = model.context()
            try:
                for i, token in enumerate(random_tokens(6)):
                    context.decode(rows([token], i))
                n_silent += model.stats().reads > skip
            except ExpertReadError:
                n_failed += 1
            model.arena.plugin.inject(-1, 0)
            model.check_table()
            assert np.array_equal(play(model), want)
    assert n_failed > 0
    assert n_silent > 0


def test_abort_callback_of_llama_cpp(
    llama: moe_gguf.Llama, expected: Callable[[str], Logits]
) -> None:
    """An aborted step is llama.cpp's own affair (its code 2), and the model stays usable."""
    calls = itertools.count()
    stop = llama_cpp.ggml_abort_callback(lambda _: next(calls) > 60)
    never = llama_cpp.ggml_abort_callback(lambda _: False)
    llama_cpp.llama_set_abort_callback(llama.ctx, stop, None)
    with pytest.raises(RuntimeError, match="returned 2"):
        evaluate(llama)
    llama_cpp.llama_set_abort_callback(llama.ctx, never, None)
    check_usable(llama, expected("qwen3moe"))


# --- 7 and 8: the budget --------------------------------------------------------------------------

CHILD = """
import sys
import moe_gguf
from moe_gguf.runtime.system import rss_peak
path, memory = sys.argv[1:]
try:
    llama = moe_gguf.Llama(path, memory=memory, n_ctx=512, n_threads=2)
except moe_gguf.UserError as error:
    print(error)
    sys.exit(2)
prompt = "Hello world, the expert of memory " * 20
out = llama.create_completion(prompt, max_tokens=64, temperature=0)
print(out["usage"]["completion_tokens"], rss_peak(), llama.stats()["budget_bytes"])
"""
NAMED = re.compile(r"smallest budget that works is (\d+)MB")


def child(path: Path, memory: str, group: cgroup.Group | None = None) -> Any:
    command = [sys.executable, "-c", CHILD, str(path), memory]
    if group is not None:
        command = group.command(command)
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def smallest(path: Path) -> int:
    """The budget in MB that a refusal names."""
    refused = child(path, "20MB")
    assert refused.returncode == 2, refused.stderr
    assert "20.0 MB of memory is too little" in refused.stdout
    match = NAMED.search(refused.stdout)
    assert match, refused.stdout
    return int(match[1])


@pytest.mark.parametrize("layout", ["qwen3moe", "gemma4", "mixtral"])
def test_refused_budget_names_one_that_works(layout: str, tiny_file: TinyFile) -> None:
    path = tiny_file(layout)
    done = child(path, f"{smallest(path)}MB")
    assert done.returncode == 0, done.stdout + done.stderr
    n_tokens, peak, budget = map(int, done.stdout.split())
    assert n_tokens == 64
    assert peak <= budget


@pytest.mark.parametrize("extra_mb", [0, 20])
def test_process_lives_in_a_cgroup_of_its_budget(extra_mb: int, tiny_file: TinyFile) -> None:
    path = tiny_file("mixtral", mixed=True)
    n_bytes = (smallest(path) + extra_mb) * 10**6
    limits = cgroup.Limits(memory=n_bytes)
    if (reason := cgroup.refusal(limits)) is not None:
        missing(f"no memory cgroup can be made ({reason})")
    with cgroup.limited(limits) as group:
        done = child(path, str(n_bytes), group)
        assert group.oom_kills() == 0
    assert done.returncode == 0, done.stdout + done.stderr
    n_tokens, peak, budget = map(int, done.stdout.split())
    assert n_tokens == 64
    assert budget == n_bytes
    assert peak <= n_bytes
