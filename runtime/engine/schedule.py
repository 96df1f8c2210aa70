"""How an engine shares its steps among sequences, as a value.

A planner makes it, a scheduler obeys it. Knows neither sequences nor memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError, option


@dataclass(frozen=True)
class Schedule:
    """At most ``group`` sequences decode in one step. Those of a group do so for ``quantum`` tokens
    each before the next have their turn; 0: there are no turns, and no more sequences run than one
    group. ``chunk`` is how many tokens of prompts a step computes beside them."""

    group: int = 1
    quantum: int = 0
    chunk: int = 512

    def __post_init__(self) -> None:
        if self.group < 1 or self.quantum < 0 or self.chunk < 1:
            raise UserError(
                f"{self} is no schedule: {option('group')} and {option('chunk')} are at least 1, "
                f"{option('quantum')} is at least 0"
            )
