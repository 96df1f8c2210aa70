"""The tokens that llama.cpp's samplers choose among, as an array numpy and llama.cpp both see.

Owns the memory, once per thread and not per sequence: with 150,000 tokens it is 1.8 MB. Knows no
sampler.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data


class Candidates:
    """Room for ``n`` tokens with their logits."""

    def __init__(self, n: int) -> None:
        self.n = n
        self._data = np.zeros(n, _DATA)
        self._ids = np.arange(n, dtype=np.int32)
        self._pointer = self._data.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token_data))
        self._array = llama_cpp.llama_token_data_array()
        self._begin(n)

    def fill(self, logits: npt.NDArray[np.float32]) -> None:
        """Every token, in the order of their numbers."""
        self._begin(self.n)
        self._data["id"] = self._ids
        self._data["logit"] = logits

    def only(self, token: int) -> None:
        """One token."""
        self._begin(1)
        self._data[0] = token, 1.0, 0.0

    def _begin(self, n: int) -> None:
        array = self._array
        array.data = self._pointer  # XTC moves it to leave out the first
        array.size, array.selected, array.sorted = n, -1, False

    @property
    def logits(self) -> npt.NDArray[np.float32]:
        """To read and to change, in the order they were filled in; not behind a chain, which may
        sort them and leave some out."""
        logits: npt.NDArray[np.float32] = self._data["logit"][: self._array.size]
        return logits

    def apply(self, sampler: Any) -> None:
        """Let a llama_sampler work on them; without the GIL."""
        llama_cpp.llama_sampler_apply(sampler, ctypes.byref(self._array))

    def selected(self) -> tuple[int, float]:
        """The token that the last sampler of a chain chose, and what became of its logit."""
        chosen = self._array.data[self._array.selected]
        return int(chosen.id), float(chosen.logit)


_THREAD = threading.local()


def candidates(n: int) -> Candidates:
    """This thread's own, to be filled; valid until the thread asks again."""
    kept: Candidates | None = getattr(_THREAD, "kept", None)
    if kept is None or kept.n != n:
        kept = _THREAD.kept = Candidates(n)
    return kept
