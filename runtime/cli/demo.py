"""``moe-gguf carve-demo``: the demo model, made in a process of its own."""

from __future__ import annotations

import click

from .options import cache_dir


@click.command(hidden=True)
def carve_demo() -> None:
    """Make the demo model unless it is there, and print its path."""
    from ...converters.demo import demo_model
    from ..progress import bar

    with bar("carving the demo model") as progress:
        path = demo_model(cache_dir(), progress)
    click.echo(path)
