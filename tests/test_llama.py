"""``moe_gguf.Llama`` is ``llama_cpp.Llama``: every method of it, with stock's own answers.

A tiny model through both classes with the same settings and seeds, in an arena of 40 % of the
experts, so that equal answers come from experts read on the way.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from conftest import TinyFile
from harness import fix_slots
from llama_cpp import _internals as internals

import moe_gguf
from moe_gguf import UserError
from moe_gguf.policies.base import Guess, RouteEvent

N_SLOTS = 19  # of 48
SETTINGS: dict[str, Any] = {
    "n_ctx": 256,
    "n_batch": 64,
    "n_threads": 1,
    "n_threads_batch": 1,
    "seed": 11,
    "verbose": False,
}
SAMPLED: dict[str, Any] = {"max_tokens": 24, "temperature": 0.9, "seed": 5}
PROMPT = "Hello world, the expert of memory"

# design.md's table, which every face of the package shares.
STATS = {
    *("prefill_tps", "decode_tps", "hits", "misses", "hit_rate", "bytes_read", "bytes_per_token"),
    *("stall_s", "compute_s", "guesses", "guesses_used", "budget_bytes", "rss_peak_bytes", "slots"),
    *("policy", "reads", "device"),
}
EXTRA_STATS = {
    "phases",
    *("prefill_tokens", "decode_tokens", "decode_s", "route_s", "guess_s", "tell_s", "disk_s"),
    *("hit_rate_in_time", "guesses_late", "guess_bytes", "recall", "layers"),
    *("low_share", "low_bytes_read"),
    *("table_rows", "table_missed", "table_ahead"),
    *(
        "device_slots",
        "device_waits",
        "device_passed",
        "device_wait_s",
        "device_routed",
        "uploads",
        "uploads_ahead",
        "bytes_uploaded",
    ),
    *("cpu_experts", "cpu_pairs", "cpu_s"),
}


def plain_stock(path: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> llama_cpp.Llama:
    """Stock with the kernels that weights in slots get: the class has no argument for it."""
    original = internals.LlamaModel.__init__

    def init(self: Any, *, params: Any, **kwargs: Any) -> None:
        params.use_extra_bufts = False
        original(self, params=params, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(internals.LlamaModel, "__init__", init)
        return llama_cpp.Llama(str(path), **(SETTINGS | settings))


def open_ours(path: Path, **settings: Any) -> moe_gguf.Llama:
    given = {"memory": "1GB", "reads": "buffered", "lanes": 2, "repack": "off"}
    settings = given | SETTINGS | settings
    return moe_gguf.Llama(path, **settings)


class Pair:
    """The same model twice."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        fix_slots(monkeypatch, N_SLOTS)
        self.stock = plain_stock(path, monkeypatch, **settings)
        self.ours = open_ours(path, **settings)

    def same(self, call: Callable[[Any], Any]) -> Any:
        expected = strip(call(self.stock))
        got = strip(call(self.ours))
        assert got == expected
        return got

    def close(self) -> None:
        self.ours.close()
        self.stock.close()


def strip(answer: Any) -> Any:
    """An answer without what differs between any two calls."""
    if isinstance(answer, dict):
        return {k: strip(v) for k, v in answer.items() if k not in ("id", "created", "model")}
    if isinstance(answer, list):
        return [strip(item) for item in answer]
    return answer


@pytest.fixture
def pair(tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    both = Pair(tiny_file("qwen3moe"), monkeypatch)
    yield both
    assert both.ours.arena.controller is not None
    assert both.ours.arena.controller.misses > N_SLOTS, "everything was resident"
    both.ours.arena.controller.residency.check_integrity()
    both.close()


@pytest.fixture
def llama(
    request: pytest.FixtureRequest, tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch
) -> Iterator[moe_gguf.Llama]:
    fix_slots(monkeypatch, N_SLOTS)
    model = open_ours(tiny_file("qwen3moe"), **getattr(request, "param", {}))
    yield model
    model.close()


# --- the public API -------------------------------------------------------------------------------


def test_it_is_a_llama(pair: Pair) -> None:
    assert isinstance(pair.ours, llama_cpp.Llama)
    for name in ("n_ctx", "n_embd", "n_vocab", "token_eos", "token_bos", "token_nl"):
        pair.same(lambda llama, name=name: getattr(llama, name)())
    assert pair.ours.metadata == pair.stock.metadata
    pair.same(lambda llama: llama.create_completion("x" * 50, max_tokens=8))  # some misses


@pytest.mark.parametrize("layout", ["qwen3moe", "gemma4", "gpt-oss", "updown"])
def test_greedy_completion(
    layout: str, tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = Pair(tiny_file(layout), monkeypatch)
    out = both.same(lambda llama: llama.create_completion(PROMPT, max_tokens=48, temperature=0))
    assert out["usage"]["completion_tokens"] == 48
    assert len(set(out["choices"][0]["text"])) > 5
    both.close()


def test_sampled_completion(pair: Pair) -> None:
    first = pair.same(lambda llama: llama.create_completion(PROMPT, **SAMPLED))
    other = pair.same(lambda llama: llama.create_completion(PROMPT, **(SAMPLED | {"seed": 6})))
    assert first["choices"][0]["text"] != other["choices"][0]["text"]
    pair.same(lambda llama: llama(PROMPT, echo=True, stop=["e"], **SAMPLED))
    pair.same(lambda llama: llama(PROMPT, repeat_penalty=1.3, top_k=5, min_p=0.2, **SAMPLED))
    pair.same(lambda llama: llama(PROMPT, mirostat_mode=2, **SAMPLED))
    pair.same(lambda llama: llama(PROMPT, logit_bias={65: 5.0}, **SAMPLED))


def test_streaming(pair: Pair) -> None:
    chunks = pair.same(lambda llama: list(llama.create_completion(PROMPT, stream=True, **SAMPLED)))
    assert len(chunks) > 5
    whole = pair.same(lambda llama: llama.create_completion(PROMPT, **SAMPLED))
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text == whole["choices"][0]["text"]


def test_a_stream_that_is_left_early(pair: Pair) -> None:
    def two_chunks(llama: Any) -> Any:
        stream = llama.create_completion(PROMPT, stream=True, **SAMPLED)
        chunks = [next(stream), next(stream)]
        stream.close()
        return chunks

    pair.same(two_chunks)
    pair.same(lambda llama: llama.create_completion(PROMPT, **SAMPLED))


def test_chat(pair: Pair) -> None:
    messages = [
        {"role": "system", "content": "Be the expert."},
        {"role": "user", "content": "Hello"},
    ]
    out = pair.same(lambda llama: llama.create_chat_completion(messages, **SAMPLED))
    assert out["choices"][0]["message"]["content"]
    chunks = pair.same(
        lambda llama: list(llama.create_chat_completion(messages, stream=True, **SAMPLED))
    )
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == out["choices"][0]["message"]["content"]


def test_tokenize_and_detokenize(pair: Pair) -> None:
    text = "Hello the expert, naïve ☃\n".encode()
    tokens = pair.same(lambda llama: llama.tokenize(text, add_bos=False))
    assert pair.same(lambda llama: llama.detokenize(tokens)) == text
    pair.same(lambda llama: llama.tokenize(b"<|im_start|>user", special=True))
    pair.same(lambda llama: llama.tokenizer().encode("Hello"))
    pair.same(lambda llama: llama.create_completion(tokens, max_tokens=8, temperature=0))


GRAMMAR = 'root ::= "{" [a-z]+ ":" [0-9] [0-9] [0-9] "}"'


def test_grammar(pair: Pair) -> None:
    def ask(llama: Any) -> Any:
        grammar = llama_cpp.LlamaGrammar.from_string(GRAMMAR, verbose=False)
        return llama.create_completion(PROMPT, grammar=grammar, **(SAMPLED | {"max_tokens": 60}))

    text = pair.same(ask)["choices"][0]["text"]
    assert text.startswith("{")


def test_json_schema(pair: Pair) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    form = {"type": "json_object", "schema": schema}
    out = pair.same(
        lambda llama: llama.create_chat_completion(
            [{"role": "user", "content": "Hello"}], response_format=form, **SAMPLED
        )
    )
    assert out["choices"][0]["message"]["content"].startswith("{")


def test_logprobs(tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    both = Pair(tiny_file("qwen3moe"), monkeypatch, logits_all=True)
    out = both.same(lambda llama: llama.create_completion(PROMPT, logprobs=4, **SAMPLED))
    logprobs = out["choices"][0]["logprobs"]
    assert len(logprobs["token_logprobs"]) == out["usage"]["completion_tokens"]
    assert all(len(top) in (4, 5) for top in logprobs["top_logprobs"])
    n = both.ours.n_tokens
    assert np.array_equal(both.ours.scores[:n], both.stock.scores[:n])
    both.same(lambda llama: llama.create_completion(PROMPT, logprobs=2, echo=True, **SAMPLED))
    both.close()


def test_logprobs_need_logits_all(llama: moe_gguf.Llama) -> None:
    with pytest.raises(ValueError, match="logits_all"):
        llama.create_completion(PROMPT, logprobs=4)


@pytest.mark.parametrize("pooling", ["NONE", "MEAN", "LAST"])
def test_embeddings(pooling: str, tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    pooling_type = getattr(llama_cpp, f"LLAMA_POOLING_TYPE_{pooling}")
    both = Pair(
        tiny_file("qwen3moe"), monkeypatch, embedding=True, pooling_type=pooling_type, n_batch=32
    )
    texts = ["Hello world", "the expert of memory and", "a"]
    out = both.same(lambda llama: llama.create_embedding(texts))
    assert len(out["data"]) == 3
    assert out["usage"]["prompt_tokens"] > 3
    both.same(lambda llama: llama.embed("Hello", normalize=True))
    assert both.ours.stats()["misses"] > 0
    both.close()


def test_eval_sample_and_reset(pair: Pair) -> None:
    tokens = pair.ours.tokenize(PROMPT.encode())

    def by_hand(llama: Any) -> list[int]:
        llama.reset()
        llama.eval(tokens)
        out = []
        for _ in range(8):
            out.append(llama.sample(temp=0.0))
            llama.eval(out[-1:])
        return out

    first = pair.same(by_hand)
    assert pair.same(by_hand) == first
    assert pair.same(lambda llama: list(llama.eval_tokens)) == tokens + first


def test_generate_reuses_a_common_prefix(pair: Pair) -> None:
    tokens = pair.ours.tokenize(PROMPT.encode())

    def take(llama: Any, prompt: list[int], n: int) -> list[int]:
        stream = llama.generate(prompt, temp=0.0)
        return [next(stream) for _ in range(n)]

    pair.same(lambda llama: take(llama, tokens, 6))
    pair.ours.reset_stats()
    pair.same(lambda llama: take(llama, [*tokens, 300, 5], 6))
    assert pair.ours.stats()["prefill_tokens"] < len(tokens)


def test_save_and_load_state(pair: Pair) -> None:
    tokens = pair.ours.tokenize(PROMPT.encode())

    def branch(llama: Any) -> list[list[int]]:
        llama.reset()
        llama.eval(tokens)
        state = llama.save_state()
        out = []
        for word in (b" and", b" of", b" and"):
            llama.load_state(state)
            assert llama.n_tokens == len(tokens)
            llama.eval(llama.tokenize(word, add_bos=False))
            row = []
            for _ in range(5):
                row.append(llama.sample(temp=0.0))
                llama.eval(row[-1:])
            out.append(row)
        return out

    first, second, third = pair.same(branch)
    assert first == third != second


def test_state_crosses_over(pair: Pair) -> None:
    """What stock saved, ours continues."""
    tokens = pair.ours.tokenize(PROMPT.encode())
    pair.stock.eval(tokens)
    state = pair.stock.save_state()
    pair.ours.load_state(state)

    def go_on(llama: Any) -> list[int]:
        llama.eval([7])
        return [llama.sample(temp=0.0)]

    pair.same(go_on)
    pair.same(lambda llama: llama.create_completion("x" * 50, max_tokens=8))


def test_ram_cache(pair: Pair) -> None:
    def ask(llama: Any) -> Any:
        llama.set_cache(llama_cpp.LlamaRAMCache())
        return [llama.create_completion(PROMPT, **SAMPLED) for _ in range(2)]

    pair.same(ask)


def test_context_overflow_is_stock_s_error(pair: Pair) -> None:
    for llama in (pair.stock, pair.ours):
        with pytest.raises(ValueError, match="exceed context window"):
            llama.create_completion("Hello " * 300)
    pair.same(lambda llama: llama.create_completion(PROMPT, **SAMPLED))


# --- several at once ------------------------------------------------------------------------------


def test_instances_beside_each_other(tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of ours and two of stock, of two models, advanced in turn."""
    paths = [tiny_file("qwen3moe"), tiny_file("gpt-oss")]
    pairs = [Pair(path, monkeypatch) for path in paths]
    models = [(p.ours, p.stock) for p in pairs]
    tokens = pairs[0].ours.tokenize(PROMPT.encode())
    streams = [tuple(m.generate(tokens, temp=0.0) for m in both) for both in models]
    out: list[list[int]] = [[], []]
    for _ in range(24):
        for i, (a, b) in enumerate(streams):
            token = next(a)
            assert token == next(b)
            out[i].append(token)
    assert out[0] != out[1]
    pairs[0].close()
    for _ in range(4):  # the other goes on without the first
        assert next(streams[1][0]) == next(streams[1][1])
    pairs[1].close()


def test_instances_in_threads(tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    fix_slots(monkeypatch, N_SLOTS)
    path = tiny_file("qwen3moe")
    models = [open_ours(path) for _ in range(2)]
    texts: list[list[str]] = [[], []]

    def work(i: int) -> None:
        for _ in range(5):
            models[i].reset()
            out = models[i].create_completion(PROMPT, max_tokens=16, temperature=0)
            texts[i].append(out["choices"][0]["text"])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts[0]) == len(texts[1]) == 5
    assert len({*texts[0], *texts[1]}) == 1
    for model in models:
        model.close()


def test_stock_models_load_as_ever(tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader hook is gone after construction, also after one that failed inside it."""
    before = llama_cpp.llama_cpp.llama_model_load_from_file
    with pytest.raises(UserError, match="smallest budget"):
        open_ours(tiny_file("qwen3moe"), memory="2MB")
    assert llama_cpp.llama_cpp.llama_model_load_from_file is before
    ours = open_ours(tiny_file("qwen3moe"))
    assert llama_cpp.llama_cpp.llama_model_load_from_file is before
    stock = plain_stock(tiny_file("qwen3moe"), monkeypatch)
    expected, got = (strip(llama.create_completion(PROMPT, **SAMPLED)) for llama in (stock, ours))
    assert got == expected
    stock.close()
    ours.close()


# --- life and death -------------------------------------------------------------------------------


def n_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def settled(count: Callable[[], int], at_most: int) -> bool:
    """A joined thread stays listed for a moment."""
    deadline = time.monotonic() + 2
    while count() > at_most and time.monotonic() < deadline:
        time.sleep(0.01)
    return count() <= at_most


def test_close_joins_the_lanes_and_frees_the_arena(
    tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    fix_slots(monkeypatch, N_SLOTS)
    path = tiny_file("qwen3moe")
    open_ours(path).close()  # ggml's own threads and registries
    before, files = n_threads(), len(os.listdir("/proc/self/fd"))
    llama = open_ours(path, lanes=7)
    assert n_threads() >= before + 7
    llama.create_completion(PROMPT, **SAMPLED)
    llama.close()
    assert settled(n_threads, before)
    assert len(os.listdir("/proc/self/fd")) == files
    llama.close()
    llama.close()


def test_deleting_is_closing(tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    fix_slots(monkeypatch, N_SLOTS)
    path = tiny_file("qwen3moe")
    open_ours(path).close()
    before = n_threads()
    llama = open_ours(path, lanes=7)
    llama.create_completion(PROMPT, **SAMPLED)
    del llama
    assert settled(n_threads, before)


def test_with_statement_style_closing(llama: moe_gguf.Llama) -> None:
    import contextlib

    with contextlib.closing(llama) as model:
        model.create_completion(PROMPT, max_tokens=2)


def test_memory_comes_back(tiny_file: TinyFile) -> None:
    """Ten times open and close: the process does not grow by what a model takes."""
    import psutil

    path = tiny_file("mixtral", mixed=True)
    process = psutil.Process()

    def once() -> int:
        llama = open_ours(path)
        llama.create_completion(PROMPT, **SAMPLED)
        llama.close()
        return int(process.memory_info().rss)

    for _ in range(3):
        before = once()
    for _ in range(10):
        after = once()
    assert after - before < 10e6  # one open model takes 17 MB


UNCLOSED = """
import sys, moe_gguf
llama = moe_gguf.Llama(sys.argv[1], memory="1GB", n_threads=1, n_ctx=256, lanes=4)
{body}
"""


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("print(llama('Hello', max_tokens=8)['usage']['completion_tokens'])", 0),
        ("import builtins; builtins.kept = llama; print(llama.n_vocab())", 0),
        ("import itertools; kept = itertools.cycle([llama]); print(llama('x')['object'])", 0),
        ("llama.self = llama; print(1)", 0),
        ("stream = llama('Hello', max_tokens=8, stream=True); next(stream); print(1)", 0),
        ("other = moe_gguf.Llama(sys.argv[1], memory='1GB', n_threads=1); print(2)", 0),
        ("print(1); sys.exit(3)", 3),
        ("print(1); raise ZeroDivisionError", 1),
    ],
)
def test_unclosed_at_exit(body: str, code: int, tiny_file: TinyFile) -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNCLOSED.format(body=body), str(tiny_file("qwen3moe"))],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, done.stderr
    assert done.stdout.strip()
    if code == 0:
        assert done.stderr == ""


def test_use_after_an_exception(pair: Pair) -> None:
    class Stop(Exception):
        pass

    def processor(ids: Any, scores: Any) -> Any:
        raise Stop

    for _ in range(2):
        stream = pair.ours.create_completion(PROMPT, stream=True, **SAMPLED)
        next(stream)
        with pytest.raises(Stop):
            stream.throw(Stop)
    with pytest.raises(TypeError):
        pair.ours.eval(["no token"])
    pair.same(lambda llama: llama.create_completion(PROMPT, **SAMPLED))


def test_stats_after_close(llama: moe_gguf.Llama) -> None:
    llama.close()
    with pytest.raises(RuntimeError, match="the model is closed"):
        llama.stats()


# --- what is ours ---------------------------------------------------------------------------------


@pytest.mark.parametrize("llama", [{"policy": "lru"}], indirect=True)  # its reads can be counted
def test_stats(llama: moe_gguf.Llama) -> None:
    assert llama.stats().keys() == STATS | EXTRA_STATS
    assert llama.stats()["hits"] == llama.stats()["misses"] == llama.stats()["bytes_read"] == 0
    prompt = llama.tokenize(PROMPT.encode())
    llama.create_completion(prompt, max_tokens=16, temperature=0)
    stats = llama.stats()
    assert stats["prefill_tokens"] == len(prompt)
    assert stats["decode_tokens"] == 15  # the sixteenth is sampled, not evaluated
    assert stats["prefill_tps"] > 0
    assert stats["decode_tps"] > 0
    assert stats["decode_tps"] == pytest.approx(15 / stats["decode_s"])
    assert stats["hit_rate"] == stats["hits"] / (stats["hits"] + stats["misses"])
    assert stats["misses"] > N_SLOTS
    blob = llama.found.layout.layers[0].blob_bytes
    assert stats["bytes_read"] == stats["misses"] * blob
    assert 0 < stats["bytes_per_token"] * 15 < stats["bytes_read"]
    assert stats["slots"] == N_SLOTS
    assert stats["policy"] == "lru"
    assert stats["reads"].startswith("buffered x2")
    assert stats["device"] == "cpu"
    assert stats["budget_bytes"] >= 10**9
    assert stats["rss_peak_bytes"] > 10**7
    for name in ("stall_s", "compute_s", "route_s"):
        assert stats[name] >= 0
    llama.reset_stats()
    again = llama.stats()
    for name in ("hits", "misses", "bytes_read", "prefill_tokens", "decode_tokens", "decode_tps"):
        assert again[name] == 0


def test_mode_line(tiny_file: TinyFile) -> None:
    llama = open_ours(tiny_file("qwen3moe"))
    line = llama.mode_line
    for part in (
        "qwen3moe",
        "3 MoE layers x 16 experts, top-4",
        "1.00 GB = trunk",
        "KV",
        "48 slots",
    ):
        assert part in line
    assert "buffered x2" in line
    assert "policy fate" in line
    assert "LOSSY" not in line
    assert "\n" not in line
    llama.close()


def test_fewer_experts_used_is_named_lossy(
    tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_file("qwen3moe")
    llama = open_ours(path, experts_used=2)
    assert "LOSSY: 2 experts used instead of 4" in llama.mode_line
    stock = plain_stock(path, monkeypatch, kv_overrides={"qwen3moe.expert_used_count": 2})
    full = plain_stock(path, monkeypatch)
    text, lossy, lossless = (
        model.create_completion(PROMPT, max_tokens=24, temperature=0)["choices"][0]["text"]
        for model in (llama, stock, full)
    )
    assert text == lossy != lossless
    for model in (llama, stock, full):
        model.close()


@pytest.mark.parametrize("policy", ["load-on-demand", "lru", "lfu"])
def test_policies_by_name(policy: str, pair: Pair, tiny_file: TinyFile) -> None:
    llama = open_ours(tiny_file("qwen3moe"), policy=policy)
    ask: Callable[[Any], Any] = lambda model: model.create_completion(PROMPT, **SAMPLED)  # noqa: E731
    assert strip(ask(llama)) == pair.same(ask)
    assert llama.stats()["policy"] == policy
    llama.close()


def test_recorder_and_progress(tiny_file: TinyFile) -> None:
    seen: list[tuple[int, int]] = []
    progress: list[float] = []

    class Recorder:
        def record(
            self, event: RouteEvent, ids: list[int], continuation: bool, cancelled: Sequence[int]
        ) -> None:
            assert len(ids) == sum(event.counts)
            seen.append((event.layer, event.n_tokens))

        def record_guesses(self, offered: Sequence[Guess], chosen: Sequence[Guess]) -> None:
            assert set(chosen) <= set(offered)

    llama = open_ours(
        tiny_file("qwen3moe"),
        recorder=Recorder(),
        progress=lambda done, total: progress.append(done / total),
    )
    llama.eval(llama.tokenize(PROMPT.encode()))
    assert [layer for layer, _ in seen] == [0, 1, 2]
    assert progress[-1] == 1.0
    assert progress == sorted(progress)
    llama.close()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"memory": "lots"}, "'lots' is not a size"),
        ({"memory": "2KB"}, "too small for any model"),
        ({"memory": "30MB"}, "smallest budget that works is"),
        ({"memory": 30_000_000}, "smallest budget that works is"),
        ({"memory": -1}, "too"),
        ({"policy": "best"}, "choose one of"),
        ({"reads": "fast"}, "is not a way to read"),
        ({"lanes": 0}, "lanes make no sense"),
        ({"lanes": 1000}, "lanes make no sense"),
        ({"experts_used": 0}, "out of range"),
        ({"experts_used": 17}, "out of range"),
        ({"device": "tpu"}, "there is no device 'tpu' here"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict[str, Any], sentence: str, tiny_file: TinyFile) -> None:
    before = n_threads()
    with pytest.raises(UserError, match=sentence):
        open_ours(tiny_file("qwen3moe"), **arguments)
    assert settled(n_threads, before)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.gguf"):
        open_ours(tmp_path / "none.gguf")
