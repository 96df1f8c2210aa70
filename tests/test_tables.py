"""Tables on disk: what is looked up by row is as exact from disk as from memory.

A pass proves:

 1  identity    logits equal stock's with every table on disk: architectures, types of rows, read
                modes, splits, bundles, several sequences and contexts, a cache of a few rows
 2  ahead       every row was under way before the model asked for it, n-grams included
 3  failures    a failed read fails the step, names the file, and leaves the model usable; a row
                that does not exist is an error, not a read beyond the end
 4  size        tables larger than memory load, above 4 GiB too, and are counted where they are
"""

from __future__ import annotations

import ctypes
import errno
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from conftest import MakeBundle, TinyFile, ZooFile
from gguf import GGMLQuantizationType as Quant
from harness import Context, Logits, Model, Ours, Row, ours, random_tokens, rows, stock
from tables import with_rows, with_table_last, with_type

import moe_gguf
from moe_gguf import ExpertReadError, UserError
from moe_gguf.runtime import opening
from moe_gguf.runtime.cli.inspect import describe
from moe_gguf.runtime.formats.layout import EMBEDDING
from moe_gguf.runtime.formats.open import read_layout
from moe_gguf.runtime.formats.tables import PER_LAYER, row_bytes, tables_of
from moe_gguf.runtime.options import Options

BOTH = [EMBEDDING, PER_LAYER]
N_PROMPT, N_DECODED = 40, 6


def generation(model: Model) -> Logits:
    """A prompt with tokens that repeat, then what the model says."""
    return in_context(model.context(n_ctx=256))


def in_context(context: Context, seed: int = 1) -> Logits:
    prompt = random_tokens(N_PROMPT - 10, seed)
    logits = [context.decode(rows(prompt + prompt[:10]))]
    for i in range(N_DECODED):
        logits.append(context.decode(rows([int(logits[-1][-1].argmax())], N_PROMPT + i)))
    return np.concatenate(logits)


def sequences(model: Model) -> Logits:
    """Three sequences in one batch, each with its own n-grams, then one token of each."""
    context = model.context(n_ctx=256, n_seq_max=3)
    starts = [5, 9, 13]
    batch = [row for s, n in enumerate(starts) for row in rows(random_tokens(n, s), seq=s)]
    logits = [context.decode(batch)]
    for i in range(3):
        logits.append(context.decode([Row(7 * i + s, n + i, s) for s, n in enumerate(starts)]))
    return np.concatenate(logits)


def check(path: Path, names: list[str], script: Any = generation, **kwargs: Any) -> Any:
    """Bit for bit as stock, with these tables on disk and asked for; the counters."""
    with stock(path) as model:
        expected = script(model)
    assert np.isfinite(expected).all()
    with ours(path, table_rows="disk", **kwargs) as model:
        assert [t.name for t in model.arena.tables] == names
        got = script(model)
        assert np.array_equal(got, expected), f"differs by up to {np.abs(got - expected).max()}"
        stats = model.stats()
        assert stats.table_rows >= N_DECODED
        return stats


@pytest.fixture
def a_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache holds about eight rows of any table here."""
    monkeypatch.setattr(opening, "_ROW_CACHE_BYTES", 4096)


# --- 1, 2 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reads", ["buffered", "direct"])
@pytest.mark.parametrize("architecture", ["gemma4", "qwen4exp"])
def test_both_tables_of_an_architecture(
    architecture: str, reads: str, zoo_file: ZooFile, direct_io: None
) -> None:
    stats = check(zoo_file(architecture), BOTH, reads=reads)
    n_tokens = N_PROMPT + N_DECODED
    per_token = 1 + (4 if architecture == "qwen4exp" else 1)
    assert stats.table_rows == n_tokens * per_token
    assert stats.table_missed == 0
    assert 0 < stats.table_ahead < stats.table_rows, "repeated tokens are read once"


def test_n_grams_of_several_sequences(zoo_file: ZooFile) -> None:
    assert check(zoo_file("qwen4exp"), BOTH, sequences).table_missed == 0


TYPES = [Quant.F32, Quant.F16, Quant.BF16, Quant.Q8_0, Quant.Q4_0, Quant.Q6_K, Quant.MXFP4]


@pytest.mark.parametrize("quant", TYPES, ids=lambda q: q.name)
def test_rows_of_any_type(quant: Quant, tiny_file: TinyFile, tmp_path: Path) -> None:
    path = with_type(tiny_file("qwen3moe"), tmp_path / "typed.gguf", EMBEDDING, quant)
    check(path, [EMBEDDING], reads="direct")


@pytest.mark.parametrize("layout", ["gpt-oss", "deepseek2", "llama4"])
def test_the_embedding_of_another_architecture(layout: str, tiny_file: TinyFile) -> None:
    assert check(tiny_file(layout), [EMBEDDING]).table_missed == 0


def test_a_split_model(tiny_file: TinyFile) -> None:
    check(tiny_file("qwen3moe", split=True), [EMBEDDING])


def test_a_bundle(tiny_file: TinyFile, bundle: MakeBundle) -> None:
    check_bundle = bundle(tiny_file("qwen3moe"))
    with stock(tiny_file("qwen3moe")) as model:
        expected = generation(model)
    with ours(check_bundle, table_rows="disk") as model:
        assert np.array_equal(generation(model), expected)
        assert model.stats().table_rows == N_PROMPT + N_DECODED


@pytest.mark.parametrize("architecture", ["gemma4", "qwen4exp"])
def test_a_cache_of_a_few_rows(architecture: str, a_few_rows: None, zoo_file: ZooFile) -> None:
    """A batch asks for more rows than there is room for, so they come in turns."""
    stats = check(zoo_file(architecture), BOTH)
    assert stats.table_missed > 20


def test_nothing_was_said_ahead(zoo_file: ZooFile) -> None:
    with stock(zoo_file("qwen4exp")) as model:
        expected = generation(model)
    with ours(zoo_file("qwen4exp"), table_rows="disk") as model:
        model.arena.ahead = None
        assert np.array_equal(generation(model), expected)
        stats = model.stats()
        assert stats.table_ahead == 0
        assert 0 < stats.table_missed < stats.table_rows


def test_two_contexts_at_once(a_few_rows: None, zoo_file: ZooFile) -> None:
    path = zoo_file("qwen4exp")
    with stock(path) as model:
        expected = [in_context(model.context(n_ctx=256), seed) for seed in (1, 2)]
    with ours(path, table_rows="disk") as model:
        contexts = [model.context(n_ctx=256) for _ in expected]
        got: dict[int, Logits] = {}

        def work(i: int) -> None:
            got[i] = in_context(contexts[i], i + 1)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i, wanted in enumerate(expected):
            assert np.array_equal(got[i], wanted)


def test_a_cast_of_the_table_itself(zoo_file: ZooFile) -> None:
    """gemma4, given embeddings instead of tokens, casts a view of its table's first row."""

    def given_embeddings(model: Model) -> Logits:
        context = model.context(n_ctx=64)
        n, n_embd = 3, int(llama_cpp.llama_model_n_embd(model.model))
        values = np.random.default_rng(0).standard_normal((n, n_embd)).astype(np.float32)
        batch = llama_cpp.llama_batch_init(n, n_embd, 1)
        batch.n_tokens = n
        ctypes.memmove(batch.embd, values.ctypes.data, values.nbytes)
        for i in range(n):
            batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = i, 1, 0
            batch.logits[i] = True
        assert llama_cpp.llama_decode(context.ctx, batch) == 0
        llama_cpp.llama_batch_free(batch)
        pointer = llama_cpp.llama_get_logits_ith(context.ctx, -1)
        return np.ctypeslib.as_array(pointer, (context.n_vocab,)).copy()

    with stock(zoo_file("gemma4")) as model:
        expected = given_embeddings(model)
    with ours(zoo_file("gemma4"), table_rows="disk") as model:
        assert np.array_equal(given_embeddings(model), expected)
        assert model.stats().table_rows == 1  # and none of the embedding, which is not computed


def test_a_tied_embedding_stays_in_memory(tiny_file: TinyFile) -> None:
    path = tiny_file("qwen3moe", tied=True)
    assert not tables_of(read_layout(path))
    with stock(path) as model:
        expected = generation(model)
    with ours(path, table_rows="disk") as model:
        assert np.array_equal(generation(model), expected)
        assert model.stats().table_rows == 0


# --- 3 --------------------------------------------------------------------------------------------


@pytest.fixture
def unannounced(zoo_file: ZooFile) -> Iterator[Ours]:
    with ours(zoo_file("qwen4exp"), table_rows="disk") as model:
        model.arena.ahead = None
        yield model


@pytest.mark.parametrize("err", [errno.EIO, 0])
@pytest.mark.parametrize("skip", [0, 3])
def test_a_row_that_cannot_be_read(
    err: int, skip: int, unannounced: Ours, zoo_file: ZooFile
) -> None:
    with stock(zoo_file("qwen4exp")) as model:
        expected = generation(model)
    model = unannounced
    model.plugin.inject(skip, err)
    with pytest.raises(ExpertReadError, match=str(zoo_file("qwen4exp"))):
        model.context(n_ctx=256).decode(rows(random_tokens(20)))
    assert np.array_equal(generation(model), expected)


def test_a_row_fetched_ahead_in_vain_is_read_again(zoo_file: ZooFile) -> None:
    with stock(zoo_file("qwen4exp")) as model:
        expected = generation(model)
    with ours(zoo_file("qwen4exp"), table_rows="disk") as model:
        model.plugin.inject(0, errno.EIO)
        assert np.array_equal(generation(model), expected)
        assert model.stats().table_missed > 0


def test_a_truncated_table_fails_steps_until_it_is_whole(
    tiny_file: TinyFile, tmp_path: Path
) -> None:
    path = with_table_last(tiny_file("qwen3moe"), tmp_path / "cut.gguf", EMBEDDING)
    with stock(path) as model:
        expected = generation(model)
    whole = path.read_bytes()
    with ours(path, table_rows="disk") as model:
        with path.open("r+b") as file:
            file.truncate(len(whole) - model.arena.tables[0].n_bytes)
        for _ in range(2):
            with pytest.raises(ExpertReadError, match="ended early"):
                generation(model)
        with path.open("r+b") as file:
            file.write(whole)
        assert np.array_equal(generation(model), expected)


class InitParams(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = [
        ("bytes", ctypes.c_size_t),
        ("memory", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    ]


def ggml(name: str, *args: Any, restype: Any = ctypes.c_void_p) -> Any:
    """Call a function of ggml; a pointer comes back as one."""
    function = llama_cpp.llama_cpp._lib[f"ggml_{name}"]
    function.restype = restype
    result = function(*args)
    return ctypes.c_void_p(result) if restype is ctypes.c_void_p else result


def look_up(model: Ours, name: str, wanted: list[int]) -> int:
    """The status of a GET_ROWS over the model's table, in a graph of our own."""
    table = next(t for t in model.arena.tables if t.name == name)
    weights, graphs = (ggml("init", InitParams(1 << 20, None, True)) for _ in range(2))
    ne = [ctypes.c_int64(n) for n in table.ne]
    tensor = ggml("new_tensor_2d", weights, table.ggml_type, *ne)
    ggml("set_name", tensor, name.encode())
    buft = ctypes.c_void_p(model.plugin.table_buffer_type())
    buffers = [ggml("backend_alloc_ctx_tensors_from_buft", weights, buft)]
    ids = ggml("new_tensor_1d", graphs, 26, ctypes.c_int64(len(wanted)))  # I32
    node = ggml("get_rows", graphs, tensor, ids)
    cpu = ggml("backend_cpu_buffer_type")
    buffers.append(ggml("backend_alloc_ctx_tensors_from_buft", graphs, cpu))
    values = (ctypes.c_int32 * len(wanted))(*wanted)
    n_bytes = ctypes.c_size_t(ctypes.sizeof(values))
    ggml("backend_tensor_set", ids, values, ctypes.c_size_t(0), n_bytes, restype=None)
    graph = ggml("new_graph", graphs)
    ggml("build_forward_expand", graph, node, restype=None)
    backend = ggml("backend_dev_init", ggml("backend_dev_by_name", b"MOE"), None)
    status: int = ggml("backend_graph_compute", backend, graph, restype=ctypes.c_int)
    ggml("backend_free", backend, restype=None)
    for buffer in buffers:
        ggml("backend_buffer_free", buffer, restype=None)
    for context in (weights, graphs):
        ggml("free", context, restype=None)
    return status


@pytest.mark.parametrize("row", [-1, 305, 2**31 - 1])
def test_a_row_that_does_not_exist(row: int, unannounced: Ours) -> None:
    """ggml-cpu ends the process over it; llama.cpp checks tokens, but not what it hashes."""
    assert look_up(unannounced, EMBEDDING, [0, 304]) == 0
    assert look_up(unannounced, EMBEDDING, [0, row]) == -1
    error = unannounced.plugin.take_error()
    assert f"row {row} of {EMBEDDING} was asked for, which has 305" in str(error)


def test_an_adapter_cannot_have_its_tables_on_disk(tiny_file: TinyFile) -> None:
    with pytest.raises(UserError, match="table_rows=disk"):
        moe_gguf.Llama(tiny_file("qwen3moe"), lora_path="adapter.gguf", table_rows="disk")


# --- 4 --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def huge(zoo_file: ZooFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An n-gram table of a little more than 4 GiB, of which a few KB are not a hole."""
    path = tmp_path_factory.mktemp("huge") / "huge.gguf"
    table = next(t for t in read_layout(zoo_file("qwen4exp")).tensors if t.name == PER_LAYER)
    return with_rows(zoo_file("qwen4exp"), path, (1 << 32) // row_bytes(table) + 64)


def command(*args: str) -> dict[str, Any]:
    """What a command prints as JSON; in a process of its own, which llama.cpp may end."""
    done = subprocess.run(
        [sys.executable, "-m", "moe_gguf", *args, "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_a_table_above_4_gib_ended_the_process(huge: Path, zoo_file: ZooFile) -> None:
    """llama.cpp mapped it by itself, and there is nothing to map in our stream."""
    resident = command("plan", str(huge), "--memory", "6GB", "--table-rows", "resident")
    assert resident["trunk_bytes"] > 1 << 32
    options = ("--memory", "1GB", "-n", "6", "--temp", "0", "-p", "Hello world")
    small = command("run", str(zoo_file("qwen4exp")), *options)
    large = command("run", str(huge), *options)
    assert large["tokens"] == small["tokens"]
    assert large["stats"]["table_rows"] > 0
    assert large["stats"]["rss_peak_bytes"] < 200e6


def test_auto_leaves_on_disk_what_does_not_fit(huge: Path) -> None:
    plans = {size: plan(huge, size) for size in ("1GB", "6GB")}
    assert [t["name"] for t in plans["1GB"]["tables"]] == [PER_LAYER]
    assert plans["1GB"]["rows_bytes"] == opening._ROW_CACHE_BYTES
    assert plans["1GB"]["trunk_bytes"] < 2e6
    assert not plans["6GB"]["tables"]
    assert plans["6GB"]["rows_bytes"] == 0
    refused = plan(huge, "1MB")
    assert not refused["fits"]
    assert plan(huge, str(refused["smallest_bytes"]))["fits"]


def plan(path: Path, memory: str) -> dict[str, Any]:
    from moe_gguf.runtime.cli.plan import plan_document

    return plan_document(path, 64, memory=memory)


def test_small_tables_stay_in_memory_unless_told(zoo_file: ZooFile) -> None:
    assert not plan(zoo_file("qwen4exp"), "1GB")["tables"]
    assert not plan(zoo_file("qwen4exp"), "1MB")["tables"]


def test_tables_are_told_of(huge: Path, zoo_file: ZooFile) -> None:
    assert [t["name"] for t in describe(huge)["tables"]] == BOTH
    with ours(zoo_file("qwen4exp"), table_rows="disk") as model:
        line = model.arena.mode_line()
    assert f"on disk: {EMBEDDING} (" in line
    assert f", {PER_LAYER} (" in line
    assert " + rows " in line


def test_another_place_for_tables_is_refused() -> None:
    with pytest.raises(UserError, match="auto, resident, disk"):
        Options(table_rows="ram")
