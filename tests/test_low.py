"""Low copies as they run. Gates, and what a pass proves:

1. *Mechanism.* Where the low copy has the main copy's type, every lossy setting gives stock's
   logits to the last bit, with room, few slots and slots used in turns, plain and repacked, with
   guesses; counters prove that low copies were read and computed with.
2. *Precision.* With a smaller type only the tokens that used a low expert change, and stay close;
   what may not be low is not.
3. *Failures.* A read that fails, of a low copy or another, leaves a true table and a usable model.
4. *Named.* Options that cannot work are refused, those that do are in the mode line and the stats.
"""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import MakeBundle, TinyFile
from gguf import GGMLQuantizationType as Quant
from harness import (
    Context,
    Events,
    Logits,
    Model,
    Ours,
    RandomGuesses,
    ours,
    random_tokens,
    rows,
    same,
    stock,
)

from moe_gguf import ExpertReadError, UserError
from moe_gguf.policies.base import Phase
from moe_gguf.policies.precision import tail
from moe_gguf.policies.trace import TraceEvent, TraceRecorder
from moe_gguf.runtime.bench.quality import kl_divergence, log_softmax
from moe_gguf.runtime.bench.report import table
from moe_gguf.runtime.bench.request import Request
from moe_gguf.runtime.bench.rounds import bench
from moe_gguf.runtime.cli.replay import replay_document
from moe_gguf.runtime.cli.trace import trace_metadata
from moe_gguf.runtime.engine.context import Row
from moe_gguf.runtime.llama import Llama
from moe_gguf.runtime.options import Options

N_STEPS = 6
PROMPT = random_tokens(40)
FLAGS = {"mixed": True, "trunk": Quant.Q4_0}
SETTINGS: tuple[dict[str, Any], ...] = (
    {"low_share": 0.5},
    {"low_on_miss": True},
    {"low_share": 0.5, "low_on_miss": True},
)
Script = Callable[[Model], Logits]
Reference = Callable[..., Logits]


def token_by_token(context: Context, pos: int) -> Logits:
    return np.concatenate([context.decode(rows([7 * i], pos + i)) for i in range(N_STEPS)])


def generation(model: Model) -> Logits:
    """Tokens, a prompt, tokens: each meets what the one before left in the slots."""
    context = model.context()
    first = token_by_token(context, 0)
    prompt = context.decode(rows(PROMPT, N_STEPS))
    return np.concatenate([first, prompt, token_by_token(context, N_STEPS + len(PROMPT))])


def prefill(model: Model) -> Logits:
    return model.context().decode(rows(PROMPT))


@pytest.fixture(scope="module")
def reference() -> Reference:
    """Stock's logits of a script; each is run once per file."""
    known: dict[tuple[Path, bool, Script], Logits] = {}

    def get(path: Path, repack: bool = False, script: Script = generation) -> Logits:
        if (path, repack, script) not in known:
            with stock(path, repack=repack) as model:
                known[path, repack, script] = script(model)
        return known[path, repack, script]

    return get


def check_counts(model: Ours, events: Events) -> None:
    controller = model.controller
    assert controller.hits + controller.misses == events.demanded
    assert 0 < controller.low_pairs < controller.pairs
    assert controller.pairs == sum(map(len, events.ids)) - events.continued
    assert 0 < model.meter.table()["low_bytes_read"] <= model.stats().read_bytes


# --- 1 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
@pytest.mark.parametrize("n_slots", [None, 13, 3])
@pytest.mark.parametrize("repacked", [False, True])
def test_a_low_copy_of_the_same_type_changes_nothing(
    layout: str,
    n_slots: int | None,
    repacked: bool,
    tiny_file: TinyFile,
    bundle: MakeBundle,
    reference: Reference,
) -> None:
    path = tiny_file(layout, **FLAGS)
    folder = bundle(path, "repacked" if repacked else "plain", low_quant="copy")
    for settings in SETTINGS:
        events = Events()
        with ours(folder, n_slots, recorder=events, **settings) as model:
            same(generation(model), reference(path, repacked))
            check_counts(model, events)
            assert (model.stats().recycled > 0) or n_slots != 3


@pytest.mark.parametrize("settings", SETTINGS)
def test_nor_does_it_with_guesses(
    settings: dict[str, Any], tiny_file: TinyFile, bundle: MakeBundle, reference: Reference
) -> None:
    path = tiny_file("qwen3moe", **FLAGS)
    folder = bundle(path, low_quant="copy")
    guesses = RandomGuesses(range(3), 16, 4)
    with ours(folder, 19, predictor=guesses, **settings) as model:
        same(generation(model), reference(path))
        assert model.stats().guess_loads > 0
        assert model.meter.demands().low_pairs > 0


# --- 2 -------------------------------------------------------------------------------------------


@pytest.fixture
def hybrid(tiny_file: TinyFile, bundle: MakeBundle) -> Path:
    return bundle(tiny_file("qwen3moe", experts=Quant.F16), low_quant="q4_0")


def divergence(expected: Logits, got: Logits) -> float:
    pairs = zip(expected, got, strict=True)
    return float(np.mean([kl_divergence(log_softmax(p), log_softmax(q)) for p, q in pairs]))


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_more_bits_the_closer(
    settings: dict[str, Any], tiny_file: TinyFile, bundle: MakeBundle, reference: Reference
) -> None:
    path = tiny_file("qwen3moe", experts=Quant.F16)
    found = []
    for low_quant in ("q8_0", "q4_0", "q2_k"):
        events = Events()
        with ours(bundle(path, low_quant=low_quant), 19, recorder=events, **settings) as model:
            found.append(divergence(reference(path), generation(model)))
            check_counts(model, events)
            # Every load was of one copy or the other, and their bytes are all that was read.
            misses, low = model.meter.demands().misses, model.meter.demands().low_loads
            whole = sum(
                (misses[layer.layer] - low[layer.layer]) * layer.copies[0].n_bytes
                for layer in model.found.layout.layers
            )
            assert whole + model.meter.table()["low_bytes_read"] == model.stats().read_bytes
    # Random weights in few bits are far from themselves, so nothing is said of how close.
    assert np.isfinite(found).all()
    assert 1e-7 < found[0] < found[1] < found[2]
    assert found[0] < 0.05


def test_only_tokens_that_used_a_low_expert_change(
    hybrid: Path, tiny_file: TinyFile, reference: Reference
) -> None:
    expected = reference(tiny_file("qwen3moe", experts=Quant.F16), script=prefill)
    events, share = Events(), 0.02
    with ours(hybrid, recorder=events, low_share=share) as model:
        got = prefill(model)
        n_used = model.found.n_used
    n_changed = 0
    shaken = False  # an earlier token changed what later layers attend to
    layers = [np.array(ids, np.int32).reshape(-1, n_used) for ids in events.ids]
    low = [tail(TraceEvent(0, Phase.PREFILL, 1, False, ids).route(), share) for ids in layers]
    for t in range(len(PROMPT)):
        uses = [not low[layer].isdisjoint(ids[t].tolist()) for layer, ids in enumerate(layers)]
        if any(uses):
            assert not np.array_equal(got[t], expected[t])
            n_changed += 1
        elif not shaken:
            assert np.array_equal(got[t], expected[t])
        shaken = shaken or any(uses[:-1])
    assert 0 < n_changed < len(PROMPT)


def test_a_low_prompt_is_generated_from_whole_experts(hybrid: Path) -> None:
    with ours(hybrid, low_share=1.0) as model:
        context = model.context()
        context.decode(rows(PROMPT))
        assert model.meter.demands().low_pairs == model.meter.demands().pairs
        held_low = model.controller.residency.low.copy()
        model.reset_stats()
        context.decode(rows([7], len(PROMPT)))
        assert model.misses > 0  # read low before, and read again
        assert model.meter.demands().low_pairs == model.meter.table()["low_bytes_read"] == 0
        assert model.controller.residency.low < held_low
        assert model.stats().recycled == 0


def test_low_on_miss_computes_all_of_generation_low_where_nothing_is_kept(
    hybrid: Path, tiny_file: TinyFile, reference: Reference
) -> None:
    expected = reference(tiny_file("qwen3moe", experts=Quant.F16), script=prefill)
    with ours(hybrid, policy="load-on-demand", low_on_miss=True) as model:
        context = model.context()
        same(context.decode(rows(PROMPT)), expected)
        assert model.meter.demands().low_pairs == 0
        model.reset_stats()
        context.decode(rows([7], len(PROMPT)))
        assert model.meter.demands().low_pairs == model.meter.demands().pairs > 0
        assert model.meter.table()["low_bytes_read"] == model.stats().read_bytes


def test_three_sequences_decode_by_the_decode_rule(hybrid: Path) -> None:
    with ours(hybrid, policy="load-on-demand", low_share=0.5, low_on_miss=True) as model:
        context = model.context(n_seq_max=3)
        context.decode([Row(7 * seq, 0, seq) for seq in range(3)], Phase.DECODE)
        assert model.meter.demands().low_pairs == model.meter.demands().pairs > 0
    with ours(hybrid, policy="load-on-demand", low_share=0.5) as model:
        context = model.context(n_seq_max=3)
        context.decode([Row(7 * seq, 0, seq) for seq in range(3)], Phase.DECODE)
        assert model.meter.demands().low_pairs == 0


# --- 3 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("n_slots", [None, 13, 3])
def test_failed_reads(
    settings: dict[str, Any],
    n_slots: int | None,
    tiny_file: TinyFile,
    bundle: MakeBundle,
    reference: Reference,
) -> None:
    path = tiny_file("qwen3moe", **FLAGS)
    expected = reference(path)
    for skip, error in enumerate((errno.EIO, 0) * 3):
        with ours(bundle(path, low_quant="copy"), n_slots, **settings) as model:
            # A fresh arena reads more than that in any setting; 0 and 1 are low where tokens are.
            model.arena.plugin.inject(7 * skip, error)
            with pytest.raises(ExpertReadError):
                generation(model)
            model.check()
            same(generation(model), expected)
            assert model.meter.demands().low_pairs > 0


# --- 4 -------------------------------------------------------------------------------------------


def test_a_model_without_a_low_copy_is_refused(tiny_file: TinyFile) -> None:
    path = tiny_file("qwen3moe")
    with pytest.raises(UserError, match="has no low copy for low_share: make a bundle with"):
        Llama(path, low_share=0.25)
    with pytest.raises(UserError, match="has no low copy for low_on_miss"):
        Llama(path, low_on_miss=True)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_an_impossible_share_is_refused(share: float, hybrid: Path) -> None:
    with pytest.raises(UserError, match="out of range: give a share from 0 to 1"):
        Llama(hybrid, low_share=share)


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    common = ["--memory", "800MB", "--threads", "1", "--ctx", "256", "--json"]
    return subprocess.run(
        [sys.executable, "-m", "moe_gguf", *arguments, str(folder), *common],
        capture_output=True,
        text=True,
        env={"MOE_GGUF_CACHE": str(folder.parent / "cache"), "PATH": "/usr/bin:/bin"},
    )


def test_run_names_what_it_loses(hybrid: Path) -> None:
    text = ["-p", "A long prompt, of some words.", "-n", "8", "--temp", "0"]
    done = command(hybrid, "run", "--low-share", "0.25", "--low-on-miss", *text)
    assert done.returncode == 0, done.stderr
    said = "LOSSY: low copies (Q4_0) for the least popular 25% of prefill and for misses of decode"
    assert said in done.stderr
    stats = json.loads(done.stdout)["stats"]
    assert 0 < stats["low_share"] < 1
    assert 0 < stats["low_bytes_read"] < stats["bytes_read"]
    lossless = command(hybrid, "run", *text)
    assert "LOSSY" not in lossless.stderr
    stats = json.loads(lossless.stdout)["stats"]
    assert stats["low_share"] == stats["low_bytes_read"] == 0


@pytest.mark.usefixtures("known_disk")
def test_bench_measures_a_lossy_row_beside_its_lossless_twin(hybrid: Path) -> None:
    lossless = Options(reads="buffered", lanes=1)
    lossy = replace(lossless, low_share=0.25)
    request = Request(
        hybrid, "400MB", lossy, "lru+low,lru",
        repeat=1, n_predict=8, prompt_tokens=24, n_ctx=256, n_threads=1,
    )  # fmt: skip
    outcome = bench(request, note=lambda _: None)
    assert not outcome.errors
    low, whole = outcome.document["rows"]
    assert low["identical"] is None
    assert whole["reference"] == "lru"
    assert 0 < low["median"]["prefill_low_share"] <= 0.25
    assert whole["median"]["prefill_low_share"] == whole["median"]["low_bytes_read"] == 0
    assert "LOSSY: low in prefill/decode" in table(outcome.document)
    for rows_, given in (("lru", lossy), ("lru+low", lossless)):
        with pytest.raises(UserError, match=r"low_share and low_on_miss are for rows that end in"):
            bench(replace(request, rows=rows_, options=given), note=pytest.fail)


def test_a_replay_does_not_judge_a_lossy_trace(hybrid: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.npz"
    recorder = TraceRecorder()
    llama = Llama(hybrid, memory="800MB", n_ctx=256, n_threads=1, low_share=0.5, recorder=recorder)
    llama.create_completion(random_tokens(20), max_tokens=4)
    recorder.save(file, trace_metadata(llama))
    llama.close()
    assert replay_document(file, "lru", None)["recorded"] is None


def test_quality_compares_with_the_lossless_run(hybrid: Path) -> None:
    done = command(hybrid, "quality", "--low-share", "0.4")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["lossy"] == {"low_share": 0.4}
    assert document["reference"]["stats"]["low_share"] == 0
    assert 0.05 < document["stats"]["low_share"] <= 0.4
    assert 1e-5 < document["kl_divergence"] < 1
