"""Expert activation paths: the counts, what they predict and what they evict."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from conftest import TinyFile
from harness import ours, random_tokens, rows

from moe_gguf.policies import Residency
from moe_gguf.policies.base import Phase, RouteEvent
from moe_gguf.policies.eap import ExpertPaths, PathCache, PathPredictor
from moe_gguf.runtime.engine.context import Row

N_EXPERTS = 8
LAYERS = [1, 2, 4]  # a dense layer first, and one between
NO_IDS, NO_INPUTS = np.zeros((1, 0), np.int32), np.zeros((1, 0), np.float32)  # paths read neither


def event(layer: int, *experts: int) -> RouteEvent:
    return RouteEvent(layer, 1, experts, [1] * len(experts), Phase.DECODE, 1)


def prompt(layer: int, n_tokens: int, counts: dict[int, int]) -> RouteEvent:
    return RouteEvent(layer, n_tokens, list(counts), list(counts.values()), Phase.PREFILL, 1)


def ask(predictor: PathPredictor, event: RouteEvent) -> list[int]:
    """Feed an event; the keys guessed after it."""
    predictor.observe(event, lambda: NO_IDS)
    return [guess.key for guess in predictor.guess(event, lambda: NO_INPUTS)]


def make() -> ExpertPaths:
    return ExpertPaths(LAYERS, N_EXPERTS)


@pytest.mark.parametrize("seed", range(3))
def test_single_tokens_are_counted_exactly(seed: int) -> None:
    rng = random.Random(seed)
    paths = make()
    uses = np.zeros((3, N_EXPERTS))
    follows = np.zeros((2, N_EXPERTS, N_EXPERTS))
    for _ in range(50):
        token = [rng.sample(range(N_EXPERTS), 3) for _ in LAYERS]
        for layer, experts in zip(LAYERS, token, strict=True):
            paths.observe(event(layer, *experts))
        for i, experts in enumerate(token):
            uses[i, experts] += 1
        for i, (before, after) in enumerate(pairwise(token)):
            follows[i][np.ix_(before, after)] += 1
    assert (paths.uses == uses).all()
    assert (paths.follows == follows).all()
    assert paths.n_bytes == 4 * (2 * 3 * 8 + 2 * 64 + 3)


def test_a_batch_counts_the_expected_pairs() -> None:
    paths = make()
    paths.observe(prompt(1, 4, {0: 4, 1: 4}))
    paths.observe(prompt(2, 4, {5: 4, 6: 3, 7: 1}))
    # Every token used 0 and 1, so the expectation is exact; pairs per token: 2 times 2.
    assert paths.follows[0, 0, 5:].tolist() == [4, 3, 1]
    assert paths.follows[0, 1, 5:].tolist() == [4, 3, 1]
    assert paths.follows.sum() == 4 * 2 * 2


def test_prediction_by_hand() -> None:
    paths = make()
    predictor = PathPredictor(paths)
    for _ in range(3):
        ask(predictor, event(1, 0, 1))
        ask(predictor, event(2, 4, 5))
        ask(predictor, event(4, 6, 7))
    ask(predictor, event(1, 2, 3))
    ask(predictor, event(2, 6, 7))
    # 0 was followed by 4 and 5, three times out of three; 2 by 6 and 7, once.
    assert sorted(ask(predictor, event(1, 0, 1))) == [2 * N_EXPERTS + e for e in (4, 5)]
    uses = paths.next_uses()
    assert uses is not None
    # Each of the two: (3 follows + prior 1 x frequency 3/4) / (3 seen + prior 1).
    np.testing.assert_allclose(uses[4], (3 + 3 / 4) / 4)
    np.testing.assert_allclose(uses[6], (1 / 4) / 4)
    np.testing.assert_allclose(uses.sum(), 2)  # experts per token
    assert ask(predictor, event(4, 1)) == []  # nothing comes after the last layer


def test_an_expert_never_seen_predicts_what_is_usual() -> None:
    paths = make()
    predictor = PathPredictor(paths)
    for _ in range(2):
        ask(predictor, event(1, 0))
        ask(predictor, event(2, 3))
    assert ask(predictor, event(1, 7)) == [2 * N_EXPERTS + 3]


def test_a_new_prompt_begins_a_sequence() -> None:
    paths = make()
    for layer, expert in zip(LAYERS, (1, 2, 3), strict=True):
        paths.observe(prompt(layer, 5, {expert: 5}))
    for layer, expert in zip(LAYERS, (1, 2, 3), strict=True):
        paths.observe(prompt(layer, 5, {expert: 5}))  # the prompt's second half
    assert paths.uses[0, 1] == 10
    for layer, expert in zip(LAYERS, (1, 2, 3), strict=True):
        paths.observe(event(layer, expert))
    assert paths.follows[0, 1, 2] == 11
    paths.observe(prompt(1, 3, {4: 3}))
    assert paths.uses.sum() == 3
    assert paths.follows[0, 1, 2] == 5.5  # the past counts half


def test_a_prompt_of_one_token_begins_a_sequence_too() -> None:
    paths = make()
    for layer in LAYERS:
        paths.observe(event(layer, 0))
    paths.observe(prompt(1, 1, {4: 1}))
    assert paths.uses.sum() == 1


def test_eight_sequences_decoding_are_no_new_prompt() -> None:
    """Nor is a step that mixes a prompt in; the recall of guesses is that of decoding."""
    paths = make()
    predictor = PathPredictor(paths)
    for layer in LAYERS:
        ask(predictor, event(layer, layer))
    eight = RouteEvent(1, 8, [1, 5], [6, 2], Phase.DECODE, 8)
    ask(predictor, eight)
    ask(predictor, eight._replace(phase=Phase.MIXED, n_tokens=20, counts=[15, 5]))
    assert paths.uses[0, 1] == 1 + 6 + 15
    assert paths.follows[0, 1, 2] == 1
    # Six of the next layer's eight tokens use what was guessed.
    ask(predictor, eight)
    ask(predictor, RouteEvent(2, 8, [2, 7], [6, 2], Phase.DECODE, 8))
    assert predictor.recall[2] == 6 / 8
    paths.observe(prompt(1, 3, {4: 3}))
    assert paths.uses.sum() == 3


def test_a_skipped_layer_links_nothing() -> None:
    paths = make()
    paths.observe(event(1, 0))
    paths.observe(event(4, 0))
    paths.observe(event(2, 0))
    assert paths.follows.sum() == 0


def test_eviction_by_hand() -> None:
    paths = make()
    cache = PathCache(paths)
    for _ in range(3):
        paths.observe(event(1, 0))
        paths.observe(event(2, 0))
    paths.observe(event(4, 0))
    paths.observe(event(1, 1))
    keys = {
        name: layer * N_EXPERTS + e
        for name, layer, e in (
            ("used", 1, 0),
            ("rare", 1, 1),
            ("next", 2, 0),
            ("unused", 2, 5),
            ("last", 4, 0),
        )
    }
    for key in keys.values():
        cache.admit(key)
    # Shares 3/4, 1/4, 1, 0, 1; layer 2 is next (1), then 4 (2/3), and 1 comes last (1/3).
    order = ["unused", "rare", "used", "last", "next"]
    assert [cache.evict(()) for _ in order] == [keys[name] for name in order]
    cache.check_integrity()


def test_paths_beat_chance_on_a_predictable_model() -> None:
    rng = random.Random(0)
    after = {(i, e): rng.sample(range(N_EXPERTS), 2) for i in range(3) for e in range(N_EXPERTS)}
    paths = make()
    predictor, right, made = PathPredictor(paths), 0, 0
    cache = PathCache(paths)
    residency = Residency(12, N_EXPERTS, cache)
    for _ in range(300):
        experts = [rng.randrange(N_EXPERTS)]
        for i, layer in enumerate(LAYERS):
            if i:
                experts = after[i, experts[0]]
                guesses = predictor.paths.next_uses()
                assert guesses is not None
                best = set(np.argsort(-guesses)[:2].tolist())
                right += len(best & set(experts))
                made += 2
            demanded = event(layer, *experts)
            residency.plan(demanded)
            predictor.observe(demanded, lambda: NO_IDS)
            guesses_made = predictor.guess(demanded, NO_INPUTS)
            residency.guess(demanded, guesses_made, [guess.key for guess in guesses_made])
            residency.check_integrity()
    assert right / made > 0.9


def test_in_the_engine_only_a_prompt_begins_a_sequence(tiny_file: TinyFile) -> None:
    with ours(tiny_file("qwen3moe"), 19, policy="eap") as model:
        context = model.context(n_seq_max=4)
        context.decode(rows(random_tokens(5)), Phase.PREFILL)
        assert model.controller.guessing is not None
        predictor = model.controller.guessing.predictor
        assert isinstance(predictor, PathPredictor)
        for i in range(2):
            batch = [Row(7 * i + seq, 5 * (seq == 0) + i, seq) for seq in range(3)]
            context.decode(batch, Phase.DECODE)
        assert predictor.paths.tokens[0] == 5 + 2 * 3
        context.decode(rows(random_tokens(4), seq=3), Phase.PREFILL)
        assert predictor.paths.tokens[0] == 4
