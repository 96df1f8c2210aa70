"""Where every byte of a model lies: experts by layer, the trunk, and the header llama.cpp is shown.

The only reader of offsets. Joins split sets and bundles, finds experts by shape instead of by an
allow-list of architectures, and writes the header of one complete GGUF that stands for all files.
Reads headers only. Knows no budget, no slots in use and no llama.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from .bundle import PREFIX, BundleTable
from .ggml_types import GGML_TYPES, pad_up, type_bytes
from .gguf_header import GgufHeader, TensorInfo, Value, ValueType
from .gguf_writer import encode_header, encode_pair

ROLES = ("gate", "up", "gate_up", "down")  # the order of a layer's tensors; others follow
PAGE = 4096
MAP_ALIGNMENT = 32  # ggml's TENSOR_ALIGNMENT
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"

EXPERT_NAME = re.compile(r"blk\.(\d+)\.(?:ffn_)?(.+)_exps\.(\w+)")
_LAYER_NAME = re.compile(r"blk\.(\d+)\.")
_ALIGNMENT = "general.alignment"


# --- the layout, as values ----------------------------------------------------------------------


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
    """A model ready to be opened: what it is, and where all of it lies.

    header and stream_bytes describe the stream: one GGUF with all tensors and no split, whose
    data nobody reads through it.
    """

    path: Path
    files: tuple[Path, ...]
    headers: tuple[GgufHeader, ...]
    metadata: GgufHeader  # the first file's: the one whose keys count
    architecture: str
    n_experts: int
    layers: tuple[MoeLayer, ...]
    tensors: tuple[PlacedTensor, ...]  # all, in stream order
    header: bytes
    stream_bytes: int
    table: BundleTable | None = None  # of a bundle

    # --- metadata ---

    def value(self, key: str) -> Value | None:
        """A key as it stands in the file; a key starting with a dot is the architecture's own."""
        return self.metadata.get(self.architecture + key if key.startswith(".") else key)

    def get_int(self, key: str, default: int = 0) -> int:
        """A whole number; of a per-layer list, the greatest."""
        value = self.value(key)
        if isinstance(value, tuple):
            return max((v for v in value if isinstance(v, int)), default=default)
        return value if isinstance(value, int) else default

    def get_float(self, key: str, default: float = 0.0) -> float:
        value = self.value(key)
        return float(value) if isinstance(value, int | float) else default

    def get_str(self, key: str, default: str = "") -> str:
        value = self.value(key)
        return value if isinstance(value, str) else default

    @property
    def name(self) -> str:
        return self.get_str("general.name") or self.path.stem

    @property
    def n_experts_used(self) -> int:
        """Experts per token; the greatest, where layers differ."""
        return self.get_int(".expert_used_count")

    @property
    def n_layers(self) -> int:
        return self.get_int(".block_count")

    @property
    def n_ctx_train(self) -> int:
        return self.get_int(".context_length")

    @property
    def n_vocab(self) -> int:
        pair = self.metadata.pairs.get("tokenizer.ggml.tokens")
        if pair is not None:
            return pair.count
        return self.get_int(".vocab_size")

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
        """Everything that is not a routed expert."""
        return sum(t.n_bytes for t in self.tensors) - self.expert_bytes

    @property
    def trunk(self) -> list[PlacedTensor]:
        experts = {t.name for layer in self.layers for t in layer.tensors}
        return [t for t in self.tensors if t.name not in experts]


@dataclass(frozen=True)
class SlotLayout:
    """Where the pieces of an expert go inside a slot, so that direct reads land in place.

    Slots are slot_bytes apart and start at multiples of PAGE (and of align).
    """

    slot_bytes: int
    align: int
    offsets: Mapping[tuple[int, int], tuple[int, ...]]  # by (layer, copy): of each piece

    def matrix(self, layer: MoeLayer, copy: int, tensor: int) -> int:
        """Where one matrix of an expert lies in its slot."""
        offsets = self.offsets[layer.layer, copy]
        for piece, at in zip(layer.copies[copy].pieces, offsets, strict=True):
            for index, place in piece.matrices:
                if index == tensor:
                    return at + place
        raise AssertionError("a layer's pieces hold all of its matrices")


def architecture_of(header: GgufHeader) -> str:
    architecture = header.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise UserError(f"{header.path} names no general.architecture; convert the model again")
    return architecture


# Types no llama.cpp kernel takes as a weight: it aborts or calls a null pointer. Token tables
# (hash routing in deepseek4, draft vocabularies) are looked up, not multiplied, and are fine.
_NO_WEIGHT = {"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"}
_LOOKUPS = re.compile(r"blk\.\d+\.ffn_gate_tid2eid\.weight|d2t|t2d")


def check_types(path: Path, infos: Iterable[TensorInfo]) -> None:
    for info in infos:
        kind = GGML_TYPES[info.ggml_type].name
        if kind in _NO_WEIGHT and not (kind in ("I32", "I64") and _LOOKUPS.fullmatch(info.name)):
            raise UserError(
                f"{path}: tensor {info.name} is {kind}, which llama.cpp cannot compute"
                " with; convert the model to F32, F16, BF16 or a quantised type"
            )


def expert_tensor(name: str, ne: tuple[int, int, int], ggml_type: int) -> ExpertTensor:
    match = EXPERT_NAME.fullmatch(name)
    assert match is not None
    role = match[2] if match[3] == "weight" else f"{match[2]}.{match[3]}"
    n_bytes = type_bytes(ggml_type, ne[0] * ne[1])
    return ExpertTensor(name, int(match[1]), role, ggml_type, ne, n_bytes)


def role_order(tensor: ExpertTensor) -> tuple[int, str]:
    role = tensor.role
    return ROLES.index(role) if role in ROLES else len(ROLES), role


# --- the stream ---------------------------------------------------------------------------------


def stream_header(first: GgufHeader, infos: Sequence[TensorInfo]) -> tuple[bytes, int]:
    """The header that stands for all files, and the size of the GGUF it describes.

    Keys are the first file's, byte for byte, less those that speak of files. The alignment is
    raised to what llama.cpp asks of a file it maps.
    """
    alignment = max(first.alignment, MAP_ALIGNMENT)
    dropped = ("split.", PREFIX)
    keys = [key for key in first.pairs if not key.startswith(dropped) and key != _ALIGNMENT]
    pairs = [first.raw(key) for key in keys]
    pairs.append(encode_pair(_ALIGNMENT, ValueType.UINT32, alignment))
    offset, placed = 0, []
    for info in infos:
        placed.append(TensorInfo(info.name, info.ne, info.ggml_type, offset))
        offset += pad_up(info.n_bytes, alignment)
    header = encode_header(pairs, placed, alignment)
    return header, len(header) + offset


def untied(layout: ModelLayout) -> ModelLayout:
    """The model with its output matrix spelled out, read from where its token embedding lies.

    The same where it has one of its own, and for an encoder, which ends without.
    """
    tensors = {tensor.name: tensor for tensor in layout.tensors}
    embedding = tensors.get(EMBEDDING)
    if embedding is None or OUTPUT in tensors or layout.value(".attention.causal") is False:
        return layout
    both = (*layout.tensors, replace(embedding, name=OUTPUT))
    infos = [TensorInfo(t.name, t.ne, t.ggml_type, 0) for t in both]
    header, stream_bytes = stream_header(layout.metadata, infos)
    return replace(layout, tensors=both, header=header, stream_bytes=stream_bytes)


def tensors_of(headers: Sequence[GgufHeader]) -> Iterator[PlacedTensor]:
    for file, header in enumerate(headers):
        for info in header.tensors:
            offset = header.data_start + info.offset
            yield PlacedTensor(info.name, info.ne, info.ggml_type, file, offset, info.n_bytes)


# --- slots --------------------------------------------------------------------------------------


def slot_layout(layout: ModelLayout, align: int) -> SlotLayout:
    """Place the pieces of every layer's experts in a slot for direct reads of this alignment.

    A direct read starts and ends at multiples of align, so it writes up to align - 1 bytes on
    either side of what was asked for: each piece keeps at least align bytes clear before and
    behind it. A piece has its file offset's remainder (expert 0's: others share it where
    their distance is a multiple of align), so that bytes land where they are used.
    """
    assert align >= 1
    assert align & (align - 1) == 0
    offsets: dict[tuple[int, int], tuple[int, ...]] = {}
    need = 0
    for layer in layout.layers:
        for i, copy in enumerate(layer.copies):
            at, places = align, []
            for piece in copy.pieces:
                at += (int(piece.offset[0]) - at) % align
                places.append(at)
                at += piece.n_bytes + align
            offsets[layer.layer, i] = tuple(places)
            need = max(need, at)
    return SlotLayout(pad_up(need, max(align, PAGE)), align, offsets)
