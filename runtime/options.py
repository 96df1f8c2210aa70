"""What a user may say about how a model is held and read: every option once.

The command line makes its flags, ``Llama`` its arguments and the benches their rows from the fields
of one dataclass. Checks what can be checked without a model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..policies.precision import Precision
from ..policies.presets import check_policy
from .errors import UserError, option

READ_MODES = ("auto", "direct", "buffered")
MOST_LANES = 64
DEVICES = ("cpu",)


class Told(NamedTuple):
    """How an option is told to people: the placeholder of its value and what it does."""

    metavar: str | None
    help: str


def _option(default: Any, metavar: str | None, help: str) -> Any:
    return field(default=default, metadata={"told": Told(metavar, help)})


@dataclass(frozen=True)
class Options:
    """All of it has a default; UserError for what no model can be opened with."""

    memory: str | int = _option("auto", "SIZE", "what the whole process may use: 2.4GB, 4GiB, auto")
    policy: str = _option("fate", "NAME", "what stays in memory and what is read ahead")
    reads: str = _option("auto", "MODE", "auto, direct or buffered")
    lanes: int | None = _option(None, "N|auto", "reader threads")
    experts_used: int | None = _option(
        None, "K", "experts per token instead of the model's own number (lossy)"
    )
    low_share: float = _option(
        0.0,
        "F",
        "read the least popular experts of a prompt, up to this share of its votes, "
        "from the bundle's low copy (lossy); 0.25 is a good start; 0: off",
    )
    low_on_miss: bool = _option(
        False, None, "in generation read missing experts from the bundle's low copy (lossy)"
    )
    device: str = _option("cpu", "NAME", "where experts are computed (cpu)")
    warm: bool = _option(
        False, None, "fill memory first with what was popular in runs of trace --save-routing"
    )

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise UserError(
                f"device {self.device!r} is not supported yet: use {option('device', 'cpu')}"
            )
        try:
            check_policy(self.policy)
        except ValueError as error:
            raise UserError(str(error)) from None
        if self.reads not in READ_MODES:
            raise UserError(f"{self.reads!r} is not a way to read: use {', '.join(READ_MODES)}")
        if self.lanes is not None and not 1 <= self.lanes <= MOST_LANES:
            raise UserError(f"{self.lanes} lanes make no sense: give 1 to {MOST_LANES}, or auto")
        if not 0.0 <= self.low_share <= 1.0:
            raise UserError(
                f"{option('low_share', self.low_share)} is out of range: give a share from 0 to 1"
            )

    @property
    def precision(self) -> Precision:
        return Precision(self.low_share, self.low_on_miss)
