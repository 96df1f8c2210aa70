"""What a context remembers of its sequences: the KV cache, a recurrent state, or both.

Thin over llama.cpp's memory functions. Knows cells and positions, not requests.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from .observer import Observer

_PARTIAL = 1  # LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY


class Memory:
    """The memory of one llama_context, which outlives it; only to be used between two steps."""

    def __init__(self, ctx: Any, observer: Observer | None = None) -> None:
        self._ctx = ctx
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

    def state_bytes(self, seq: int, partial: bool = False) -> int:
        """What ``save`` would return."""
        flags = _PARTIAL if partial else 0
        return int(llama_cpp.llama_state_seq_get_size_ext(self._ctx, seq, flags))

    def save(self, seq: int, partial: bool = False) -> bytearray:
        """A copy of what is remembered of a sequence; ``partial``: only of that which cannot be
        rolled back, a recurrent state or a sliding window."""
        data = bytearray(self.state_bytes(seq, partial))
        flags = _PARTIAL if partial else 0
        got = llama_cpp.llama_state_seq_get_data_ext(self._ctx, _over(data), len(data), seq, flags)
        assert got == len(data), "llama.cpp announced another size of a state"
        if self._observer is not None:
            self._observer.saved(seq, partial, data)
        return data

    def restore(self, seq: int, data: bytes | bytearray, partial: bool = False) -> bool:
        """Put what ``save`` returned in the place of what is remembered of a sequence; of any other
        bytes nobody knows what comes. False where there is no room: then nothing is remembered."""
        flags = _PARTIAL if partial else 0
        # Its log is not captured here: that is the process's, and this is one thread of several.
        got = llama_cpp.llama_state_seq_set_data_ext(self._ctx, _over(data), len(data), seq, flags)
        if self._observer is not None:
            self._observer.restored(seq, partial, data)
        return bool(got == len(data))

    def save_file(self, seq: int, path: Path, tokens: Sequence[int]) -> None:
        """``save`` to one of llama.cpp's files, with the sequence's tokens; takes no memory."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        name = str(path).encode(errors="surrogateescape")
        if not llama_cpp.llama_state_seq_save_file(self._ctx, name, seq, array, len(tokens)):
            raise OSError("llama.cpp could not write it")
        if self._observer is not None:
            self._observer.saved_file(seq, path)

    def restore_file(self, seq: int, path: Path, n_tokens: int) -> bool:
        """``restore`` from a file that ``save_file`` wrote; what follows in it does not matter."""
        array, n = (llama_cpp.llama_token * n_tokens)(), ctypes.c_size_t()
        name = str(path).encode(errors="surrogateescape")
        got = llama_cpp.llama_state_seq_load_file(
            self._ctx, name, seq, array, n_tokens, ctypes.byref(n)
        )
        if self._observer is not None:
            self._observer.restored_file(seq, path)
        return bool(got)

    def first(self, seq: int) -> int:
        """The oldest position that is remembered of a sequence; -1 if there is none."""
        return int(llama_cpp.llama_memory_seq_pos_min(self._memory, seq))

    def last(self, seq: int) -> int:
        """The newest position of a sequence; -1 if there is none."""
        return int(llama_cpp.llama_memory_seq_pos_max(self._memory, seq))


def _over(data: bytes | bytearray) -> Any:
    """The bytes as an array of ctypes, for as long as they live. Not by ``ctypes.cast``: of the
    cycle that it makes a state would stay until the garbage collector comes by."""
    return (ctypes.c_uint8 * len(data)).from_address(np.frombuffer(data, np.uint8).ctypes.data)
