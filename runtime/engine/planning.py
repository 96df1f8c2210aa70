"""A plan for a model that was found: what is remembered of it or measured now, put together.

The one place where measurements, memory and the disk of today meet the planner. Opens no model in
this process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..columns import columns
from ..formats.layout import ModelLayout
from ..opening import Found
from ..params import n_ctx_of
from ..progress import Report
from ..sizes import format_size
from ..system import physical_cores
from . import measure
from .curves import Shape
from .measurements import Measurements, place, recall
from .planner import Facts, Goal, Plan, Prediction, Workload, plan
from .room import room

# Of one thread, by head and cell, and by head, cell and element of a key or value. Measured on one
# processor (AVX-512) only: what they decide is how many rows a step has, which they do clearly.
_MASKED_S, _TILED_S = 1.9e-9, 4.3e-11


def facts(
    found: Found, n_ctx: int | None, n_threads: int | None, score_rows: int | None = None
) -> Facts:
    """Of model, budget and disk, in about a second."""
    layout = found.layout
    needs = room(found, n_threads)
    expert_bytes = sum(layer.blob_bytes for layer in layout.layers)
    passed = _passed_s(layout, n_threads) if found.placement is None else (0.0, 0.0)
    shape = Shape(len(layout.layers), layout.n_experts, expert_bytes, needs.cell, *passed)
    return Facts(
        shape,
        needs,
        found.total,
        found.slots.slot_bytes,
        found.n_all,
        n_ctx_of(layout, n_ctx),
        measure.disk_speed(found),
        found.mode.direct,
        score_rows,
    )


def _passed_s(layout: ModelLayout, n_threads: int | None) -> tuple[float, float]:
    """Seconds per row and foreign cell, passed over and computed for nothing (``Shape``)."""
    keys = layout.keys
    heads = keys.integers(".attention.head_count", default=(0,))
    alike = (keys.integer(".embedding_length", default=0) // max(1, *heads),)
    width = max(keys.integers(".attention.key_length", default=alike))
    width += max(keys.integers(".attention.value_length", default=alike))
    n_heads = layout.n_layers * sum(heads) / len(heads)
    each = n_heads / (n_threads or physical_cores())
    return each * _MASKED_S, each * width * _TILED_S


def known(found: Found, n_threads: int | None) -> Measurements | None:
    """What is remembered of this model here."""
    return recall(place(found, n_threads))


def planned(
    found: Found,
    goal: Goal,
    *,
    n_ctx: int | None = None,
    parallel: int | None = None,
    workload: Workload | None = None,
    n_threads: int | None = None,
    score_rows: int | None = None,
    progress: Report | None = None,
    anew: bool = False,
) -> Plan:
    """The best schedule there is; a model that was not measured on this machine is, once, or
    ``anew``.

    ``progress`` counts the seconds of that. UserError where so many sequences do not fit.
    """
    measured = measure.measured(found, n_threads, progress, anew)
    return plan(measured, facts(found, n_ctx, n_threads, score_rows), goal, workload, parallel)


# --- for people ---------------------------------------------------------------------------------


def document(plan: Plan) -> dict[str, Any]:
    """A plan as JSON."""
    return {
        "goal": plan.goal,
        "workload": plan.workload._asdict(),
        "schedule": asdict(plan.schedule),
        "parallel": plan.n_seq_max,
        "cells": plan.cells,
        "score_rows": plan.score_rows,
        "slots": plan.n_slots,
        "binds": plan.binds,
        "hot": plan.hot,
        "hides_from": plan.hides_from,
        "kv_q8_0_tps": plan.kv_offer_tps,
        "measured_calm": plan.calm,
        "disk_bytes_per_s": plan.disk_bytes_per_s,
        "predicted": plan.predicted._asdict(),
        "curve": [prediction._asdict() for prediction in plan.curve],
    }


def lines(plan: Plan) -> list[str]:
    """A plan in words."""
    schedule, here = plan.schedule, plan.predicted
    how = (
        f"groups of {schedule.group} in turns of {schedule.quantum} tokens"
        if schedule.quantum
        else "all in every step"
    )
    scored = ", all scored" if plan.workload.scored else ""
    text = [
        f"schedule for {plan.goal}: {plan.n_seq_max} at once, {how}; prompts in chunks of "
        f"{schedule.chunk}{scored}; {plan.cells} cells of KV, {plan.n_slots} slots "
        f"({here.resident_share:.0%}); predicted, with prompts of {plan.workload.prompt} tokens:",
        *(f"  {line}" for line in _table(plan.curve)),
    ]
    hides = (
        f"computing hides every read from {plan.hides_from} at once on"
        if plan.hides_from
        else "no group computes long enough to hide its reads"
    )
    binds = {"disk": "the disk", "compute": "computing", "memory": "memory for slots"}[plan.binds]
    text.append(f"{binds} binds; {hides}; {plan.hot} missing experts per layer read ahead")
    if not plan.calm:
        text.append("measured while the machine was busy: do it again when it is not")
    if plan.kv_offer_tps is not None:
        text.append(f"a KV cache of q8_0, which is lossy, would give {plan.kv_offer_tps:.1f} tok/s")
    return text


def _table(curve: Sequence[Prediction]) -> list[str]:
    head = "at once|group|tok/s|prompt tok/s|first token|between tokens|at most|stalled|read/token"
    rows = [head.split("|")]
    for p in curve:
        row = f"{p.sequences}|{p.group}|{p.decode_tps:.1f}|{p.prompt_tps:.1f}|"
        row += f"{p.first_token_s:.2f} s|{1000 * p.token_s:.0f} ms|{p.gap_s:.2f} s|"
        row += f"{p.stall_share:.0%}|{format_size(p.bytes_per_token)}"
        rows.append(row.split("|"))
    return columns(rows, ">")
