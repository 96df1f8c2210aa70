"""What a context remembers of its sequences: the KV cache, a recurrent state, or both.

Thin over llama.cpp's memory functions. Knows cells and positions, not requests.
"""

from __future__ import annotations

from typing import Any

import llama_cpp

from .context import Observer


class Memory:
    """The memory of one llama_context, which outlives it; only to be used between two steps."""

    def __init__(self, ctx: Any, observer: Observer | None = None) -> None:
        self._memory = llama_cpp.llama_get_memory(ctx)
        self._observer = observer

    def clear(self) -> None:
        """Forget every sequence."""
        llama_cpp.llama_memory_clear(self._memory, False)
        if self._observer is not None:
            self._observer.cleared()

    def remove(self, seq: int, start: int = -1, end: int = -1) -> bool:
        """Forget positions [start, end) of a sequence; -1: without a bound.

        False where this kind of memory cannot: a recurrent state is whole or nothing. True says
        nothing of a sliding window, in which older positions are gone already.
        """
        done = bool(llama_cpp.llama_memory_seq_rm(self._memory, seq, start, end))
        if self._observer is not None:
            self._observer.removed(seq, start, end)
        return done

    def copy(self, source: int, target: int, end: int = -1) -> None:
        """Let ``target`` share the first ``end`` positions of ``source``. Of a unified cache."""
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, -1, end)
        if self._observer is not None:
            self._observer.copied(source, target, end)

    def first(self, seq: int) -> int:
        """The oldest position that is remembered of a sequence; -1 if there is none."""
        return int(llama_cpp.llama_memory_seq_pos_min(self._memory, seq))

    def last(self, seq: int) -> int:
        """The newest position of a sequence; -1 if there is none."""
        return int(llama_cpp.llama_memory_seq_pos_max(self._memory, seq))
