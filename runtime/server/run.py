"""The requests of one call while they are computed: a window of them at a time, their events as
they come, and none of them left when nobody waits any more.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import fields, replace
from functools import partial
from types import TracebackType
from typing import Any

from ..api.refusal import Refusal
from ..engine.generation import Generation, Result
from ..engine.request import Event, Finished, Request, Token
from .service import Service

_FIELDS = [field.name for field in fields(Request) if field.name != "tokens"]


class Run:
    """An async context around the requests of one call; entering submits the first of them.

    ``batches`` gives the events as they come, ``results`` is all of them at the end.
    """

    def __init__(self, service: Service, requests: Sequence[Request], owner: str) -> None:
        self.service = service
        self._requests = [replace(request, owner=owner) for request in requests]
        self._queue: asyncio.Queue[tuple[int, Event | BaseException]] = asyncio.Queue()
        self._next = 0  # the first request that is not submitted
        self._generations: list[Generation | None] = [None] * len(requests)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Run:
        # As many again as are computed, so that none is missed when one ends.
        self.service.runs.add(self)
        window = min(len(self._requests), 2 * self.service.served.engine.parallel)
        try:
            for _ in range(window):
                if self._next == len(self._requests):
                    break  # lanes that have begun were faster
                i, generation = await self._submit()
                self._tasks.append(asyncio.create_task(self._lane(i, generation)))
        except BaseException:
            self._stop()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def end(self, refusal: Refusal) -> None:
        """Nothing more comes but this."""
        self._queue.put_nowait((0, refusal))

    def _stop(self) -> None:
        self.service.runs.discard(self)
        for task in self._tasks:
            task.cancel()
        for generation in self._generations:
            if generation is not None and not generation.done:
                generation.cancel()

    async def _submit(self) -> tuple[int, Generation]:
        i = self._next
        self._next += 1
        request = self._requests[i]
        settings: dict[str, Any] = {name: getattr(request, name) for name in _FIELDS}
        engine = self.service.served.engine
        work = partial(engine.submit, list(request.tokens), **settings)
        generation = self._generations[i] = await self.service.submit(work)
        return i, generation

    async def _lane(self, i: int, generation: Generation) -> None:
        """One request after the other."""
        try:
            while True:
                await self._pass_on(i, generation)
                if self._next >= len(self._requests):
                    return
                i, generation = await self._submit()
        except Exception as error:
            self._queue.put_nowait((i, error))

    async def _pass_on(self, i: int, generation: Generation) -> None:
        metrics = self.service.metrics
        last = start = time.monotonic()
        first = True
        async for event in generation:
            if isinstance(event, Token):
                now = time.monotonic()
                if first:
                    metrics.first_token.observe(now - start)
                else:
                    metrics.between_tokens.observe(now - last)
                first, last = False, now
            elif isinstance(event, Finished):
                metrics.finished(event)
            self._queue.put_nowait((i, event))

    async def batches(self) -> AsyncIterator[list[tuple[int, list[Event]]]]:
        """What has come since it was asked last, by request; raises what failed one of them."""
        left = len(self._requests)
        while left:
            got = [await self._queue.get()]
            while not self._queue.empty():
                got.append(self._queue.get_nowait())
            batch: dict[int, list[Event]] = {}
            for i, event in got:
                if isinstance(event, BaseException):
                    raise event
                batch.setdefault(i, []).append(event)
                left -= isinstance(event, Finished)
            yield list(batch.items())

    async def results(self) -> list[Result]:
        async for _ in self.batches():
            pass
        return [await g.wait() for g in self._generations if g is not None]
