"""``moe-gguf convert``: a bundle from a GGUF or a checkpoint."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import click

from .inspect import verify_bundle
from .model import checkpoint
from .terminal import note, quieten


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("folder", metavar="DST", type=click.Path(path_type=Path))
@click.option(
    "--quant",
    metavar="TYPE",
    help="type of the experts: q4_k, q8_0, f16, …; the trunk gets llama.cpp's mix for it; "
    "default: copy for a GGUF, whose bytes stay, q4_k for a Hugging Face checkpoint",
)
@click.option("--low-quant", metavar="TYPE", help="also write a smaller copy of every expert")
@click.option(
    "--imatrix",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="importance matrix of llama-imatrix, GGUF or .dat",
)
@click.option(
    "--layout",
    default="auto",
    metavar="NAME",
    help="of the experts: plain as in any GGUF, repacked for this CPU's kernels, or auto",
    show_default=True,
)
@click.option("--shard-size", metavar="SIZE", help="start a new expert file before this size")
@click.option(
    "--threads",
    type=click.IntRange(1, 512),
    metavar="N",
    help="that quantize; default: one per core",
)
@click.option("--verify", "verified", is_flag=True, help="read the bundle again at the end")
def convert(
    source: str,
    folder: Path,
    quant: str | None,
    low_quant: str | None,
    imatrix: Path | None,
    layout: str,
    shard_size: str | None,
    threads: int | None,
    verified: bool,
) -> None:
    """Make the bundle DST, a folder, from SRC: a GGUF, a Hugging Face folder or hf:owner/repo.

    An interrupted conversion goes on where it stopped when the same command is given again; over a
    complete one that command does nothing.
    """
    from ...converters.choose import ConvertOptions
    from ...converters.convert import convert as run_convert
    from ...converters.convert import open_source
    from .. import kernels
    from ..progress import bar
    from ..sizes import parse_size

    def say(text: str) -> None:
        note(f"moe-gguf: {text}")

    quieten()
    shard_bytes = None if shard_size is None else parse_size(shard_size)
    options = ConvertOptions(quant, low_quant, imatrix, layout, shard_bytes, threads)
    try:
        with (
            contextlib.closing(open_source(checkpoint(source))) as opened,
            bar(f"converting {opened.name}", in_bytes=True) as progress,
        ):
            summary = run_convert(opened, folder, options, kernels, progress, say)
    except KeyboardInterrupt:
        say("interrupted; the same command goes on where this one stopped")
        sys.exit(130)
    say(f"wrote {folder}" if summary.is_new else f"{folder} is complete: there is nothing to do")
    for line in summary.lines():
        note(line)
    if verified and verify_bundle(folder):
        sys.exit(1)
