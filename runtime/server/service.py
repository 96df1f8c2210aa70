"""What all endpoints share: the model, once it is open, who may come in, and who is in.

Owns the count of calls in progress and the threads that prepare requests. Knows no protocol.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from ..api.refusal import Refusal
from ..api.texts import Texts
from ..engine.generation import Generation
from .metrics import Metrics
from .settings import Settings

T = TypeVar("T")

# Preparing a request - its template, its tokens, its grammar - takes milliseconds, but seconds
# where a client makes it hard: the others must not wait for that one.
_PREPARING_THREADS = 16
_LAST_WORDS_S = 1.0  # for the errors of what is cut off to be sent


class Computes(Protocol):
    """What an engine is here."""

    parallel: int

    def submit(self, prompt: list[int], **settings: Any) -> Generation: ...

    def stats(self) -> dict[str, Any]: ...

    def sequences(self) -> list[dict[str, Any]]: ...

    def experts(self) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class Served:
    """An open model. ``facts`` are what is said of it, under llama-server's names."""

    engine: Computes
    texts: Texts
    name: str
    facts: Mapping[str, Any] = field(default_factory=dict)


class Ends(Protocol):
    """What is computed for a call."""

    def end(self, refusal: Refusal) -> None: ...


class Service:
    """One server's state."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.started_s = time.time()
        self.progress: tuple[float, float] = (0.0, 0.0)  # of loading: done, of all
        self.is_stopping = False
        self._hurries = False
        self.n_calls = 0  # in progress
        self.runs: set[Ends] = set()  # what is computed for them
        self.at_end: list[Callable[[], None]] = []
        self._served: Served | None = None
        self._mean_s = 5.0  # of a call
        self._pool = ThreadPoolExecutor(_PREPARING_THREADS, "moe-gguf preparing")

    # -- the model

    @property
    def served(self) -> Served:
        """Refusal while there is none."""
        if self._served is None:
            done, total = self.progress
            how_far = f" ({done / total:.0%} is done)" if total > 0 else ""
            raise Refusal(
                f"the model is still being loaded{how_far}: ask again",
                status=503,
                code="loading",
                retry_s=5,
            )
        return self._served

    def open(self, served: Served) -> None:
        self.metrics.watch(served.engine)
        self._served = served

    @property
    def is_open(self) -> bool:
        return self._served is not None

    # -- calls

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around a call that computes. Refusal where too many wait already."""
        if self.is_stopping:
            raise Refusal("the server is stopping", status=503, retry_s=10)
        parallel = self.served.engine.parallel
        if self.n_calls >= parallel + self.settings.queue:
            wait_s = min(600, max(1, math.ceil(self._mean_s * self.settings.queue / parallel)))
            raise Refusal(
                f"{self.n_calls} requests are in progress, and no more may wait: ask again later",
                status=429,
                code="rate_limit_exceeded",
                retry_s=wait_s,
            )
        self.n_calls += 1
        start = time.monotonic()
        try:
            yield
        finally:
            self.n_calls -= 1
            self._mean_s += 0.1 * (time.monotonic() - start - self._mean_s)

    async def prepare(self, work: Callable[..., T], *arguments: Any) -> T:
        """Have this done in a thread of its own."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, work, *arguments)

    async def submit(self, work: Callable[[], Generation]) -> Generation:
        """As ``prepare``; what is submitted for nobody any more is cancelled."""
        future = asyncio.get_running_loop().run_in_executor(self._pool, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(_cancel)
            raise

    # -- the end

    async def stop(self, grace_s: float) -> None:
        """Let nobody in, wait that long for those who are, and end what is left with a word."""
        self.is_stopping = True
        await self._wait_until_empty(grace_s)
        for run in list(self.runs):
            run.end(Refusal("the server is stopping", status=503))
        self._hurries = False
        await self._wait_until_empty(_LAST_WORDS_S)

    def hurry(self) -> None:
        """From any thread: wait no longer for those who are in."""
        self._hurries = True

    async def _wait_until_empty(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.n_calls and time.monotonic() < deadline and not self._hurries:
            await asyncio.sleep(0.02)

    def close(self) -> None:
        for close in self.at_end:
            close()
        self._pool.shutdown(wait=False, cancel_futures=True)


def _cancel(future: asyncio.Future[Generation]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().cancel()
