"""``moe-gguf replay``: a recorded trace under any policy and size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ...policies.presets import POLICIES
from ...policies.replay import BELADY, ReplayResult, replay_table
from ...policies.trace import Trace, load_trace
from ..columns import columns
from ..errors import UserError, reason
from ..sizes import format_size

# Arena sizes shown by default, as shares of all experts.
_SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)


@click.command()
@click.argument("trace_file", metavar="TRACE", type=click.Path())
@click.option(
    "--policy", "policies", default=None, metavar="A,B,…", help="default: every policy and belady"
)
@click.option(
    "--slots",
    default=None,
    metavar="N,…",
    help="arena sizes; default: the recorded one and a range",
)
@click.option("--json", "as_json", is_flag=True)
def replay(trace_file: str, policies: str | None, slots: str | None, as_json: bool) -> None:
    """Replay TRACE under any policy and arena size, without the model."""
    document = replay_document(Path(trace_file), policies, slots)
    click.echo(json.dumps(document) if as_json else replay_text(document))


def replay_document(path: Path, policies: str | None, slots: str | None) -> dict[str, Any]:
    """The document of ``replay``. ``policies`` and ``slots`` are lists separated by commas."""
    try:
        trace = load_trace(path)
    except OSError as error:
        raise UserError(
            f"cannot open {path} ({reason(error)}): record one with moe-gguf trace"
        ) from None
    except ValueError as error:
        raise UserError(str(error)) from None
    names = [*POLICIES, BELADY] if policies is None else policies.split(",")
    sizes = _default_sizes(trace) if slots is None else _parse_sizes(slots)
    for name in names:
        if name != BELADY and name not in POLICIES:
            known = ", ".join((*POLICIES, BELADY))
            raise UserError(f"there is no policy {name!r}: choose from {known}")
    return {
        "path": str(path),
        "metadata": dict(trace.metadata),
        "events": len(trace.events),
        "recorded": _check_recorded(trace),
        "guesses": trace.has_offers,
        "sizes": sizes,
        "rows": [_row(result) for result in replay_table(trace, names, sizes)],
    }


def _row(result: ReplayResult) -> dict[str, Any]:
    return {
        "policy": result.policy,
        "slots": result.n_slots,
        "hits": result.hits,
        "misses": result.misses,
        "hit_rate": result.hit_rate,
        "guesses": result.guesses,
        "guesses_used": result.guesses_used,
        "bytes_read": result.bytes_read,
    }


def _check_recorded(trace: Trace) -> dict[str, Any] | None:
    """The recorded run's own counts and whether replaying it gives them again; None if unknown.

    A replay begins with empty slots: what a warm run counted it cannot tell.
    """
    meta = trace.metadata
    policy, n_slots = str(meta.get("policy")), meta.get("n_slots")
    counts = meta.get("hits"), meta.get("misses"), meta.get("guesses")
    if policy not in POLICIES or type(n_slots) is not int or n_slots < 1:
        return None
    unlike = ("warmed", "low_copies")
    if None in counts or not meta.get("complete", True) or any(map(meta.get, unlike)):
        return None
    (again,) = replay_table(trace, [policy], [n_slots])
    return {
        "policy": policy,
        "n_slots": n_slots,
        "hits": counts[0],
        "misses": counts[1],
        "guesses": counts[2],
        "reproduced": (again.hits, again.misses, again.guesses) == counts,
    }


def _default_sizes(trace: Trace) -> list[int]:
    n_all = len(trace.metadata["layers"]) * trace.metadata["n_experts"]
    recorded = trace.metadata.get("n_slots")
    sizes = {max(1, round(n_all * share)) for share in _SHARES}
    return sorted(sizes | ({recorded} if type(recorded) is int and recorded >= 1 else set()))


def _parse_sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{text!r} is not a list of arena sizes: write it like 64,128") from None
    if min(sizes) < 1:
        raise UserError(f"an arena of {min(sizes)} slots holds no expert: ask for at least 1")
    return sizes


def replay_text(document: dict[str, Any]) -> str:
    d, meta = document, document["metadata"]
    n_all = len(meta["layers"]) * meta["n_experts"]
    lines = [
        f"{meta.get('model', d['path'])}: {d['events']} events, "
        f"{len(meta['layers'])} MoE layers x {meta['n_experts']} experts"
    ]
    if (recorded := d["recorded"]) is None:
        lines.append(
            "the recorded run cannot be checked: it began warm, used low copies, was interrupted "
            "or says too little"
        )
    else:
        run = (
            f"{recorded['policy']} with {recorded['n_slots']} slots had {recorded['hits']} hits, "
            f"{recorded['misses']} misses and {recorded['guesses']} guesses"
        )
        verdict = "the same" if recorded["reproduced"] else "OTHER COUNTS, which is a bug"
        lines.append(f"recorded: {run}; replaying it gives {verdict}")
    lines.append(_guesses_note(document))
    header = [f"{n} slots ({n / n_all:.0%})" for n in d["sizes"]]
    cells: dict[str, list[str]] = {}
    for row in d["rows"]:
        cell = f"{row['hit_rate']:.1%} {format_size(row['bytes_read'])}"
        cells.setdefault(row["policy"], []).append(cell)
    table = [["hits, bytes read", *header], *([name, *row] for name, row in cells.items())]
    lines += columns(table, "<>")
    return "\n".join(lines)


def _guesses_note(document: dict[str, Any]) -> str:
    if not document["guesses"]:
        return "guesses: none were recorded; policies that guess are replayed by their caches alone"
    run = document["metadata"].get("policy", "the recorded run")
    return (
        f"guesses: those offered to {run}, and after each event no more than it read there; belady "
        "bounds policies that guess nothing"
    )
