"""Tables as people read them: columns of text, aligned with spaces."""

from __future__ import annotations

from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """A line per row, its cells two spaces apart.

    ``align`` has a character per column, ``<`` for left and ``>`` for right; the last one holds
    for all further columns. A row may be shorter than others: its last cell then runs on over
    the columns it lacks, and does not widen its own.
    """
    n = max(map(len, rows), default=0)
    align += align[-1] * (n - len(align))
    widths = [
        max((len(row[i]) for row in rows if i < len(row) - (len(row) < n)), default=0)
        for i in range(n)
    ]

    def line(row: Sequence[str]) -> str:
        cells = [f"{cell:{align[i]}{widths[i]}}" for i, cell in enumerate(row)]
        if len(row) < n:
            cells[-1] = row[-1]
        return "  ".join(cells).rstrip()

    return [line(row) for row in rows]
