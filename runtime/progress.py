"""Progress of long work: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

Report = Callable[[float, float], None]
_LINE_SECONDS = 5.0


@contextmanager
def bar(what: str) -> Iterator[Report]:
    """Yield ``report(done, total)``; nothing appears for work that ends within half a second."""
    start = time.monotonic()
    if not sys.stderr.isatty():
        last = start

        def line(done: float, total: float) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= _LINE_SECONDS and total > 0:
                last = now
                print(f"{what}: {done / total:.0%}", file=sys.stderr, flush=True)

        yield line
        return
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=None, visible=False)

        def update(done: float, total: float) -> None:
            late = time.monotonic() - start > 0.5
            progress.update(task, completed=done, total=total, visible=late)

        yield update
