"""Found, measured, loaded: what is planned is what is run, and each step needs the one before."""

from __future__ import annotations

import contextlib
import ctypes
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyFile
from harness import Row, ours, random_tokens, rows, stock

from moe_gguf import Llama
from moe_gguf.policies.base import Phase
from moe_gguf.policies.cache import LRU
from moe_gguf.policies.order import Popularity
from moe_gguf.policies.presets import Facts, Policy
from moe_gguf.runtime import opening
from moe_gguf.runtime.cli.plan import plan_document
from moe_gguf.runtime.engine.context import StepFailed
from moe_gguf.runtime.options import Options
from moe_gguf.runtime.params import ContextShape, ModelParams, n_ctx_of
from moe_gguf.runtime.sizes import MB

# What a plan leaves at llama.cpp's default and llama_cpp.Llama sets: none of it takes memory.
NO_MEMORY = {
    "rope_freq_base",
    "rope_freq_scale",
    "yarn_ext_factor",
    "yarn_attn_factor",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_orig_ctx",
    "no_perf",
}


def members(struct: ctypes.Structure) -> dict[str, Any]:
    values = {field[0]: getattr(struct, field[0]) for field in struct._fields_}
    return {name: v for name, v in values.items() if isinstance(v, int | float | bool)}


@pytest.mark.parametrize("n_ctx", [None, 0, 512, 1000])
def test_a_plan_asks_for_the_context_that_llama_cpp_python_asks_for(
    tiny_file: TinyFile, n_ctx: int | None
) -> None:
    path = tiny_file("qwen3moe")
    with contextlib.closing(Llama(path, memory="1GB", n_ctx=n_ctx, n_threads=1)) as llama:
        asked = members(llama.context_params)
    found = opening.find(path, Options(memory="1GB"))
    shape = ContextShape(n_ctx_of(found.layout, n_ctx), n_threads=1)
    planned = members(shape.params())
    differing = {name for name in asked if asked[name] != planned[name]}
    assert differing <= NO_MEMORY


def command(*args: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "moe_gguf", *args]
    return subprocess.run(argv, capture_output=True, text=True, check=True, cwd=sys.prefix)


@pytest.mark.parametrize("more", [[], ["--experts-used", "2"], ["--ctx", "1024"]])
def test_plan_and_run_print_the_same_numbers(tiny_file: TinyFile, more: list[str]) -> None:
    path = str(tiny_file("qwen3moe"))
    options = ["--memory", "1GB", "--policy", "lru", "--reads", "buffered", *more]
    plan = json.loads(command("plan", path, "--json", *options).stdout)
    run = command("run", path, "-p", "a", "-n", "1", "--json", *options)
    table = {line.split()[0]: line for line in run.stderr.splitlines() if line.startswith("  ")}
    for name in ("trunk", "KV", "compute"):
        number, unit = table[name].removeprefix("  KV cache").removeprefix(f"  {name}").split()[:2]
        scale = {"B": 1.0, "KB": 1e3, "MB": 1e6}[unit]
        assert float(number) * scale == pytest.approx(plan[f"{name.lower()}_bytes"], abs=scale / 10)
    stats = json.loads(run.stdout)["stats"]
    assert stats["slots"] == plan["slots"]
    assert stats["budget_bytes"] == plan["budget_bytes"]
    assert stats["reads"] == plan["reads"]


def test_plan_names_the_budget_that_run_names(tiny_file: TinyFile) -> None:
    """What it names must work: the process has the same size in both, to what it varies by."""
    path = str(tiny_file("qwen3moe"))
    plan = json.loads(command("plan", path, "--json", "--memory", "1GB").stdout)
    argv = [sys.executable, "-m", "moe_gguf", "run", path, "-p", "a", "--memory", "2MB"]
    refused = subprocess.run(argv, capture_output=True, text=True, cwd=sys.prefix, check=False)
    named = re.search(r"smallest budget that works is (\d+)MB", refused.stderr)
    assert named
    assert int(named[1]) == pytest.approx(plan["smallest_bytes"] / MB, abs=2)


def test_a_plan_leaves_nothing_open(tiny_file: TinyFile) -> None:
    path = tiny_file("qwen3moe")
    plan_document(path, memory="1GB")  # what is loaded once
    before = sorted(Path("/proc/self/fd").iterdir())
    plan_document(path, memory="1GB")
    assert sorted(Path("/proc/self/fd").iterdir()) == before


def test_the_real_process_decides_and_never_gains_slots(tiny_file: TinyFile) -> None:
    found = opening.find(tiny_file("qwen3moe"), Options(memory=1000 * MB))
    with contextlib.closing(found.bind()) as binding:
        params = ModelParams().params
        measured = opening.measure(found, binding, params, ContextShape(512).params())
    needs = measured.needs
    known = needs.trunk + needs.kv + needs.process
    assert measured.with_process(known - MB).needs == needs
    assert measured.with_process(known + MB).needs.process == needs.process + MB


def test_weights_are_repacked_where_nearly_all_experts_stay(tiny_file: TinyFile) -> None:
    path, params, shape = tiny_file("qwen3moe"), ModelParams().params, ContextShape(512).params()

    def held(found: opening.Found) -> opening.Measured:
        binding, measured = opening.bound(found, params, shape)
        binding.close()
        return measured

    found = opening.find(path, Options(memory=1000 * MB))
    measured = held(found)
    assert measured.found.kernels.at_reads
    assert not opening.find(path, Options(memory=1000 * MB, repack="off")).kernels.at_reads
    assert not opening.find(path, Options(memory=50 * MB)).kernels.at_reads  # this process is more
    half = measured.needs.with_slots(found.n_all // 2, found.slots.slot_bytes)
    plain = held(replace(found, total=half))  # what the context takes, the guess did not know
    assert not plain.found.kernels.is_repacked
    assert plain.found.total == half
    forced = opening.find(path, Options(memory=1000 * MB, repack="on"))
    assert held(replace(forced, total=half)).found.kernels.at_reads


def test_a_policy_is_handed_in(tiny_file: TinyFile) -> None:
    asked: list[Facts] = []

    def mine(facts: Facts) -> Policy:
        asked.append(facts)
        return Policy(LRU(), Popularity())

    with contextlib.closing(
        Llama(tiny_file("qwen3moe"), memory="1GB", make_policy=mine, n_threads=1)
    ) as llama:
        llama.create_completion("a", max_tokens=2)
        assert llama.stats()["misses"] > 0
    (facts,) = asked
    assert (facts.n_experts, facts.n_used, list(facts.layers)) == (16, 4, [0, 1, 2])


# --- phases and sequences are said ----------------------------------------------------------------


def test_a_prompt_that_ends_in_one_token_is_a_prompt(tiny_file: TinyFile) -> None:
    """The base class cuts a prompt into batches; the last one may hold a single token."""
    with contextlib.closing(
        Llama(tiny_file("qwen3moe"), memory="1GB", n_batch=8, n_threads=1)
    ) as llama:
        llama.eval(list(range(1, 10)))
        assert llama.stats()["phases"]["prefill"]["steps"] == 2
        assert llama.stats()["prefill_tokens"] == 9
        token = llama.sample(temp=0.0)
        llama.eval([token])
        assert llama.stats()["decode_tokens"] == 1
        llama.eval([5])  # not what was sampled: someone's prompt goes on
        assert llama.stats()["prefill_tokens"] == 10
        llama.eval([6], Phase.DECODE)
        assert llama.stats()["decode_tokens"] == 2


def test_eight_sequences_decoding_are_decoding(tiny_file: TinyFile) -> None:
    with ours(tiny_file("qwen3moe"), 20) as model:
        context = model.context(n_seq_max=8)
        for seq in range(8):
            context.decode(rows(random_tokens(6, seq), seq=seq), Phase.PREFILL)
        context.decode([Row(7 + seq, 6, seq) for seq in range(8)], Phase.DECODE)
        table = model.meter.table()
        assert table["prefill_tokens"] == 48
        assert table["decode_tokens"] == 8
        decode = table["phases"]["decode"]
        assert (decode["steps"], decode["sequences"]) == (1, 8)
        assert decode["bytes_read"] > 0
        sequences = model.meter.sequences
        assert sorted(sequences) == list(range(8))
        assert all((s.prefill_tokens, s.decode_tokens) == (6, 1) for s in sequences.values())
        step = model.meter.last_step
        assert step is not None
        assert (step.phase, step.n_tokens, step.n_sequences) == (Phase.DECODE, 8, 8)
        call = model.plugin.call
        assert (call.phase, call.n_sequences) == (Phase.DECODE, 8)


def test_nobody_resets_another_s_counters(tiny_file: TinyFile) -> None:
    with ours(tiny_file("qwen3moe"), 20) as model:
        model.context().decode(rows(random_tokens(6)))
        native, asked = model.plugin.stats().read_bytes, model.controller.misses
        assert native > 0
        model.reset_stats()
        assert model.plugin.stats().read_bytes == native
        assert model.controller.misses == asked
        assert model.stats().read_bytes == model.misses == model.hits == 0


def test_stock_contexts_need_no_arena(tiny_file: TinyFile) -> None:
    with stock(tiny_file("qwen3moe")) as model:
        context = model.context(n_ctx=256)
        assert context.decode(rows([1, 2, 3]), Phase.PREFILL).shape == (3, context.n_vocab)
        context.decode(rows([1] * 253, 3), Phase.PREFILL)
        with pytest.raises(StepFailed) as full:
            context.decode(rows([1], 256), Phase.DECODE)
    assert full.value.code == 1
