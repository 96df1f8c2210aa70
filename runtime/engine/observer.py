"""What hears of a context."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...policies.base import Phase

if TYPE_CHECKING:
    from .context import Context


class Observer:
    """Hears of all that changes what a context remembers, in order; by itself it does nothing."""

    def decoded(self, context: Context, phase: Phase, code: int) -> None:
        """The context's batch was computed, or refused or failed by llama.cpp with ``code``."""

    def removed(self, seq: int, start: int, end: int) -> None: ...
    def copied(self, source: int, target: int, end: int) -> None: ...
    def saved(self, seq: int, partial: bool, data: bytearray) -> None: ...
    def restored(self, seq: int, partial: bool, data: bytes | bytearray) -> None: ...
    def saved_file(self, seq: int, path: Path) -> None: ...
    def restored_file(self, seq: int, path: Path) -> None: ...
    def cleared(self) -> None: ...
