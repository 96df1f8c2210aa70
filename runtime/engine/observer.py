"""What hears of a context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...policies.base import Phase


class Observer:
    """Hears of all that changes what a context remembers, in order; by itself it does nothing."""

    def decoded(self, context: Any, phase: Phase, code: int) -> None:
        """The batch of a ``Context`` was computed, or refused or failed by llama.cpp with
        ``code``."""

    def removed(self, seq: int, start: int, end: int) -> None: ...
    def copied(self, source: int, target: int, end: int) -> None: ...
    def saved(self, seq: int, partial: bool, data: bytearray) -> None: ...
    def restored(self, seq: int, partial: bool, data: bytes | bytearray) -> None: ...
    def saved_file(self, seq: int, path: Path) -> None: ...
    def restored_file(self, seq: int, path: Path) -> None: ...
    def cleared(self) -> None: ...
