"""``moe-gguf bench``: rows under a memory cap, turn about."""

from __future__ import annotations

import sys
from typing import Any

import click

from ..bench.request import NO_OPTIONS, Request
from ..options import Options
from .model import resolve
from .options import option_flags
from .terminal import note


@click.command()
@click.argument("model", metavar="MODEL")
@click.option(
    "--memory",
    "caps",
    required=True,
    metavar="SIZE,…",
    help="the cap of every limited row; several are measured turn about",
)
@click.option("--rows", default=Request.rows, show_default=True, help="what to measure")
@click.option(
    "--repeat", default=Request.repeat, show_default=True, help="runs of each row, turn about"
)
@click.option(
    "-n",
    "n_predict",
    default=Request.n_predict,
    show_default=True,
    help="decoded tokens per run",
)
@click.option("--prompt-tokens", default=Request.prompt_tokens, show_default=True)
@click.option("--ctx", "n_ctx", default=Request.n_ctx, show_default=True)
@click.option("--threads", "n_threads", type=int, metavar="N")
@option_flags(without=NO_OPTIONS)
@click.option(
    "--server",
    type=click.Path(),
    metavar="FILE",
    help="llama-cpp-python's examples/server/server.py, for the row stock-server:N",
)
@click.option("--disk-bw", metavar="SIZE", help="let every row read that much per second only")
@click.option("--json", "json_file", type=click.Path(), help="write the results here")
@click.option("--plot", "plot_file", type=click.Path(), help="write a PNG of decode speed here")
@click.option(
    "--plot-layers",
    "layers_file",
    type=click.Path(),
    help="write a PNG of hits and recall by layer here",
)
@click.option(
    "--timeline",
    "timeline_file",
    type=click.Path(),
    help="write what one more token's time went to, for ui.perfetto.dev",
)
@click.option("--timeline-row", metavar="NAME", help="of which row; default: the last of ours")
def bench(model: str, **settings: Any) -> None:
    """Measure MODEL under a memory cap: stock llama.cpp against our policies, turn about."""
    from ..bench.report import table
    from ..bench.rounds import bench as run_bench

    options = Options.taken_from(settings)
    outcome = run_bench(Request(resolve(model), options=options, **settings), note=note)
    click.echo(table(outcome.document))
    for error in outcome.errors:
        note(f"moe-gguf: ERROR: {error}")
    if outcome.interrupted or outcome.errors:
        sys.exit(130 if outcome.interrupted else 1)
