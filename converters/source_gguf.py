"""A GGUF file, or a split set of them, as a source: bytes as they lie, nothing decoded.

Where they lie is the layout's affair; this owns the open files.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType

from ..runtime.errors import UserError, reason
from ..runtime.formats.ggml_types import type_bytes
from ..runtime.formats.gguf_header import GgufHeader, KeyValue, ValueType
from ..runtime.formats.layout import ExpertTensor, PlacedTensor
from ..runtime.formats.open import read_layout
from ..runtime.text import well_formed
from .source import Bytes, ExpertStack, Pair, SourceTensor, forget

_LEFT_OUT = ("split.", "general.alignment")  # what speaks of the files, not of the model


class GgufSource:
    """Any MoE GGUF. UserError for one that cannot be run, as when opening it to run."""

    def __init__(self, path: Path) -> None:
        layout = read_layout(path)
        self.name = well_formed(path.name)
        self.notes: Sequence[str] = ()
        self.n_bytes = sum(header.file_bytes for header in layout.headers)
        self.n_experts = layout.n_experts
        self.sha256 = _hash(layout.headers)
        self.metadata: Mapping[str, Pair] = _metadata(layout.metadata)
        self._files = [os.open(file, os.O_RDONLY | os.O_CLOEXEC) for file in layout.files]
        self._paths = layout.files
        tensors = {tensor.name: tensor for tensor in layout.tensors}
        self.experts: Sequence[ExpertStack] = [
            self._stack(expert, tensors.pop(expert.name))
            for layer in layout.layers
            for expert in layer.tensors
        ]
        self.trunk: Sequence[SourceTensor] = [
            SourceTensor(t.name, t.ne, t.ggml_type, partial(self._read_rows, t))
            for t in tensors.values()
        ]

    def forget(self) -> None:
        forget(self._files)

    def close(self) -> None:
        while self._files:
            os.close(self._files.pop())

    def _stack(self, e: ExpertTensor, t: PlacedTensor) -> ExpertStack:
        def read(expert: int, first: int, n: int) -> Bytes:
            return self._read_rows(t, expert * e.ne[1] + first, n)

        return ExpertStack(e.name, e.layer, e.role, e.ne[:2], e.ggml_type, read)

    def _read_rows(self, tensor: PlacedTensor, first: int, n_rows: int) -> Bytes:
        row = type_bytes(tensor.ggml_type, tensor.ne[0])
        return self._read(tensor.file, tensor.offset + first * row, n_rows * row)

    def _read(self, file: int, offset: int, n_bytes: int) -> Bytes:
        """Reads, not a mapping: the pages of one would count as memory of this process."""
        out = np.empty(n_bytes, np.uint8)
        done = 0
        try:
            while done < n_bytes:
                n = os.preadv(self._files[file], [out.data[done:]], offset + done)
                if n == 0:
                    raise UserError(
                        f"{self._paths[file]} became shorter while it was read; start again"
                        " when nothing writes to it"
                    )
                done += n
        except OSError as error:
            raise UserError(
                f"cannot read {self._paths[file]} ({reason(error)}); check the disk"
            ) from error
        return out


def _hash(headers: Sequence[GgufHeader]) -> str:
    """Of everything before the data of each file."""
    digest = hashlib.sha256()
    for header in headers:
        digest.update(header.content)
    return digest.hexdigest()


def _metadata(header: GgufHeader) -> dict[str, Pair]:
    return {
        key: _pair(header, pair)
        for key, pair in header.pairs.items()
        if not key.startswith(_LEFT_OUT)
    }


def _pair(header: GgufHeader, pair: KeyValue) -> Pair:
    """Strings stay bytes: vocabularies hold some that are no UTF-8."""
    value: Any
    if pair.kind is ValueType.STRING:
        value = bytes(header.payload(pair.key)[8:])  # behind its length
    elif pair.item is ValueType.STRING:
        value = header.strings(pair.key)
    else:
        value = header.get(pair.key)
    item = None if pair.item is None else GGUFValueType(pair.item)
    return Pair(value, GGUFValueType(pair.kind), item)
