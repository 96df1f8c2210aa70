"""``moe-gguf carve-demo``: the demo model, made in a process of its own (see ``cli.model``)."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(hidden=True)
@click.argument("folder", type=click.Path(path_type=Path))
def carve_demo(folder: Path) -> None:
    """Make the demo model in FOLDER unless it is there, and print its path."""
    from ...converters.demo import demo_model
    from ..progress import bar

    with bar("carving the demo model") as progress:
        path = demo_model(folder, progress)
    click.echo(path)
