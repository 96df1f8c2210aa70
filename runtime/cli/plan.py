"""Whether a model fits a budget, what it would hold and how fast the disk lets it be: ``plan``.

Goes the way of ``run`` up to the point where weights would be read, so both print the same
numbers. What it predicts is a bound from reads alone; it knows no compute.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import click

from .. import disk, opening
from ..budget import smallest
from ..errors import UserError
from ..opening import Found, Measured
from ..options import Options
from ..params import ContextShape, ModelParams, n_ctx_of
from ..sizes import MB, format_size
from .options import model_options, quieten, resolve


def plan_document(
    path: Path, n_ctx: int | None = None, n_threads: int | None = None, **options: Any
) -> dict[str, Any]:
    """The document of ``plan``; ``options`` are those of ``Options``. UserError for an unusable
    file."""
    found = opening.find(path, Options(**options))
    measured = _measured(found, n_ctx, n_threads)
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
        "slot_bytes": slot_bytes,
        "working_set": found.working_set,
        "slots_all": found.n_all,
        "slots": 0,
        "resident_share": 0.0,
        "experts_bytes": 0,
        "policy": found.options.policy,
        "reads": str(found.mode),
        "device": found.options.device,
    }
    try:
        budget = measured.divide()
    except UserError as error:
        return {**document, "fits": False, "reason": str(error), "predicted": None}
    return {
        **document,
        "warning": budget.warning(),
        "slots": budget.n_slots,
        "resident_share": budget.resident_share,
        "experts_bytes": budget.experts,
        "predicted": predict(found, budget.resident_share),
    }


def _measured(found: Found, n_ctx: int | None, n_threads: int | None) -> Measured:
    """What ``run`` would find with the same options; no weight is read, nothing stays open."""
    overrides = {}
    if found.options.experts_used is not None:
        overrides[f"{found.layout.architecture}.expert_used_count"] = found.n_used
    params = ModelParams(overrides)
    shape = ContextShape(n_ctx_of(found.layout, n_ctx), n_threads=n_threads)
    with contextlib.closing(found.bind()) as binding:
        return opening.measure(found, binding, params.params, shape.params())


def predict(found: Found, resident_share: float) -> dict[str, Any]:
    """Decode speed if nothing but reading experts took time, at two hit rates.

    Real routing repeats itself more than uniform routing, and computing takes time too: the
    first makes a run faster than the upper number, the second slower.
    """
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
    named = f"the smallest budget that works is {d['smallest_bytes'] // MB}MB"
    share = f"{d['slots']} of {d['slots_all']} slots, {d['resident_share']:.0%} of the experts"
    rows = [
        ("trunk", d["trunk_bytes"], "every weight that is not a routed expert"),
        ("KV cache", d["kv_bytes"], f"{d['n_ctx']} tokens of context"),
        ("compute", d["compute_bytes"], "graph and work buffers"),
        ("process", d["process_bytes"], "Python, libraries, vocabulary, margin"),
        ("experts", d["experts_bytes"], share),
    ]
    sizes = [
        (d["smallest_bytes"], "is the smallest that works"),
        (d["working_set_fits_bytes"], f"holds the {d['working_set']} experts of one token"),
        (d["everything_fits_bytes"], "holds every expert"),
    ]
    lines = [
        f"{d['path']} ({d['architecture']})",
        f"fits {format_size(d['budget_bytes'])}: "
        + ("yes" if d["fits"] else f"no, {named}; a smaller --ctx also helps"),
        *(f"  {name:<9}{format_size(n_bytes):>10}  {remark}" for name, n_bytes, remark in rows),
        "budgets:",
        *(f"  {-(-n_bytes // MB):>16} MB  {remark}" for n_bytes, remark in sizes),
        f"reads {d['reads']}; policy {d['policy']}; device {d['device']}",
    ]
    if d["predicted"] is not None:
        lines.append(_predicted_text(d["predicted"]))
    if d["warning"]:
        lines.append(f"warning: {d['warning']}")
    return "\n".join(lines)


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


@click.command()
@model_options
@click.option("--json", "as_json", is_flag=True)
def plan(model: str, as_json: bool, **options: Any) -> None:
    """Say whether MODEL fits a budget and what it would hold, without loading it.

    Exits with 1 when it does not fit.
    """
    from ..progress import bar
    from .plan import plan_document, plan_text

    quieten()
    path = resolve(model)
    with bar(f"measuring {path.name}"):  # like run: the process has the same size then
        document = plan_document(path, **options)
    click.echo(json.dumps(document) if as_json else plan_text(document))
    if not document["fits"]:
        sys.exit(1)
