"""``moe-gguf serve``: the server that people's tools and agents point at."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .model import open_engine
from .options import Number, model_options, parallel_options, state_options
from .terminal import warn

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from ..server.service import Served, Service


@click.command()
@model_options
@parallel_options("latency")
@state_options
@click.option("--host", default="127.0.0.1", help="address to listen on", show_default=True)
@click.option(
    "--port",
    default=8080,
    type=click.IntRange(0, 65535),
    help="0: any that is free",
    show_default=True,
)
@click.option("--alias", metavar="NAME", help="the model's name towards clients; its file's")
@click.option(
    "--api-key",
    multiple=True,
    metavar="KEY",
    envvar="MOE_GGUF_API_KEY",
    show_envvar=True,
    help="require this key, or one of several",
)
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help="require one of the keys in a file, one per line",
)
@click.option("--insecure", is_flag=True, help="listen anywhere, and answer anyone, without keys")
@click.option(
    "--cors",
    multiple=True,
    metavar="ORIGIN",
    help="let pages of this origin ask from a browser; * for any",
)
@click.option(
    "--queue",
    default=256,
    type=click.IntRange(0, 1_000_000),
    help="requests that may wait; more are told to come again",
    show_default=True,
)
@click.option(
    "--timeout",
    default=3600,
    type=Number(min=0),
    metavar="SECONDS",
    help="longest that one answer may take; 0: any time",
    show_default=True,
)
@click.option(
    "--grace",
    default=10,
    type=Number(min=0),
    metavar="SECONDS",
    help="how long a stop waits for answers in progress",
    show_default=True,
)
@click.option(
    "--log",
    default="failures",
    type=click.Choice(["failures", "calls", "bodies"]),
    help="what is told on stderr; bodies have people's prompts in them",
    show_default=True,
)
@click.option(
    "--ui",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIR",
    help="serve the front end in this folder instead of the page",
)
def serve(
    model: str,
    host: str,
    port: int,
    alias: str | None,
    api_key: tuple[str, ...],
    api_key_file: Path | None,
    insecure: bool,
    cors: tuple[str, ...],
    queue: int,
    timeout: float,
    grace: float,
    log: str,
    ui: Path | None,
    **options: Any,
) -> None:
    """Serve MODEL over HTTP: OpenAI's and Anthropic's protocols, and a page at /.

    Clients find /v1/chat/completions, /v1/completions, /v1/responses, /v1/messages, /v1/models,
    /v1/files and /v1/batches there, and /health, /metrics, /stats, /props, /slots, /tokenize,
    /detokenize and /apply-template. The first signal lets answers in progress finish, a second one
    does not.
    """
    from ..server.service import Service
    from ..server.serving import listen, serve
    from ..server.settings import Settings, hosts_of, read_keys

    keys = [*api_key, *(read_keys(api_key_file) if api_key_file else ())]
    settings = Settings(
        keys=keys,
        queue=queue,
        timeout_s=timeout,
        grace_s=grace,
        origins=cors,
        hosts=hosts_of(host, keys, insecure),
        log=log,
        ui=ui,
        require_model=ui is None,  # llama.cpp's front end names none
    )
    listener = listen(host, port)
    if options["parallel"] is None:
        options["parallel"] = "auto"
    else:  # nothing is left to choose
        del options["goal"]
    engines: list[Engine] = []
    try:
        service = Service(settings)
        serve(service, listener, partial(_open, service, model, alias, engines, options))
    finally:
        for engine in engines:
            engine.close()


def _open(
    service: Service,
    model: str,
    alias: str | None,
    engines: list[Engine],
    options: dict[str, Any],
) -> Served:
    from ..api.texts import EngineTexts
    from ..errors import RequestError
    from ..server.facts import facts_of
    from ..server.service import Served

    def watch(done: float, total: float) -> None:
        service.progress = (done, total)

    engine = open_engine(
        model,
        watch=watch,
        score_rows=None,
        kept="auto",
        chat=True,
        **options,
    )
    engines.append(engine)
    texts = EngineTexts(engine)
    try:
        caps = engine.templates.caps
    except RequestError as error:  # plain completions work
        warn(str(error))
        caps = {}
    # Of a split set's first file, without its number.
    name = alias or re.sub(r"-\d{5}-of-\d{5}$", "", engine.found.layout.path.stem)
    return Served(engine=engine, texts=texts, name=name, facts=facts_of(engine, caps))
