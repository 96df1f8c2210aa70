"""What a user may say about how a model is held and read: every option once.

The command line makes its flags, ``Llama`` its arguments and the benches their rows from the fields
of one dataclass. Checks what can be checked without a model.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import UserError, option

if TYPE_CHECKING:
    from ..policies.precision import Precision

READ_MODES = ("auto", "direct", "buffered")
MOST_LANES = 64
TABLE_ROWS = ("auto", "resident", "disk")
CPU_EXPERTS = ("auto", "off", "all")
REPACK = ("auto", "on", "off")


class Entry(NamedTuple):
    """How an option is described to people, and whether it changes what is computed."""

    metavar: str | None  # the placeholder of its value; with ``|auto``, auto stands for None
    help: str
    lossy: bool


def entry(default: Any, metavar: str | None, help: str, lossy: bool = False) -> Any:
    """A field of ``Options``; its annotation says what values it takes."""
    return field(default=default, metadata={"entry": Entry(metavar, help, lossy)})


@dataclass(frozen=True)
class Options:
    """All of it has a default; UserError for what no model can be opened with."""

    memory: str | int = entry("auto", "SIZE", "what the whole process may use: 2.4GB, 4GiB, auto")
    policy: str = entry("fate", "NAME", "what stays in memory and what is read ahead")
    reads: str = entry("auto", "MODE", "auto, direct or buffered")
    lanes: int | None = entry(None, "N|auto", "reader threads")
    experts_used: int | None = entry(
        None, "K", "experts per token instead of the model's own number (lossy)", lossy=True
    )
    low_share: float = entry(
        0.0,
        "F",
        "read the least popular experts of a prompt, up to this share of its votes, "
        "from the bundle's low copy (lossy); 0.25 is a good start; 0: off",
        lossy=True,
    )
    low_on_miss: bool = entry(
        False,
        None,
        "in generation read missing experts from the bundle's low copy (lossy)",
        lossy=True,
    )
    table_rows: str = entry(
        "auto",
        "WHERE",
        "where embedding tables are, of which a token needs a few rows: resident in memory, "
        "on disk, or auto: on disk where memory is short and they are large",
    )
    repack: str = entry(
        "auto",
        "WHEN",
        "bring weights into the layout of this processor's fastest kernels as they are read, as "
        "llama.cpp does when it loads: on, off, or auto: where nearly all experts stay in memory; "
        "where they do not, moe-gguf convert does it once for all",
    )
    device: str = entry(
        "cpu", "NAME", "where the model is computed: cpu, a GPU by ggml's name (cuda0), or auto"
    )
    device_memory: str | int = entry(
        "auto", "SIZE", "what the device may use: weights, KV cache, experts; auto: what is free"
    )
    gpu_layers: int | None = entry(
        None, "N|auto", "so many layers, the last ones, are the device's; auto: all"
    )
    cpu_experts: str = entry(
        "off",
        "WHICH",
        "experts of a device's layers that the processor computes: none (off), all, or auto: those "
        "that the device lacks, where that is measured to take less time than copying them; the "
        "output is then as exact as either's, and which experts they are depends on time",
    )
    warm: bool = entry(
        False, None, "fill memory first with what was popular in runs of trace --save-routing"
    )

    def __post_init__(self) -> None:
        from ..policies.presets import check_policy  # numpy comes with it, and help needs none

        if self.gpu_layers is not None and self.gpu_layers < 0:
            raise UserError(f"{self.gpu_layers} layers make no sense: give 0 or more, or auto")
        try:
            check_policy(self.policy)
        except ValueError as error:
            raise UserError(str(error)) from None
        if self.reads not in READ_MODES:
            raise UserError(f"{self.reads!r} is not a way to read: use {', '.join(READ_MODES)}")
        if self.table_rows not in TABLE_ROWS:
            raise UserError(
                f"{self.table_rows!r} is no place for tables: use {', '.join(TABLE_ROWS)}"
            )
        if self.cpu_experts not in CPU_EXPERTS:
            raise UserError(f"{self.cpu_experts!r} names no experts: use {', '.join(CPU_EXPERTS)}")
        if self.repack not in REPACK:
            raise UserError(f"{self.repack!r} does not say when: use {', '.join(REPACK)}")
        if self.lanes is not None and not 1 <= self.lanes <= MOST_LANES:
            raise UserError(f"{self.lanes} lanes make no sense: give 1 to {MOST_LANES}, or auto")
        if not 0.0 <= self.low_share <= 1.0:
            raise UserError(
                f"{option('low_share', self.low_share)} is out of range: give a share from 0 to 1"
            )

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(f.name for f in fields(cls))

    @classmethod
    def taken_from(cls, arguments: dict[str, Any]) -> Options:
        """The options among ``arguments``, which keeps all else."""
        return cls(**{name: arguments.pop(name) for name in cls.names() if name in arguments})

    def arguments(self) -> dict[str, Any]:
        """The options as ``Llama`` takes them."""
        return {name: getattr(self, name) for name in self.names()}

    def lossless(self) -> dict[str, Any]:
        """The lossy options as they are when nothing is lost."""
        return {f.name: f.default for f in fields(self) if f.metadata["entry"].lossy}

    def losses(self) -> dict[str, Any]:
        """The lossy options that were chosen."""
        off = self.lossless()
        return {name: getattr(self, name) for name in off if getattr(self, name) != off[name]}

    @property
    def precision(self) -> Precision:
        from ..policies.precision import Precision

        return Precision(self.low_share, self.low_on_miss)
