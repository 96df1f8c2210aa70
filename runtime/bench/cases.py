"""What is to be measured: rows by name, and their caps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ...policies.presets import POLICIES
from ..budget import MARGIN_BYTES
from ..errors import UserError, option
from ..formats.layout import ModelLayout
from ..formats.slots import PAGE, slot_layout
from ..sizes import parse_size

# Of a process beside its weights; only decides whether an uncapped row may be tried at all.
_PROCESS_BYTES = 2 * 10**9


class Row(NamedTuple):
    """What the name of a row means."""

    policy: str | None  # None: stock llama.cpp
    mmap: bool
    capped: bool
    repack: bool = False  # stock only; ours follow the model
    low: bool = False  # with the lossy options given


ROWS = {
    "stock-mmap": Row(None, mmap=True, capped=True),
    "stock-resident": Row(None, mmap=False, capped=False),
    "stock-repacked": Row(None, mmap=False, capped=False, repack=True),
    "resident": Row("lru", mmap=False, capped=False),
    **{name: Row(name, mmap=False, capped=True) for name in POLICIES},
    **{f"{name}+low": Row(name, mmap=False, capped=True, low=True) for name in POLICIES},
}


def row_of(name: str) -> Row:
    """What the name of a row means; behind an @ it names another form of the model."""
    return ROWS[name.partition("@")[0]]


class Case(NamedTuple):
    """One row under one cap; None for the rows that have none and run once for all caps."""

    name: str
    cap: int | None

    @classmethod
    def of(cls, name: str, cap: int) -> Case:
        return cls(name, cap if row_of(name).capped else None)


def parse_rows(rows: str) -> dict[str, str]:
    """The rows' names, and behind an @ the other form of the model each runs; "" for MODEL itself.

    A row is called after the last part of a form's path.
    """
    names: dict[str, str] = {}
    for text in (text.strip() for text in rows.split(",")):
        name, _, form = text.partition("@")
        if text and name not in ROWS:
            raise UserError(f"there is no row {name!r}: choose from {', '.join(ROWS)}")
        if text:
            names[f"{name}@{Path(form).name}" if form else name] = form
    if not names:
        raise UserError(f"no rows are named: choose from {', '.join(ROWS)}")
    return names


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
    ours = [name for name in names if row_of(name).policy is not None]
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
