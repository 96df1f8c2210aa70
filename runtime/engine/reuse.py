"""How many experts groups of any size need and read, by replaying the routes of a few prompts.

A prompt's tokens route as they would one by one, so a few hundred of them, recorded in one go, are
re-cut into as many streams as a group has sequences and served by the very policy that will serve
them, in arenas of any size. Half of the steps fill the arena, the other half count. Knows no model
and no time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ...policies.base import Phase, RouteEvent
from ...policies.presets import Facts, policy
from ...policies.residency import Residency
from .measurements import Reuse

Routes = NDArray[np.int32]  # [n_layers, n_tokens, n_used]

SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)
_TURN = 8  # tokens of a turn, to see what the first of them cost more
_TURNS = 4  # sequences that take turns


def reuse(routes: Routes, n_experts: int, name: str) -> Reuse:
    """Of recorded layers under the policy of that name; its guesses are left out, since they read
    what is read anyway, only earlier."""
    n_tokens = routes.shape[1]
    groups = [1]
    while groups[-1] * 4 <= n_tokens:  # two steps to fill, two to count
        groups.append(groups[-1] * 2)
    distinct = [_distinct(routes, n_experts, group) for group in groups]
    reads = [
        tuple(_reads(_steps(routes, group), n_experts, name, share, group) for share in SHARES)
        for group in groups
    ]
    turns = list(_in_turns(routes))
    switch = [
        max(0.0, _reads(turns, n_experts, name, share, 1) - reads[0][i]) * _TURN
        for i, share in enumerate(SHARES)
    ]
    return Reuse(tuple(groups), SHARES, tuple(distinct), tuple(reads), tuple(switch))


def _steps(routes: Routes, group: int) -> list[Routes]:
    """The tokens of ``group`` streams, step by step: [n_layers, group, n_used] each."""
    n = routes.shape[1] // group
    streams = routes[:, : n * group].reshape(routes.shape[0], group, n, -1)
    return [streams[:, :, i] for i in range(n)]


def _in_turns(routes: Routes) -> Iterator[Routes]:
    """One token after the other, of sequences that take turns."""
    length = routes.shape[1] // _TURNS
    for start in range(0, length, _TURN):
        for turn in range(_TURNS):
            first = turn * length
            for i in range(first + start, first + min(start + _TURN, length)):
                yield routes[:, i : i + 1]


def _distinct(routes: Routes, n_experts: int, group: int) -> float:
    """Experts that so many tokens, drawn at random without return, use together on average."""
    n_layers, n_tokens, _ = routes.shape
    counts = np.stack([np.bincount(layer.ravel(), minlength=n_experts) for layer in routes])
    # The chance that none of ``group`` draws is among an expert's tokens.
    missed = np.ones((n_layers, n_experts))
    for i in range(group):
        missed *= np.maximum(0, n_tokens - i - counts) / (n_tokens - i)
    return float((1 - missed).sum() / n_layers)


def _reads(
    steps: Sequence[Routes], n_experts: int, name: str, share: float, n_sequences: int
) -> float:
    """Experts of a layer that are missing in a step on average."""
    n_layers, _, n_used = steps[0].shape
    n_slots = max(1, round(share * n_layers * n_experts))
    layers = list(range(n_layers))
    facts = Facts(n_slots, n_experts, n_used, layers, n_sequences=n_sequences)
    chosen = policy(name, facts)
    residency = Residency(n_slots, n_experts, chosen.cache, chosen.order, chosen.scan)
    half = len(steps) // 2
    missing = 0
    for i, step in enumerate(steps):
        for layer, ids in enumerate(step):
            counts: dict[int, int] = {}  # keeps first-seen order
            for expert in ids.ravel().tolist():
                counts[expert] = counts.get(expert, 0) + 1
            event = RouteEvent(
                layer, len(ids), list(counts), list(counts.values()), Phase.DECODE, n_sequences
            )
            hits = residency.plan(event).n_hits
            missing += (len(counts) - hits) * (i >= half)
    return float(missing / ((len(steps) - half) * n_layers))
