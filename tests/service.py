"""A running server over a scripted engine: HTTP as clients meet it, no model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from scripted import ByteTexts, Scripted, speak

from moe_gguf.runtime.api.texts import Texts
from moe_gguf.runtime.server.service import Computes, Served, Service
from moe_gguf.runtime.server.serving import Server, listen
from moe_gguf.runtime.server.settings import Settings

NAME = "gpt-5-claude-sonnet-4-scripted"  # one that conformance tests expect to think

SERVERS: list[Server] = []  # that run, the newest last


@contextmanager
def service(
    engine: Computes | None = None,
    texts: Texts | None = None,
    is_open: bool = True,
    name: str = NAME,
    **settings: Any,
) -> Iterator[tuple[Service, str]]:
    """A service and the address of its server, without /v1; scripted, unless an engine is given."""
    found = Service(Settings(**settings))
    if is_open:
        engine, texts = engine or Scripted(speak), texts or ByteTexts()
        found.open(Served(engine=engine, texts=texts, name=name))
    server = Server(found, listen("127.0.0.1", 0))
    SERVERS.append(server)
    while not server.is_ready:
        server.wait(0.01)
    try:
        yield found, server.url.removesuffix("/v1")
    finally:
        found.hurry()
        server.stop()
        while server.is_alive:
            server.wait(0.05)
        SERVERS.remove(server)
        found.close()


def main() -> None:
    """`service.py PORT [KEY]`: a scripted server for suites of others, until it is killed."""
    found = Service(Settings(keys=sys.argv[2:3], require_model=False, origins=("*",)))
    found.open(Served(engine=Scripted(speak), texts=ByteTexts(), name=NAME))
    server = Server(found, listen("127.0.0.1", int(sys.argv[1])))
    while server.is_alive:
        server.wait(1.0)


if __name__ == "__main__":
    main()
