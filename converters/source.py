"""What `convert` reads from: one checkpoint, whatever its format, as metadata and tensors.

A source hands out bytes in ggml's own order and types, a slice at a time, so that nobody ever
holds more than a few experts. It knows nothing of bundles or of what becomes of the bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from gguf import GGUFValueType
from numpy.typing import NDArray

from ..runtime.formats.gguf_header import Value
from ..runtime.formats.keys import Keys

ARCHITECTURE = "general.architecture"

Bytes = NDArray[np.uint8]


# How much of a source may pass before its pages are given back.
FORGET_BYTES = 128 << 20


def forget(fds: Iterable[int]) -> None:
    """Give back the pages of these files that are on disk: a checkpoint that passes through the
    system's cache would push out everything else.

    Of whole files, because a range leaves those large pages behind that reach beyond it.
    """
    if hasattr(os, "posix_fadvise"):
        for fd in fds:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


@dataclass(frozen=True)
class Pair:
    """The value of one metadata key, as gguf's writer takes it."""

    value: Any
    kind: GGUFValueType
    item: GGUFValueType | None = None  # of an array


@dataclass(frozen=True)
class SourceTensor:
    """One tensor that is not a routed expert.

    ``ne`` is in ggml's order, row length first; a row is ``ne[0]`` items. ``read(first, n)`` gives
    the bytes of rows [first, first + n) over all higher dimensions taken together.
    """

    name: str
    ne: tuple[int, ...]
    ggml_type: int
    read: Callable[[int, int], Bytes]


@dataclass(frozen=True)
class ExpertStack:
    """The experts of one role in one layer, matrices of ``ne0 x ne1``.

    ``read(expert, first, n)`` gives the bytes of rows [first, first + n) of one.

    ``name`` is the stacked tensor's name in a stock GGUF (``blk.3.ffn_gate_exps.weight``), ``role``
    what it is called inside a blob (gate, up, gate_up, down).
    """

    name: str
    layer: int
    role: str
    ne: tuple[int, int]
    ggml_type: int
    read: Callable[[int, int, int], Bytes]


class Source(Protocol):
    """A checkpoint. Faults of it are UserError, at opening or from any ``read``."""

    name: str
    notes: Sequence[str]  # what of its files was left out, a sentence each
    n_bytes: int  # of all files, for the bundle's identity
    sha256: str  # of everything that describes the weights (headers, configuration), not of them
    n_experts: int
    metadata: Mapping[str, Pair]  # in order; without the keys of split sets and of alignment
    trunk: Sequence[SourceTensor]
    experts: Sequence[ExpertStack]  # by layer, then gate, up, gate_up, down

    def forget(self) -> None:
        """What was read so far need not stay in the system's cache."""

    def close(self) -> None: ...


def keys_of(source: Source) -> Keys:
    """The metadata, typed; a key that starts with a dot is the architecture's own."""

    def get(key: str) -> Value | None:
        pair = source.metadata.get(key)
        value = pair.value if pair else None
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if isinstance(value, bytes):
            return value.decode("utf-8", "replace")
        return tuple(value) if isinstance(value, list) else value

    mend = "download it again"
    architecture = Keys(source.name, get, mend).text(ARCHITECTURE)
    return Keys(source.name, get, mend, architecture)
