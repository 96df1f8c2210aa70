"""Draft layers (NextN, multi-token prediction) are in the file and not in the graph.

A tiny glm4moe with a draft layer must be the one without it, in everything but the file: the same
slots, working set, guesses, plan and logits; from a GGUF and from a bundle. Its draft's experts are
kept where they were.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zoo
from conftest import MakeBundle, ZooFile
from harness import Logits, Model, ours, random_tokens, rows, stock
from mutant import Field, Mutant

from moe_gguf.runtime.cli.inspect import describe
from moe_gguf.runtime.cli.plan import plan_document
from moe_gguf.runtime.formats.gguf_header import ValueType
from moe_gguf.runtime.formats.open import read_layout

ARCHITECTURE = "glm4moe"
DRAFTED = {"block_count": zoo.N_LAYERS + 1, "nextn_predict_layers": 1}


@pytest.fixture
def plain(zoo_file: ZooFile) -> Path:
    return zoo_file(ARCHITECTURE)


@pytest.fixture(scope="module")
def drafted(zoo_file: ZooFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As published models are: without scales, for which llama.cpp does not look in a layer that
    it passes over."""
    mutant = Mutant.read(zoo_file(ARCHITECTURE, **DRAFTED))
    draft = f"blk.{zoo.N_LAYERS}."
    mutant.weights = {
        name: weight
        for name, weight in mutant.weights.items()
        if not (name.startswith(draft) and name.endswith("scale"))
    }
    return mutant.write(tmp_path_factory.mktemp("drafts") / "drafted.gguf")


def answers(model: Model) -> Logits:
    context = model.context(n_ctx=64, n_batch=16, n_ubatch=16)
    logits = [context.decode(rows(random_tokens(12)))]
    for i in range(6):
        logits.append(context.decode(rows([int(logits[-1][-1].argmax())], 12 + i)))
    return np.concatenate(logits)


@pytest.mark.parametrize("is_bundle", [False, True])
def test_a_draft_layer_changes_no_slot_and_no_logit(
    is_bundle: bool, plain: Path, drafted: Path, bundle: MakeBundle
) -> None:
    with stock(drafted) as model:
        expected = answers(model)
    seen = []
    for path in (plain, drafted):
        with ours(bundle(path) if is_bundle else path, 20, policy="fate") as model:
            assert np.array_equal(answers(model), expected)
            assert not model.arena.is_blind, "the policy does not guess"
            found = model.found
            seen.append((found.working_set, found.n_all, found.layout.trunk_bytes))
    assert seen[0] == seen[1]
    assert seen[0][1] == (zoo.N_LAYERS - 1) * zoo.N_EXPERTS


@pytest.mark.parametrize("is_bundle", [False, True])
def test_a_draft_layer_changes_no_plan(
    is_bundle: bool, plain: Path, drafted: Path, bundle: MakeBundle
) -> None:
    paths = [bundle(path) if is_bundle else path for path in (plain, drafted)]
    same = ["trunk_bytes", "kv_bytes", "compute_bytes", "slots", "slots_all", "working_set"]
    plans = [plan_document(path, memory="1GB", n_ctx=64) for path in paths]
    assert [plans[0][key] for key in same] == [plans[1][key] for key in same]
    said = [describe(path) for path in paths]
    for key in ("moe_layers", "blob_bytes", "expert_bytes", "trunk_bytes", "working_set"):
        assert said[0][key] == said[1][key], key


def test_the_experts_of_a_draft_layer_stay_readable(drafted: Path, bundle: MakeBundle) -> None:
    layout, copied = read_layout(drafted), read_layout(bundle(drafted))
    names = {t.name for t in layout.drafts}
    assert f"blk.{zoo.N_LAYERS}.ffn_up_exps.weight" in names
    assert {t.name for t in copied.drafts} == names
    for one, other in zip(layout.drafts, copied.drafts, strict=True):
        assert one.name == other.name
        raw = [
            at.files[t.file].read_bytes()[t.offset : t.offset + t.n_bytes]
            for at, t in ((layout, one), (copied, other))
        ]
        assert raw[0] == raw[1]


def test_a_claim_of_drafts_without_their_tensors_takes_no_layer_away(
    plain: Path, tmp_path: Path
) -> None:
    mutant = Mutant.read(plain)
    mutant.fields[f"{ARCHITECTURE}.nextn_predict_layers"] = Field(ValueType.UINT32, 1)
    layout = read_layout(mutant.write(tmp_path / "m.gguf"))
    assert [layer.layer for layer in layout.layers] == [1, 2]
    assert not layout.drafts
