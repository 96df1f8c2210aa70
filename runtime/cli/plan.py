"""``moe-gguf plan``: whether a model fits a budget, what it would hold, and how fast it can be.

Goes the way of ``run`` up to the point where weights would be read, so both print the same
numbers. Of a model that was never measured on this machine it predicts a bound from reads alone;
of one that was, a schedule and its speeds.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..budget import Budget, DeviceBudget, Needs, smallest
from ..columns import columns
from ..errors import UserError, spell
from ..options import Options
from ..sizes import MB, format_size
from ..text import shown
from .model import resolve
from .options import as_flag, model_options, parallel_options
from .terminal import quieten

if TYPE_CHECKING:
    from ..engine.planner import Goal
    from ..opening import Found, Measured
    from ..progress import Report


@click.command()
@model_options
@parallel_options("latency")
@click.option("--chat", is_flag=True, help="with room for conversations, as run --chat and serve")
@click.option("--measure", is_flag=True, help="first measure MODEL on this machine, which opens it")
@click.option("--json", "as_json", is_flag=True)
def plan(
    model: str, as_json: bool, measure: bool, parallel: int | None, goal: Goal, **options: Any
) -> None:
    """Say whether MODEL fits a budget and what it would hold, without loading it.

    Exits with 1 when it does not fit.
    """
    from ..progress import bar

    quieten()
    path = resolve(model)
    with bar(f"measuring {path.name}") as report:  # like run: the process has the same size then
        document = plan_document(path, **options)
        if document["fits"]:
            document |= schedule_document(path, goal, parallel, measure, report, **options)
    if as_json:
        document.pop("schedule_lines", None)
    click.echo(json.dumps(document) if as_json else plan_text(document))
    if not document["fits"]:
        sys.exit(1)


def plan_document(
    path: Path,
    n_ctx: int | None = None,
    n_threads: int | None = None,
    chat: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """The document of ``plan``; ``options`` are those of ``Options``. UserError for an unusable
    file."""
    from .. import opening

    found = opening.find(path, Options(**options))
    measured = _measure(found, n_ctx, n_threads, _beside(found, chat))
    found = measured.found
    needs, slot_bytes = measured.needs, found.slots.slot_bytes
    document: dict[str, Any] = {
        "path": str(path),
        "architecture": found.layout.architecture,
        "n_ctx": measured.n_ctx,
        "fits": True,
        "reason": None,
        "warning": None,
        "budget_bytes": found.total,
        "smallest_bytes": smallest(needs, slot_bytes, found.n_all),
        "working_set_fits_bytes": needs.with_slots(found.working_set, slot_bytes),
        "everything_fits_bytes": needs.with_slots(found.n_all, slot_bytes),
        **{f"{name}_bytes": n_bytes for name, n_bytes in needs._asdict().items()},
        "tables": [{"name": t.name, "bytes": t.n_bytes} for t in measured.tables],
        "slot_bytes": slot_bytes,
        "working_set": found.working_set,
        "slots_all": found.n_all,
        "slots": 0,
        "resident_share": 0.0,
        "experts_bytes": 0,
        "policy": found.options.policy,
        "reads": str(found.mode),
        "device": found.device,
        "on_device": None,
    }
    try:
        budget = measured.divide()
        pools = measured.divide_device()
    except UserError as error:
        return {**document, "fits": False, "reason": error.spelled(as_flag), "predicted": None}
    warning = budget.warning()
    return {
        **document,
        "warning": warning and spell(warning, as_flag),
        "slots": budget.n_slots,
        "resident_share": budget.resident_share,
        "experts_bytes": budget.experts,
        "on_device": None if pools is None else on_device(pools),
        "predicted": predict(found, budget.resident_share),
    }


def schedule_document(
    path: Path,
    goal: Goal,
    parallel: int | None,
    measure: bool,
    progress: Report,
    n_ctx: int | None = None,
    n_threads: int | None = None,
    chat: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """``schedule``: how sequences would share the model; None where it was never measured, or
    where so many do not fit, which ``schedule_reason`` says."""
    from .. import opening
    from ..engine import planning

    found = opening.find(path, Options(**options))
    found = replace(found, total=found.total - _beside(found, chat))
    if not measure and planning.known(found, n_threads) is None:
        reason = "not measured on this machine yet: --measure takes about ten seconds"
        return {"schedule": None, "schedule_reason": reason}
    try:
        made = planning.planned(
            found, goal, n_ctx=n_ctx, parallel=parallel, n_threads=n_threads, progress=progress,
            anew=measure,
        )  # fmt: skip
    except UserError as error:
        return {"schedule": None, "schedule_reason": error.spelled(as_flag)}
    schedule = planning.document(made)
    return {"schedule": schedule, "schedule_reason": None, "schedule_lines": planning.lines(made)}


def on_device(pools: DeviceBudget) -> dict[str, Any]:
    """A device's division, as the document has it."""
    return {
        "budget_bytes": pools.total,
        **{f"{name}_bytes": n_bytes for name, n_bytes in pools.needs._asdict().items()},
        "experts_bytes": pools.experts,
        "slots": sum(pools.n_slots.values()),
        "resident_share": pools.resident_share,
        "rows": pools.rows(),
    }


def _beside(found: Found, chat: bool) -> int:
    from ..chat.templates import room

    return room(found.layout.keys) if chat else 0


def _measure(found: Found, n_ctx: int | None, n_threads: int | None, beside: int) -> Measured:
    """What ``run`` would find with the same options; no weight is read, nothing stays open."""
    # What ``run`` has imported by then is part of the process, and measured with it.
    from .. import opening, timeline  # noqa: F401
    from ..engine import engine  # noqa: F401
    from ..engine.model import context_shape
    from ..params import ModelParams, n_ctx_of

    overrides = {}
    if found.options.experts_used is not None:
        overrides[f"{found.layout.architecture}.expert_used_count"] = found.n_used
    params = ModelParams(overrides)
    shape = context_shape(n_ctx_of(found.layout, n_ctx), n_threads=n_threads)
    binding, measured = opening.bound(found, params.params, shape.params())
    binding.close()
    return replace(measured, needs=measured.needs._replace(beside=beside))


def predict(found: Found, resident_share: float) -> dict[str, Any]:
    """Decode speed if nothing but reading experts took time, at two hit rates.

    Real routing repeats itself more than uniform routing, and computing takes time too: the
    first makes a run faster than the upper number, the second slower.
    """
    from .. import disk

    per_token = found.n_used * sum(layer.blob_bytes for layer in found.layout.layers)
    speed = disk.speed(found.layout, found.mode)
    hit_rates = [0.0, resident_share]
    return {
        "disk_bytes_per_s": speed,
        "bytes_per_token_if_all_miss": per_token,
        "hit_rates": hit_rates,
        # None: nothing would be read.
        "decode_tps": [
            speed / (per_token * (1 - rate)) if rate < 1 else None for rate in hit_rates
        ],
    }


def plan_text(document: dict[str, Any]) -> str:
    d = document
    needs = Needs(*(d[f"{name}_bytes"] for name in Needs._fields))
    budget = Budget(
        d["budget_bytes"], needs, d["slot_bytes"], d["slots"], d["slots_all"], d["working_set"]
    )
    named = f"the smallest budget that works is {d['smallest_bytes'] // MB}MB"
    sizes = [
        (d["smallest_bytes"], "is the smallest that works"),
        (d["working_set_fits_bytes"], f"holds the {d['working_set']} experts of one token"),
        (d["everything_fits_bytes"], "holds every expert"),
    ]
    rows = [["", f"{-(-n_bytes // MB)} MB", what] for n_bytes, what in sizes]
    lines = [
        f"{shown(d['path'], 1000)} ({shown(d['architecture'])}), {d['n_ctx']} tokens of context",
        f"fits {format_size(d['budget_bytes'])}: "
        + ("yes" if d["fits"] else f"no, {named}; a smaller --ctx also helps"),
        budget.table(),
        *_device_lines(d),
        "budgets:",
        *columns(rows, "<><"),
        *(
            f"on disk: {t['name']} ({format_size(t['bytes'])}), looked up by row"
            for t in d["tables"]
        ),
        f"reads {d['reads']}; policy {d['policy']}; device {d['device']}",
    ]
    if d["predicted"] is not None:
        lines.append(_predicted_text(d["predicted"]))
    lines += d.get("schedule_lines", ())
    if d.get("schedule_reason"):
        lines.append(f"schedule of several sequences: {d['schedule_reason']}")
    if d["warning"]:
        lines.append(f"warning: {d['warning']}")
    return "\n".join(lines)


def _device_lines(d: dict[str, Any]) -> list[str]:
    if d["on_device"] is None:
        return []
    rows = [(name, format_size(n), remark) for name, n, remark in d["on_device"]["rows"]]
    return [f"on {shown(d['device'])}:", *(f"  {line}" for line in columns(rows, "<><"))]


def _predicted_text(predicted: dict[str, Any]) -> str:
    slow, fast = predicted["decode_tps"]
    _, rate = predicted["hit_rates"]
    per_token = format_size(predicted["bytes_per_token_if_all_miss"])
    text = (
        f"decode at the disk's speed: {slow:.2f} tok/s if every expert is read ({per_token} per "
        f"token at {format_size(predicted['disk_bytes_per_s'])}/s, cold)"
    )
    if fast is None:
        return f"{text}; once read, every expert stays in memory and only computing takes time"
    return (
        f"{text}, {fast:.2f} tok/s if {rate:.0%} of them are hits, as with uniform routing; "
        "real routing hits more often, and computing takes time as well"
    )
