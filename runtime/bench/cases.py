"""What is to be measured: rows by name, and their caps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

from ...policies.presets import POLICIES
from ..budget import MARGIN_BYTES
from ..errors import UserError, option
from ..formats.layout import ModelLayout
from ..formats.slots import PAGE, slot_layout
from ..sizes import parse_size
from .spec import WAYS, Way

# Of a process beside its weights; only decides whether an uncapped row may be tried at all.
_PROCESS_BYTES = 2 * 10**9

_MOST_SEQUENCES = 256  # of llama.cpp's context
_POWERS = [1 << i for i in range(9)]


class Row(NamedTuple):
    """What the name of a row means."""

    policy: str | None  # None: stock llama.cpp
    mmap: bool
    capped: bool
    repack: bool = False  # as it is read; a bundle may be repacked already
    low: bool = False  # with the lossy options given
    whole: bool = False  # a policy that streams demand that goes round, without that
    server: bool = False
    sequences: int = 0  # 0: one stream, a step at a time
    way: Way = ""  # of several sequences

    @property
    def rival(self) -> str:
        """What stands behind the name of a row of stock's that computes the same."""
        if not self.sequences:
            return ""
        return f":{self.sequences}" + (f":{self.way}" if self.way in _STOCK_WAYS else "")


_STOCK_WAYS = ("same", "score")
_STREAMING = ("klotski", "fate")

ROWS = {
    "stock-mmap": Row(None, mmap=True, capped=True),
    "stock-resident": Row(None, mmap=False, capped=False),
    "stock-repacked": Row(None, mmap=False, capped=False, repack=True),
    # llama-cpp-python's example server, with its own defaults.
    "stock-server": Row(None, mmap=True, capped=False, repack=True, server=True),
    "resident": Row("lru", mmap=False, capped=False),
    "resident-repacked": Row("lru", mmap=False, capped=False, repack=True),
    **{name: Row(name, mmap=False, capped=True) for name in POLICIES},
    **{f"{name}+low": Row(name, mmap=False, capped=True, low=True) for name in POLICIES},
    **{f"{name}-whole": Row(name, mmap=False, capped=True, whole=True) for name in _STREAMING},
}


def row_of(name: str) -> Row:
    """What the name of a row means: behind a colon how many sequences it computes, behind another
    one in which way; behind an @ another form of the model."""
    base, _, group = name.partition("@")[0].partition(":")
    if not group:
        return ROWS[base]
    n, _, way = group.partition(":")
    return ROWS[base]._replace(sequences=int(n), way=cast(Way, way))


class Case(NamedTuple):
    """One row under one cap; None for the rows that have none and run once for all caps."""

    name: str
    cap: int | None

    @classmethod
    def of(cls, name: str, cap: int) -> Case:
        return cls(name, cap if row_of(name).capped else None)


def parse_rows(rows: str) -> dict[str, str]:
    """The rows' names, and behind an @ the other form of the model each runs; "" for MODEL itself.

    A row is called after the last part of a form's path. ``fate:1-64`` is fate with 1, 2, 4, ...
    64 sequences.
    """
    names: dict[str, str] = {}
    for text in filter(None, (text.strip() for text in rows.split(","))):
        row, _, form = text.partition("@")
        base, _, group = row.partition(":")
        if base not in ROWS:
            raise UserError(f"there is no row {base!r}: choose from {', '.join(ROWS)}")
        if ROWS[base].server and not group:
            raise UserError(f"{base} is for several sequences: write {base}:16")
        for suffix in _groups(row, group, ROWS[base].policy is None) if ":" in row else [""]:
            name = base + suffix
            names[f"{name}@{Path(form).name}" if form else name] = form
    if not names:
        raise UserError(f"no rows are named: choose from {', '.join(ROWS)}")
    return names


def _groups(row: str, group: str, is_stock: bool) -> list[str]:
    """What stands behind the names of the rows that ``row`` means."""
    size, _, way = group.partition(":")
    ways = [each for each in WAYS if each and (not is_stock or each in _STOCK_WAYS)]
    if ROWS[row.partition(":")[0]].server:
        ways = []
    if way and way not in ways:
        raise UserError(f"there is no row {row!r}: {_one_of(ways)}")
    first, dash, last = size.partition("-")
    try:
        low, high = int(first), int(last if dash else first)
    except ValueError:
        low = high = 0
    if not 1 <= low <= high <= _MOST_SEQUENCES:
        raise UserError(
            f"there is no row {row!r}: behind the colon stands how many sequences, 1 to "
            f"{_MOST_SEQUENCES}, or a range like 1-64"
        )
    sizes = [n for n in _POWERS if low < n < high]
    return [f":{n}" + (f":{way}" if way else "") for n in dict.fromkeys([low, *sizes, high])]


def _one_of(ways: Sequence[str]) -> str:
    if not ways:
        return "it knows no ways"
    return f"behind the second colon stands {', '.join(ways[:-1])} or {ways[-1]}"


def parse_caps(caps: str) -> list[int]:
    texts = [text.strip() for text in caps.split(",") if text.strip()]
    if not texts or "auto" in texts:
        raise UserError(
            f"bench compares under a fixed cap: give {option('caps')} a size like 2.4GB"
        )
    return list(dict.fromkeys(parse_size(text) for text in texts))


def cases_of(names: Sequence[str], caps: Sequence[int]) -> list[Case]:
    """In the order of a round; rows without a cap come up with the first one."""
    return list(dict.fromkeys(Case.of(name, cap) for cap in caps for name in names))


def timeline_row_of(asked: str | None, names: Sequence[str]) -> str:
    """The row to draw: the last of ours unless one is named."""
    ours = [n for n in names if row_of(n).policy is not None and not row_of(n).sequences]
    if asked is not None and asked not in ours:
        raise UserError(
            f"{option('timeline_row', asked)}: name a row of ours that runs ({', '.join(ours)})"
        )
    if not ours:
        raise UserError(
            f"{option('timeline_file')} shows our engine: add a row of it to {option('rows')}"
        )
    return asked or ours[-1]


def memory_for_all(layout: ModelLayout) -> int:
    """A budget in which every expert has a slot."""
    n_all = len(layout.layers) * layout.n_experts
    slots = n_all * slot_layout(layout, PAGE).slot_bytes
    return layout.trunk_bytes + slots + _PROCESS_BYTES + MARGIN_BYTES
