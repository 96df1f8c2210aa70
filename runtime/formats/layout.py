"""Where every byte of a model lies, as values: experts by layer, and the trunk.

Stock files (layout_gguf.py) and bundles (layout_bundle.py) are laid out in the same values, so that
whoever reads a model need not know which it is. This file knows no budget, no slots in use and no
llama.cpp, and it reads nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from .bundle import BundleTable
from .drafts import first_draft, is_draft
from .ggml_types import type_bytes
from .gguf_header import GgufHeader
from .keys import Keys

ROLES = ("gate", "up", "gate_up", "down")  # the order of a layer's tensors; others follow
MEND = "download or convert the model again"
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"

EXPERT_NAME = re.compile(r"blk\.(\d+)\.(?:ffn_)?(.+)_exps\.(\w+)")


@dataclass(frozen=True)
class PlacedTensor:
    """One tensor of the model and where it lies on disk."""

    name: str
    ne: tuple[int, ...]
    ggml_type: int
    file: int  # NOWHERE: stacked experts of a bundle, which lie apart
    offset: int  # in that file
    n_bytes: int


NOWHERE = -1


@dataclass(frozen=True)
class ExpertTensor:
    """The stacked experts of one role, as llama.cpp sees them."""

    name: str
    layer: int
    role: str  # one of ROLES, or the name's own suffix
    ggml_type: int
    ne: tuple[int, int, int]  # the last is the number of experts
    expert_bytes: int


@dataclass(frozen=True, eq=False)
class Piece:
    """What one read brings of an expert: expert e's lies at offset[e] of file[e]."""

    file: NDArray[np.int32]
    offset: NDArray[np.int64]
    n_bytes: int
    matrices: tuple[tuple[int, int], ...]  # (index among the layer's tensors, place in the piece)


@dataclass(frozen=True, eq=False)
class Copy:
    """A stored copy of a layer's experts. ``types`` and ``layouts`` are per tensor."""

    types: tuple[int, ...]
    layouts: tuple[str, ...]  # PLAIN, or the name of a kernel's layout
    pieces: tuple[Piece, ...]

    @property
    def n_bytes(self) -> int:
        """What reading one expert brings, padding inside a blob included."""
        return sum(piece.n_bytes for piece in self.pieces)


@dataclass(frozen=True, eq=False)
class MoeLayer:
    """A layer that routes: what one of its experts is made of, and where."""

    layer: int
    tensors: tuple[ExpertTensor, ...]  # in the order of ROLES
    copies: tuple[Copy, ...]  # as llama.cpp sees them, and perhaps in fewer bits

    @property
    def blob_bytes(self) -> int:
        """One expert's bytes on disk."""
        return self.copies[0].n_bytes


@dataclass(frozen=True)
class ModelLayout:
    """A model ready to be opened: what it is, and where all of it lies."""

    path: Path
    files: tuple[Path, ...]
    headers: tuple[GgufHeader, ...]
    architecture: str
    n_experts: int
    layers: tuple[MoeLayer, ...]
    tensors: tuple[PlacedTensor, ...]  # all, in stream order
    table: BundleTable | None = None  # of a bundle

    # --- metadata ---

    @property
    def metadata(self) -> GgufHeader:
        """The first file's header: the one whose keys count."""
        return self.headers[0]

    @property
    def keys(self) -> Keys:
        """The metadata, typed; a key that starts with a dot is the architecture's own."""
        return Keys(self.path, self.metadata.get, MEND, self.architecture)

    @property
    def name(self) -> str:
        return self.keys.text("general.name", "") or self.path.stem

    @property
    def n_experts_used(self) -> int:
        """Experts per token; the greatest, where layers differ."""
        return max(self.keys.integers(".expert_used_count"))

    @property
    def n_layers(self) -> int:
        return self.keys.integer(".block_count")

    @property
    def n_ctx_train(self) -> int:
        return self.keys.integer(".context_length")

    @property
    def n_vocab(self) -> int:
        pair = self.metadata.pairs.get("tokenizer.ggml.tokens")
        return self.keys.integer(".vocab_size", default=0) if pair is None else pair.count

    # --- sizes ---

    @property
    def file_bytes(self) -> int:
        """All files together."""
        n_bytes = sum(header.file_bytes for header in self.headers)
        if self.table is not None:
            for blobs in (self.table.experts, self.table.low):
                n_bytes += sum(blobs.file_bytes) if blobs is not None else 0
        return n_bytes

    @property
    def expert_bytes(self) -> int:
        """All experts of all layers."""
        return sum(t.expert_bytes for layer in self.layers for t in layer.tensors) * self.n_experts

    @property
    def trunk_bytes(self) -> int:
        """Everything that llama.cpp keeps in memory: all but routed experts and draft layers."""
        return sum(t.n_bytes for t in self.trunk)

    @property
    def trunk(self) -> list[PlacedTensor]:
        experts = {t.name for layer in self.layers for t in layer.tensors}
        drafts = {t.name for t in self.drafts}
        return [t for t in self.tensors if t.name not in experts and t.name not in drafts]

    @property
    def drafts(self) -> list[PlacedTensor]:
        """Tensors of draft layers, their experts too: in the file and not in the graph."""
        first = first_draft(self.metadata, self.architecture, (t.name for t in self.tensors))
        return [t for t in self.tensors if is_draft(t.name, first)]


def architecture_of(header: GgufHeader) -> str:
    architecture = header.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise UserError(f"{header.path} names no general.architecture; convert the model again")
    return architecture


def expert_tensor(name: str, ne: tuple[int, int, int], ggml_type: int) -> ExpertTensor:
    match = EXPERT_NAME.fullmatch(name)
    assert match is not None
    role = match[2] if match[3] == "weight" else f"{match[2]}.{match[3]}"
    n_bytes = type_bytes(ggml_type, ne[0] * ne[1])
    return ExpertTensor(name, int(match[1]), role, ggml_type, ne, n_bytes)


def role_order(tensor: ExpertTensor) -> tuple[int, str]:
    role = tensor.role
    return ROLES.index(role) if role in ROLES else len(ROLES), role


def untied(layout: ModelLayout) -> ModelLayout:
    """The model with its output matrix spelled out, read from where its token embedding lies.

    The same where it has one of its own, and for an encoder, which ends without.
    """
    tensors = {tensor.name: tensor for tensor in layout.tensors}
    embedding = tensors.get(EMBEDDING)
    if embedding is None or OUTPUT in tensors or layout.keys.value(".attention.causal") is False:
        return layout
    return replace(layout, tensors=(*layout.tensors, replace(embedding, name=OUTPUT)))


def tensors_of(headers: Sequence[GgufHeader]) -> Iterator[PlacedTensor]:
    for file, header in enumerate(headers):
        for info in header.tensors:
            offset = header.data_start + info.offset
            yield PlacedTensor(info.name, info.ne, info.ggml_type, file, offset, info.n_bytes)
