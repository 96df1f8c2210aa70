"""Progress of long work: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .text import shown

Report = Callable[[float, float], None]  # (done, of all)
_LINE_SECONDS = 5.0


@contextmanager
def bar(
    what: str, in_bytes: bool = False, detail: Callable[[], str] | None = None
) -> Iterator[Report]:
    """Yield ``report(done, total)``; nothing appears for work that ends within half a second.

    Work that is ``in_bytes`` shows its speed as well, other work ``detail``. Where it first reports
    is where it starts: what was done before does not count for the time that is left.
    """
    what = shown(what)
    start = time.monotonic()
    if not sys.stderr.isatty():
        last = start
        first: float | None = None

        def line(done: float, total: float) -> None:
            nonlocal last, first
            first = done if first is None else first
            now = time.monotonic()
            if now - last >= _LINE_SECONDS and total > 0:
                last = now
                rate = (done - first) / max(now - start, 1e-9)
                more = ""
                if in_bytes:
                    more = f", {rate / 1e6:.0f} MB/s, {_left(total - done, rate)}"
                elif detail is not None:
                    more = f", {detail()}, {_left(total - done, rate)}"
                print(f"{what}: {done / total:.0%}{more}", file=sys.stderr, flush=True)

        yield line
        return
    # Here, because who only reports progress need not wait for rich to be imported.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        ProgressColumn,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
    ]
    if in_bytes:
        columns += [DownloadColumn(), TransferSpeedColumn()]
    elif detail is not None:
        columns.append(TextColumn("{task.fields[detail]}", markup=False))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task(what, total=None, visible=False, detail="")

        def update(done: float, total: float) -> None:
            late = time.monotonic() - start > 0.5
            progress.update(
                task, completed=done, total=total, visible=late, detail=detail() if detail else ""
            )

        yield update


def _left(n: float, rate: float) -> str:
    if rate <= 0:
        return "stalled"
    minutes, seconds = divmod(round(n / rate), 60)
    return f"{minutes} min {seconds} s left" if minutes else f"{seconds} s left"
