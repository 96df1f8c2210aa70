"""``moe-gguf quality``: what a lossy setting costs."""

from __future__ import annotations

import json
from typing import Any

import click

from .. import cache
from ..options import Options
from .model import open_llama, resolve
from .options import model_options
from .terminal import prompt_text


@click.command()
@model_options
@click.option(
    "-f", "--file", "text_file", type=click.Path(), help="the text; default: a piece of plain prose"
)
@click.option(
    "--against",
    metavar="MODEL",
    help="compare with this model's lossless run instead of MODEL's own",
)
@click.option(
    "--batch",
    "n_batch",
    default=512,
    type=click.IntRange(1, 4096),
    metavar="N",
    help="tokens per step; 1 measures what generation does",
    show_default=True,
)
@click.option("--json", "as_json", is_flag=True)
def quality(
    model: str,
    text_file: str | None,
    against: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Score a text with MODEL: perplexity, and what a lossy setting costs against the lossless run.

    The text is read in chunks of --ctx tokens (default 512).
    """
    from ..bench.prose import prose
    from ..bench.quality import Request, quality_text
    from ..bench.quality import quality as run_quality
    from ..progress import bar

    options = Options.taken_from(settings)
    text = prose() if text_file is None else prompt_text(None, text_file, wants_terminal=False)
    assert text is not None
    path = resolve(model)
    other = None if against is None else resolve(against)
    folder = cache.folder()
    folder.mkdir(parents=True, exist_ok=True)
    request = Request(path, text, options, against=other, **settings)
    document = run_quality(request, open_model=open_llama, progress=bar, folder=folder)
    click.echo(json.dumps(document) if as_json else quality_text(document))
