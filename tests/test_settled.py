"""Once every expert has its slot, the rest of a decode step passes without asking Python.

Phase and not the number of tokens decides, so that several sequences settle as one does; what is
counted in between must be what the controller would have counted, had it been asked.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from conftest import TinyFile
from harness import Logits, Ours, Row, ours, random_tokens, rows

from moe_gguf.policies.base import Phase
from moe_gguf.runtime.plugin.abi import EVENT_LAYER, EVENT_ROUTE

PREFILL, DECODE, MIXED = Phase


class Counted(NamedTuple):
    """One step: its logits, its events, and how many of them Python was asked about."""

    logits: Logits
    events: int
    asked: int
    layer_hits: dict[int, int]
    layer_misses: dict[int, int]
    pairs: int


def step(model: Ours, phase: Phase, batch: list[Row], pos: int) -> Counted:
    """The batch as one step after a prompt of each of its sequences, in a context of its own."""
    n_sequences = len({row.seq for row in batch})
    context = model.context(n_seq_max=8)
    for seq in range(n_sequences):
        context.decode(rows(random_tokens(pos, seq + 1), seq=seq))
    model.reset_stats()
    model.arena.plugin.timeline(1 << 12)
    logits = context.decode(batch, phase)
    kinds = [event.kind for event in model.arena.plugin.timeline_read(1 << 12)]
    model.arena.plugin.timeline(0)
    demands = model.meter.demands()
    return Counted(
        logits,
        kinds.count(EVENT_LAYER),
        kinds.count(EVENT_ROUTE),
        dict(demands.hits),
        dict(demands.misses),
        demands.pairs,
    )


def every_key(model: Ours) -> list[int]:
    layout = model.found.layout
    n = layout.n_experts
    return [key for layer in layout.layers for key in range(layer.layer * n, (layer.layer + 1) * n)]


@pytest.mark.parametrize("name", ["qwen3moe", "deepseek2", "gemma4"])
@pytest.mark.parametrize("n_sequences", [1, 8])
def test_a_settled_step_counts_what_an_asked_one_counts(
    tiny_file: TinyFile, name: str, n_sequences: int
) -> None:
    batch = [Row(17 + seq, 12, seq) for seq in range(n_sequences)]
    with ours(tiny_file(name)) as model:
        model.arena.fill(every_key(model))
        asked = step(model, PREFILL, batch, 12)
        settled = step(model, DECODE, batch, 12)
        assert asked.asked == asked.events == settled.events > settled.asked > 0
        assert np.array_equal(settled.logits, asked.logits)
        assert settled.layer_hits == asked.layer_hits
        assert set(settled.layer_misses.values()) <= {0}
        assert settled.pairs == asked.pairs


@pytest.mark.parametrize("phase", [PREFILL, MIXED])
def test_only_decoding_settles(tiny_file: TinyFile, phase: Phase) -> None:
    """Not even where a prompt ends in a batch of one token."""
    with ours(tiny_file("qwen3moe")) as model:
        model.arena.fill(every_key(model))
        counted = step(model, phase, [Row(17, 12)], 12)
        assert counted.asked == counted.events > 0


def test_a_new_step_asks_again(tiny_file: TinyFile) -> None:
    """What was settled in one step is not believed in the next, even after one that broke off."""
    with ours(tiny_file("qwen3moe")) as model:
        model.arena.fill(every_key(model))
        step(model, DECODE, [Row(17, 12)], 12)
        assert model.arena.plugin.call.settled == 1
        model.arena.plugin.step(MIXED, 2)
        assert model.arena.plugin.call.settled == 0
        call = model.arena.plugin.call
        assert (call.phase, call.n_sequences) == (MIXED, 2)


def test_a_reset_forgets_what_settled(tiny_file: TinyFile) -> None:
    with ours(tiny_file("qwen3moe")) as model:
        model.arena.fill(every_key(model))
        assert step(model, DECODE, [Row(17, 12)], 12).layer_hits
        model.reset_stats()
        assert model.meter.demands().hits == {}
        assert model.meter.demands().pairs == 0
