"""``moe-gguf serve``: the OpenAI-compatible server."""

from __future__ import annotations

from typing import Any

import click

from .model import open_llama
from .options import model_options


@click.command()
@model_options
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option(
    "--port",
    default=8080,
    type=click.IntRange(0, 65535),
    help="0: any that is free",
    show_default=True,
)
@click.option("--api-key", envvar="MOE_GGUF_API_KEY", show_envvar=True, help="require this key")
def serve(model: str, host: str, port: int, api_key: str | None, **options: Any) -> None:
    """Serve MODEL over the OpenAI API (llama-cpp-python's server, one request at a time)."""
    from .. import server

    listener = server.listen(host, port)
    llama = open_llama(model, **options)
    try:
        server.serve(llama, listener, api_key)
    finally:
        llama.close()
