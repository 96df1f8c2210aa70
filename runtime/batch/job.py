"""A batch: lines of a file to an engine, answers to another, as many at a time as the engine takes.

The input is streamed. What is in memory are the requests submitted, a window of them, and a block
of lines read ahead, inside which they are put in order: prompts that begin alike follow each other,
so that their beginnings are computed once. An answer is written as it comes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash

from ..api.refusal import OUR_FAULT, Refusal, refusal_of
from ..engine.generation import Result
from ..engine.request import Request
from .answers import Answerer, Ready, Rest, bad, refused
from .figures import Figures
from .lines import BadLine, Line, lines, parse
from .output import Output

# A block ends with the line that makes it this large.
_BLOCK_LINES = 256
_BLOCK_BYTES = 8 << 20
_TICK_SECONDS = 0.5  # between two times that answers are brought to the disk, and told
# So many lines that failed in a row, and the disk or the model is broken: to fail all others too
# would only spoil the output.
_MOST_FAILURES = 16


class Broken(RuntimeError):
    """Too many lines failed one after the other; the last one's sentence."""


class _Work:
    """A line on its way."""

    def __init__(self, line: Line, ready: Ready) -> None:
        self.line = line
        self.ready = ready
        self.results: list[Result | None] = [None] * len(ready.call.requests)
        self.left = len(self.results)
        self.refusal: Refusal | None = None


class Batch:
    """One run over ``source``; ``window`` is how many requests are submitted at a time.

    ``report`` is told about twice a second, and at the end, how many lines are answered and on the
    disk.
    """

    def __init__(
        self,
        source: Path,
        output: Output,
        answerer: Answerer,
        figures: Figures,
        window: int,
        report: Callable[[int], None],
    ) -> None:
        self._source, self._output, self._answerer = source, output, answerer
        self._figures, self._report = figures, report
        self._permits = asyncio.Semaphore(window)
        self._tasks: set[asyncio.Task[None]] = set()
        self._ids: set[int] = set()  # digests of the custom_ids so far
        self._failures = 0  # in a row
        self._broken: BaseException | None = None

    async def run(self) -> None:
        """Answer every line that is not answered yet; raises what ends a batch early."""
        ticker = asyncio.create_task(self._tick())
        try:
            for work in self._works():
                for i, request in enumerate(work.ready.call.requests):
                    await self._permits.acquire()
                    if self._broken is not None:
                        raise self._broken
                    self._start(work, i, request)
            while self._tasks:
                await asyncio.wait(self._tasks)
            if self._broken is not None:
                raise self._broken
        finally:
            tasks = [ticker, *self._tasks]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._output.sync()
            self._report(self._figures.n_done)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            n = self._figures.n_done  # more may be written meanwhile
            try:
                await asyncio.to_thread(self._output.sync)
            except OSError as error:  # the disk is full, or gone
                self._broken = self._broken or error
            else:
                self._report(n)

    # -- lines to requests

    def _works(self) -> Iterator[_Work]:
        """Lines that are to be computed, in the order of their submission."""
        block: list[_Work] = []
        n_bytes = 0
        for line in lines(self._source):
            if (work := self._read(line)) is not None:
                block.append(work)
                n_bytes += len(line.data)
            if len(block) == _BLOCK_LINES or n_bytes >= _BLOCK_BYTES:
                yield from _ordered(block)
                block, n_bytes = [], 0
        yield from _ordered(block)

    def _read(self, line: Line) -> _Work | None:
        """None for a line that is answered, now or before."""
        is_done = self._output.has(line)
        custom_id: str | None = None
        try:
            asked = parse(line)
            custom_id = asked.custom_id
            digest = xxhash.xxh3_64_intdigest(custom_id.encode(errors="surrogatepass"))
            if digest in self._ids:
                raise BadLine(
                    "duplicate_custom_id", "an earlier line has this custom_id", custom_id
                )
            self._ids.add(digest)
            return None if is_done else _Work(line, self._answerer.understand(asked))
        except BadLine as error:
            custom_id, rest = error.custom_id, bad(error)
        except Refusal as refusal:
            rest = refused(refusal)
        if not is_done:
            self._write(line, custom_id, rest)
            self._figures.n_refused += 1
        return None

    # -- requests to answers

    def _start(self, work: _Work, i: int, request: Request) -> None:
        task = asyncio.create_task(self._compute(work, i, request))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._permits.release()
        if not task.cancelled() and (error := task.exception()) is not None:
            self._broken = self._broken or error

    async def _compute(self, work: _Work, i: int, request: Request) -> None:
        if work.refusal is None:
            try:
                work.results[i] = await self._answerer.compute(request)
            except Refusal as refusal:
                work.refusal = refusal
        work.left -= 1
        if not work.left:
            self._finish(work)

    def _finish(self, work: _Work) -> None:
        figures, results = self._figures, [r for r in work.results if r is not None]
        if work.refusal is None:
            try:
                rest = self._answerer.answer(work.ready, results)
            except Exception as error:  # a defect of ours, in one line
                work.refusal = refusal_of(error)
        if work.refusal is not None:
            rest = refused(work.refusal)
        self._write(work.line, work.ready.custom_id, rest)
        for result in results:
            figures.add(result)
        if work.refusal is None:
            figures.n_answered += 1
            self._failures = 0
        elif work.refusal.status < OUR_FAULT:
            figures.n_refused += 1
        else:
            figures.n_failed += 1
            self._failures += 1
            if self._failures == _MOST_FAILURES:
                raise Broken(f"{_MOST_FAILURES} lines in a row failed: {work.refusal}")

    def _write(self, line: Line, custom_id: str | None, rest: Rest) -> None:
        self._output.write(line, custom_id, rest)


def _ordered(block: list[_Work]) -> list[_Work]:
    return sorted(block, key=lambda work: list(work.ready.call.requests[0].tokens))
