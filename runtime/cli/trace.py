"""``moe-gguf trace``: which experts a run asks for, recorded to be replayed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...policies.trace import Trace, TraceRecorder
from .. import history
from ..history import Identity
from ..system import check_writable
from .model import open_engine
from .options import model_options, prompt_options
from .terminal import note, prompt_text

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from ..llama import Llama


@click.command()
@model_options
@prompt_options
@click.option(
    "-n", "n_predict", default=128, type=click.IntRange(min=1), metavar="N", show_default=True
)
@click.option("--chat", is_flag=True, help="use the model's chat template")
@click.option("-o", "--output", required=True, type=click.Path(), help="the trace file to write")
@click.option(
    "--save-routing",
    is_flag=True,
    help="also add to the statistics beside MODEL that --warm starts from",
)
def trace(
    model: str,
    prompt: str | None,
    prompt_file: str | None,
    n_predict: int,
    chat: bool,
    output: str,
    save_routing: bool,
    **options: Any,
) -> None:
    """Record which experts MODEL routes to while it generates (greedily)."""
    from ..engine.request import Cancelled
    from ..stats import stats_line

    text = prompt_text(prompt, prompt_file, wants_terminal=False)
    assert text is not None
    check_writable(Path(output))
    recorder = TraceRecorder()
    engine = open_engine(model, recorder=recorder, **options)
    found = engine.found
    try:
        if save_routing:  # so that mistakes show now
            check_writable(found.history_path)
            history.load(found.history_path, found.identity)
        asked: Any = [{"role": "user", "content": text}] if chat else text
        interrupted = False
        generation = engine.submit(asked, max_tokens=n_predict, temp=0.0)
        try:
            for event in generation:
                click.echo(getattr(event, "text", ""), nl=False)
        except KeyboardInterrupt:
            interrupted = True
            generation.cancel()  # and nothing is recorded once it has ended
            with contextlib.suppress(Cancelled):
                generation.result()
        click.echo()
        recorded = recorder.save(Path(output), trace_metadata(engine, complete=not interrupted))
        note(stats_line(engine.stats()))
        note(f"moe-gguf: wrote {output}" + (", up to the interrupt" if interrupted else ""))
        if save_routing:
            path, identity = found.history_path, found.identity
            note(f"moe-gguf: {add_routing(path, identity, engine.arena.gate_recall(), recorded)}")
    finally:
        engine.close()
    if interrupted:
        sys.exit(130)


def trace_metadata(model: Llama | Engine, complete: bool = True) -> dict[str, Any]:
    """What a trace says about the run it records.

    An interrupted run is not ``complete``: its last step counted nothing but may have loaded. With
    ``low_copies`` an expert that was held low and read again counts as a miss: no replay has those.
    """
    layout = model.found.layout
    stats = model.stats()
    return {
        "model": layout.name,
        "architecture": layout.architecture,
        "n_experts": layout.n_experts,
        "n_experts_used": model.found.n_used,
        "layers": [layer.layer for layer in layout.layers],
        "blob_bytes": [layer.blob_bytes for layer in layout.layers],
        "policy": stats["policy"],
        "n_slots": stats["slots"],
        "hits": stats["hits"],
        "misses": stats["misses"],
        "bytes_read": stats["bytes_read"],
        "guesses": stats["guesses"],
        "prefill_tokens": stats["prefill_tokens"],
        "decode_tokens": stats["decode_tokens"],
        "complete": complete,
        "warmed": model.arena.n_warmed or 0,
        "low_copies": model.found.precision.lossy,
    }


def add_routing(path: Path, identity: Identity, recall: Mapping[int, float], trace: Trace) -> str:
    """Add a recorded run to the statistics in ``path``; a line that says so."""
    total = history.count(trace, identity, recall)
    if (earlier := history.load(path, identity)) is not None:
        total = earlier + total
    total.save(path)
    return f"wrote {path}: routing statistics of {total.tokens} tokens"
