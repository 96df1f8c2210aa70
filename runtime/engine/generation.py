"""One request as its caller sees it: events to iterate, an end, and the way to cancel it.

Carries events from the thread that computes to whoever waits, in a thread or in asyncio. Knows
neither the engine nor how an event came to be.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from types import TracebackType
from typing import NamedTuple

from .request import Event, Finished, Logprob, PromptScored, Token


class Result(NamedTuple):
    """All that a request came to. ``logprobs`` of the tokens, if they were asked for."""

    text: str
    tokens: Sequence[int]
    logprobs: Sequence[Logprob]
    prompt_logprobs: Sequence[Logprob]
    finished: Finished


def _nothing() -> None:
    pass


_FINISHED = StopIteration()  # an end that is no failure


class Generation(Iterator[Event], AsyncIterator[Event]):
    """The events of one request, each given once: iterate it in a thread or in asyncio.

    The last is a ``Finished``. A request that failed raises what failed it instead, one that was
    cancelled ``Cancelled``, as often as it is asked. As a context manager it cancels what is left.
    """

    def __init__(self, n_prompt: int) -> None:
        self.n_prompt = n_prompt
        self._events: deque[Event] = deque()
        self._end: BaseException | None = None  # what there is instead of more events
        self._ready = threading.Condition()
        self._waiting: list[Callable[[], object]] = []
        self._cancel: Callable[[], None] = _nothing
        self._seen: list[Event] = []
        self.engine: object = None  # which must live as long as it is read

    # -- from the thread that computes

    def on_cancel(self, cancel: Callable[[], None]) -> None:
        self._cancel = cancel

    def put(self, *events: Event) -> None:
        self._tell(events, _FINISHED if isinstance(events[-1], Finished) else None)

    def fail(self, error: BaseException) -> None:
        self._tell((), error)

    def _tell(self, events: Sequence[Event], end: BaseException | None) -> None:
        with self._ready:
            self._events.extend(events)
            if end is not None:
                self._end = self._end or end
                self._cancel = _nothing  # nor does it refer to what computed it
            self._ready.notify_all()
            waiting, self._waiting = self._waiting, []
        for wake in waiting:
            with contextlib.suppress(RuntimeError):  # the loop that waited has been closed since
                wake()

    def orphan(self, error: BaseException) -> None:
        """In a forked child: whoever computed is not here, and may have held the lock."""
        self._ready, self._waiting, self._end = threading.Condition(), [], error

    # -- from the caller

    def cancel(self) -> None:
        """From any thread, at any time: no token is computed for it beyond the running step."""
        self._cancel()

    @property
    def done(self) -> bool:
        """Whether it has ended, though there may be events to read."""
        return self._end is not None

    def __iter__(self) -> Generation:
        return self

    def __aiter__(self) -> Generation:
        return self

    def __next__(self) -> Event:
        with self._ready:
            while not self._is_ready():
                self._ready.wait()
            event = self._take()
        if event is _FINISHED:
            raise StopIteration
        if isinstance(event, BaseException):
            raise event.with_traceback(None)  # of the one raised before, perhaps elsewhere
        return event

    async def __anext__(self) -> Event:
        loop = asyncio.get_running_loop()
        while True:
            with self._ready:
                if self._is_ready():
                    event = self._take()
                    break
                future = loop.create_future()
                wake = functools.partial(loop.call_soon_threadsafe, _wake, future)
                self._waiting.append(wake)
            await future
        if event is _FINISHED:
            raise StopAsyncIteration
        if isinstance(event, BaseException):
            raise event.with_traceback(None)
        return event

    def _is_ready(self) -> bool:
        return bool(self._events) or self._end is not None

    def _take(self) -> Event | BaseException:
        if self._events:
            event = self._events.popleft()
            self._seen.append(event)
            return event
        assert self._end is not None
        return self._end

    def result(self) -> Result:
        """Wait for the end; all events, those read before as well, in one."""
        for _ in self:
            pass
        return _result(self._seen)

    async def wait(self) -> Result:
        """``result`` for asyncio."""
        async for _ in self:
            pass
        return _result(self._seen)

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _result(events: Sequence[Event]) -> Result:
    tokens = [event for event in events if isinstance(event, Token)]
    scored = next((e.logprobs for e in events if isinstance(e, PromptScored)), ())
    finished = events[-1]
    assert isinstance(finished, Finished)
    return Result(
        "".join(token.text for token in tokens) + finished.text,
        [token.token for token in tokens],
        [token.logprob for token in tokens if token.logprob is not None],
        scored,
        finished,
    )
