"""The zoo: every MoE architecture that llama.cpp knows is computed as stock computes it.

1. Logits (of an embedder: embeddings) equal stock's to the last bit, in prefill and in decode, with
   a slot for every expert, for a third and with the fewest, under every policy. Each model meets
   three policies, which rotate; ``make zoo`` has each meet all.
   Each survives its trial and computes there too, once.
2. Nothing is refused, and nothing is left out: an architecture of the library is made, or dense,
   or stands in UNMADE with its reason.
3. The README names them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import zoo
from conftest import ZooFile
from harness import Context, Logits, Model, Ours, Row, ours, random_tokens, rows, stock
from mutant import Helper

from moe_gguf.policies import POLICIES
from moe_gguf.policies.base import Phase
from moe_gguf.runtime import trial
from moe_gguf.runtime.budget import min_slots
from moe_gguf.runtime.formats.open import read_layout
from moe_gguf.runtime.formats.stream import stream_of

N_PREFILL, N_DECODE = 12, 3
ALL_POLICIES = bool(os.environ.get("ZOO_ALL_POLICIES"))


def answers(model: Model, architecture: str) -> Logits:
    """Of a prompt of a few tokens, and of a few after it, each chosen by what came before."""
    embeds = architecture in zoo.EMBEDDERS
    params = {"embeddings": True, "pooling_type": llama_cpp.LLAMA_POOLING_TYPE_NONE}
    context = model.context(n_ctx=64, n_batch=16, n_ubatch=16, **(params if embeds else {}))
    compute = embeddings if embeds else Context.decode
    out = [compute(context, rows(random_tokens(N_PREFILL)))]
    for i in range(N_DECODE):
        token = int(out[-1][-1].argmax())
        out.append(compute(context, rows([token], N_PREFILL + i)))
    return np.concatenate(out)


def embeddings(context: Context, batch: Sequence[Row]) -> Logits:
    """What a context that was made for embeddings computes instead of logits."""
    tokens = (llama_cpp.llama_token * len(batch))(*(row.token for row in batch))
    raw = llama_cpp.llama_batch_get_one(tokens, len(batch))
    if context.arena is not None:
        context.arena.say(Phase.PREFILL, 1)
    assert llama_cpp.llama_decode(context.ctx, raw) == 0
    n_embd = llama_cpp.llama_model_n_embd(llama_cpp.llama_get_model(context.ctx))
    pointers = (llama_cpp.llama_get_embeddings_ith(context.ctx, i) for i in range(len(batch)))
    return np.stack([np.ctypeslib.as_array(p, (n_embd,)).copy() for p in pointers])


def policies(architecture: str, place: int) -> list[str]:
    """Of the three slot counts, those that this model meets at this one."""
    names = list(POLICIES)
    if ALL_POLICIES:
        return names
    return [names[(3 * list(zoo.MADE).index(architecture) + place) % len(names)]]


@pytest.mark.parametrize("architecture", zoo.MADE)
def test_computes_what_stock_computes(architecture: str, zoo_file: ZooFile, helper: Helper) -> None:
    path = zoo_file(architecture)
    with stock(path) as model:
        expected = answers(model, architecture)
    assert np.isfinite(expected).all()
    assert expected.std() > 0.1
    layout = read_layout(path)
    helper.send(*stream_of(layout))
    assert helper.has_computed
    trial.check(layout)
    n_trials, reads = helper.sent, []
    n_all = len(layout.layers) * zoo.N_EXPERTS
    for place, n_slots in enumerate((n_all, n_all // 3, min_slots(n_all))):
        for policy in policies(architecture, place):
            with ours(path, n_slots, policy=policy) as model:
                same(answers(model, architecture), expected, policy, n_slots)
                reads.append(check_ran(model, architecture))
    assert helper.sent == n_trials, "a verdict was forgotten"
    assert architecture in zoo.IDLE or max(reads) > min(reads), "no expert was read twice"


def same(got: Logits, expected: Logits, policy: str, n_slots: int) -> None:
    difference = float(np.abs(got - expected).max())
    where = f"{policy} with {n_slots} slots"
    assert np.array_equal(got, expected), f"{where}: differs by up to {difference}"


def check_ran(model: Ours, architecture: str) -> int:
    """The experts came through the plugin, in every layer and step; how many reads it took."""
    stats = model.stats()
    n_events = 0 if architecture in zoo.IDLE else len(model.found.layout.layers) * (1 + N_DECODE)
    assert stats.events == n_events
    return int(stats.reads)


# --- what there is ------------------------------------------------------------------------------

KNOWN = zoo.architectures()


def test_the_library_names_its_architectures() -> None:
    assert {"llama", "qwen3moe", "mamba", "clip"} < set(KNOWN)
    assert len(KNOWN) > 150


def test_tables_name_what_exists() -> None:
    assert {*zoo.MADE, *zoo.DENSE, *zoo.UNMADE} <= set(KNOWN)
    assert not zoo.MADE.keys() & (zoo.DENSE.keys() | zoo.UNMADE.keys())


@pytest.mark.parametrize("architecture", [a for a in KNOWN if a not in {*zoo.MADE, *zoo.UNMADE}])
def test_what_is_not_in_the_zoo_has_no_experts(
    architecture: str, vocabulary: zoo.Fields, tmp_path: Path
) -> None:
    """A new architecture fails here: add it to MADE, to DENSE or, with the reason, to UNMADE."""
    assert not zoo.expert_tensors(architecture, tmp_path / "m.gguf", vocabulary)


def test_readme_names_the_architectures() -> None:
    readme = zoo.README.read_text()
    assert zoo.with_list(readme) == readme, "run `make zoo`"
