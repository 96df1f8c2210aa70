"""``moe-gguf batch``: a file of requests, answered into another."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...policies.trace import TraceRecorder
from ..errors import UserError
from ..system import check_writable
from .model import open_engine, resolve
from .options import model_options, parallel_options
from .terminal import note
from .trace import trace_metadata

if TYPE_CHECKING:
    from ..batch.figures import Figures
    from ..batch.output import Output
    from ..engine.engine import Engine


@click.command()
@model_options
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@parallel_options("throughput")
@click.option(
    "--ray",
    metavar="ADDRESS",
    help="use every node of this Ray cluster; MODEL, IN and OUT, a folder then, are on a file "
    "system that they share (extra: ray)",
)
@click.option(
    "--trace",
    "trace_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="also record which experts were asked for, for replay",
)
@click.option("--json", "as_json", is_flag=True, help="print what was done as a JSON document")
def batch(
    model: str,
    source: Path,
    target: Path,
    goal: str,
    ray: str | None,
    trace_file: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer the requests in the file IN, OpenAI's batch lines, into the file OUT.

    IN has a JSON object per line: custom_id, method POST, url /v1/completions or
    /v1/chat/completions, body. OUT gets a line for each, in any order, as it is answered; a line
    that cannot be answered gets an error. However a run ended, the same command goes on with the
    lines that are left. Exits with 1 when lines failed that could have been answered.
    """
    options["parallel"] = options["parallel"] or "auto"
    if ray is not None:
        if as_json:
            raise UserError("--json is for one machine: Ray's dashboard has a cluster's figures")
        if trace_file is not None:
            raise UserError("--trace is for one machine: what a cluster asks for is many traces")
        _run_on_ray(ray, model, source, target, {"goal": goal, **options})
        return
    from ..batch.figures import Figures
    from ..batch.lines import extent, lines
    from ..batch.output import Output
    from ..batch.workload import workload

    # Before the model is opened, so that mistakes show now.
    if trace_file is not None:
        check_writable(trace_file)
    found = extent(source)
    output = Output(target, source, found.n_lines)
    stats = None
    try:
        figures = Figures(found.n_asked, output.n_before)
        for line in lines(source):
            output.has(line)
        if output.n_before < found.n_asked:
            if output.n_before:
                note(f"moe-gguf: {output.n_before} of {found.n_asked} lines are answered already")
            asked = workload(source, found.n_asked - output.n_before)
            opening = partial(open_engine, model, goal=goal, workload=asked, **options)
            stats = _open_and_run(opening, source, output, figures, trace_file)
    except KeyboardInterrupt:
        _say_how_to_go_on("interrupted", figures)
        sys.exit(130)
    except (OSError, RuntimeError):
        _say_how_to_go_on("stopped", figures)
        raise
    finally:
        output.close()
    _tell(figures.table(stats), as_json)
    if figures.n_failed:
        sys.exit(1)


def _open_and_run(
    open_engine: Callable[..., Engine],
    source: Path,
    output: Output,
    figures: Figures,
    trace_file: Path | None,
) -> dict[str, Any]:
    """The engine's statistics of the run."""
    from ..engine.planning import lines

    recorder = None if trace_file is None else TraceRecorder()
    engine = open_engine(score_rows=None, chat=True, recorder=recorder)
    try:
        for line in lines(engine.plan) if engine.plan else ():
            note(line)
        figures.start()
        _run(engine, source, output, figures)
        if trace_file is not None and recorder is not None:
            recorder.save(trace_file, trace_metadata(engine))
            note(f"moe-gguf: wrote {trace_file}")
        return engine.stats()
    finally:
        engine.close()


def _run(engine: Engine, source: Path, output: Output, figures: Figures) -> None:
    from ..api.texts import EngineTexts
    from ..batch.answers import Answerer
    from ..batch.job import Batch
    from ..progress import bar

    answerer = Answerer(engine, EngineTexts(engine), engine.found.layout.name)
    counts, n_told = answerer.counts, figures.n_done

    def detail() -> str:
        seconds = figures.seconds
        return (
            f"{n_told} of {figures.n_asked} lines, prompts {counts.prompt / seconds:.1f} tok/s, "
            f"answers {counts.answered / seconds:.1f} tok/s"
        )

    with bar("answering", detail=detail) as report:

        def tell(n_done: int) -> None:
            nonlocal n_told
            n_told = n_done
            report(n_done, figures.n_asked)

        tell(n_told)
        # As many again wait, so that none is missed when one ends.
        window = 2 * engine.parallel
        asyncio.run(Batch(source, output, answerer, figures, window, tell).run())


def _run_on_ray(
    address: str, model: str, source: Path, folder: Path, options: dict[str, Any]
) -> None:
    from ..ray import run

    try:
        run(
            address, resolve(model), source, folder, options, lambda text: note(f"moe-gguf: {text}")
        )
    except KeyboardInterrupt:
        note("moe-gguf: interrupted: the same command goes on where this one stopped")
        sys.exit(130)
    note(f"moe-gguf: wrote {folder}: an answer for each line, in its .jsonl files")


def _say_how_to_go_on(what: str, figures: Figures) -> None:
    note(
        f"moe-gguf: {what}: {figures.n_done} of {figures.n_asked} lines are answered; the same "
        "command goes on with the others"
    )


def _tell(table: dict[str, Any], as_json: bool) -> None:
    from ..batch.figures import summary

    if as_json:
        click.echo(json.dumps(table))
    for line in summary(table).splitlines():
        note(f"moe-gguf: {line}")
