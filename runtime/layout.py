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

from moe_gguf.runtime.bundle import (
    BLOB_ALIGNMENT,
    PLAIN,
    PREFIX,
    TRUNK,
    BlobSet,
    BundleTable,
    is_bundle,
)
from moe_gguf.runtime.errors import UserError, reason
from moe_gguf.runtime.gguf_header import (
    GGML_TYPES,
    MAX_NAME_BYTES,
    GgufHeader,
    TensorInfo,
    Value,
    ValueType,
    pad_up,
    read_header,
    type_bytes,
)
from moe_gguf.runtime.gguf_writer import encode_header, encode_pair

ROLES = ("gate", "up", "gate_up", "down")  # the order of a layer's tensors; others follow
PAGE = 4096
MAP_ALIGNMENT = 32  # ggml's TENSOR_ALIGNMENT
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"

_EXPERT_NAME = re.compile(r"blk\.(\d+)\.(?:ffn_)?(.+)_exps\.(\w+)")
_SINGLE_EXPERT_NAME = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.\d+\.weight")
_LAYER_NAME = re.compile(r"blk\.(\d+)\.")
_SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_ALIGNMENT = "general.alignment"
_SPLIT_COUNT, _SPLIT_NO, _SPLIT_TENSORS = "split.count", "split.no", "split.tensors.count"


# --- the layout, as values ----------------------------------------------------------------------


@dataclass(frozen=True)
class Tensor:
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
    tensors: tuple[Tensor, ...]  # all, in stream order
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
    def trunk(self) -> list[Tensor]:
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


# --- reading ------------------------------------------------------------------------------------


def read_layout(path: Path) -> ModelLayout:
    """Lay out the model that starts in this file, or is this bundle; every fault is a UserError.

    What comes back was validated: llama.cpp can be given its stream.
    """
    from moe_gguf.runtime.validate import validate

    layout = _read_bundle(path) if path.is_dir() else _read_gguf(path)
    validate(layout)
    return layout


def _read_gguf(path: Path) -> ModelLayout:
    headers = _read_set(path)
    first = headers[0]
    for header in headers:
        _check_types(header.path, header.tensors)
    architecture = _architecture(first)
    n_experts = first.get(f"{architecture}.expert_count")
    layers = _find_experts(headers, n_experts if type(n_experts) is int else 0)
    if not layers or type(n_experts) is not int:
        raise _no_experts(path, architecture, headers)
    stream_header, stream_bytes = _stream(first, [i for h in headers for i in h.tensors])
    return ModelLayout(
        path=path,
        files=tuple(h.path for h in headers),
        headers=headers,
        metadata=first,
        architecture=architecture,
        n_experts=n_experts,
        layers=layers,
        tensors=tuple(_tensors(headers)),
        header=stream_header,
        stream_bytes=stream_bytes,
    )


def _architecture(header: GgufHeader) -> str:
    architecture = header.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise UserError(f"{header.path} names no general.architecture; convert the model again")
    return architecture


def _read_set(path: Path) -> tuple[GgufHeader, ...]:
    """The headers of a file and of its split siblings, first to last."""
    first = read_header(path)
    count = first.get(_SPLIT_COUNT)
    if count is None or count in (0, 1):
        return (first,)
    if type(count) is not int or not 1 < count < 1 << 16:
        raise UserError(f"{path} is damaged ({_SPLIT_COUNT} is {count}); download it again")
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise UserError(
            f"{path} is one of {count} files of a split model and must be named like"
            f" name-00001-of-{count:05}.gguf; give it its name back"
        )
    paths = [path.with_name(f"{match[1]}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    if first.get(_SPLIT_NO) != 0 or paths[0].name != path.name:
        raise UserError(f"{path} is not the first file of its split set; open {paths[0]}")
    headers = [first]
    for i, sibling in enumerate(paths[1:], 1):
        if not sibling.exists():
            raise UserError(
                f"{sibling} is missing: the model is split over {count} files; download all of them"
            )
        header = read_header(sibling)
        if header.get(_SPLIT_NO) != i or header.get(_SPLIT_COUNT) != count:
            raise UserError(
                f"{sibling} is not file {i + 1} of this split set, as its name says;"
                " download it again"
            )
        headers.append(header)
    _check_set(first, headers)
    return tuple(headers)


def _check_set(first: GgufHeader, headers: Sequence[GgufHeader]) -> None:
    home: dict[str, GgufHeader] = {}
    for header in headers:
        for info in header.tensors:
            if info.name in home:
                raise UserError(
                    f"{header.path} and {home[info.name].path} both hold tensor {info.name};"
                    " download the split set again"
                )
            home[info.name] = header
    n_tensors = first.get(_SPLIT_TENSORS)
    if n_tensors != len(home):
        raise UserError(
            f"{first.path} promises {n_tensors} tensors but its split set holds {len(home)};"
            " download all of its files again"
        )


# Types no llama.cpp kernel takes as a weight: it aborts or calls a null pointer. Token tables
# (hash routing in deepseek4, draft vocabularies) are looked up, not multiplied, and are fine.
_NO_WEIGHT = {"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"}
_LOOKUPS = re.compile(r"blk\.\d+\.ffn_gate_tid2eid\.weight|d2t|t2d")


def _check_types(path: Path, infos: Iterable[TensorInfo]) -> None:
    for info in infos:
        kind = GGML_TYPES[info.ggml_type].name
        if kind in _NO_WEIGHT and not (kind in ("I32", "I64") and _LOOKUPS.fullmatch(info.name)):
            raise UserError(
                f"{path}: tensor {info.name} is {kind}, which llama.cpp cannot compute"
                " with; convert the model to F32, F16, BF16 or a quantised type"
            )


def _find_experts(headers: Sequence[GgufHeader], n_experts: int) -> tuple[MoeLayer, ...]:
    found: dict[int, list[tuple[ExpertTensor, int, int]]] = {}
    for file, header in enumerate(headers):
        for info in header.tensors:
            match = _EXPERT_NAME.fullmatch(info.name)
            shape = info.ne[:3] if info.ne[3:] in ((), (1,)) else ()
            if match is None or len(shape) != 3 or shape[2] != n_experts:
                continue
            expert = _expert_tensor(info.name, (shape[0], shape[1], shape[2]), info.ggml_type)
            place = (expert, file, header.data_start + info.offset)
            found.setdefault(expert.layer, []).append(place)
    layers = []
    for number in sorted(found):
        places = sorted(found[number], key=lambda place: _role_order(place[0]))
        tensors = tuple(tensor for tensor, _, _ in places)
        pieces = tuple(
            Piece(
                np.full(n_experts, file, np.int32),
                offset + np.arange(n_experts, dtype=np.int64) * tensor.expert_bytes,
                tensor.expert_bytes,
                ((i, 0),),
            )
            for i, (tensor, file, offset) in enumerate(places)
        )
        copy = Copy(tuple(t.ggml_type for t in tensors), (PLAIN,) * len(tensors), pieces)
        layers.append(MoeLayer(number, tensors, (copy,)))
    return tuple(layers)


def _expert_tensor(name: str, ne: tuple[int, int, int], ggml_type: int) -> ExpertTensor:
    match = _EXPERT_NAME.fullmatch(name)
    assert match is not None
    role = match[2] if match[3] == "weight" else f"{match[2]}.{match[3]}"
    n_bytes = type_bytes(ggml_type, ne[0] * ne[1])
    return ExpertTensor(name, int(match[1]), role, ggml_type, ne, n_bytes)


def _role_order(tensor: ExpertTensor) -> tuple[int, str]:
    role = tensor.role
    return ROLES.index(role) if role in ROLES else len(ROLES), role


def _no_experts(path: Path, architecture: str, headers: Iterable[GgufHeader]) -> UserError:
    names = [info.name for header in headers for info in header.tensors]
    if not names:
        return UserError(f"{path} holds no tensors, only metadata; give a file with the weights")
    if any(_SINGLE_EXPERT_NAME.fullmatch(name) for name in names):
        return UserError(
            f"{path} keeps each expert in a tensor of its own, a form llama.cpp dropped;"
            " convert the model again"
        )
    stacked = next((name for name in names if _EXPERT_NAME.fullmatch(name)), None)
    if stacked is not None:
        return UserError(
            f"{path} is damaged ({stacked} does not have {architecture}.expert_count experts);"
            " download or convert it again"
        )
    return UserError(f"{path} is a dense model: nothing to offload, use llama.cpp")


# --- bundles ------------------------------------------------------------------------------------


def _read_bundle(path: Path) -> ModelLayout:
    """The layout a bundle's table gives, once everything it claims is possible."""
    if not is_bundle(path):
        raise UserError(
            f"{path} is a folder without {TRUNK}: give a GGUF file or a finished bundle, or run "
            "moe-gguf convert again, which resumes"
        )
    trunk = read_header(path / TRUNK)
    table = BundleTable.parse(trunk)
    architecture = _architecture(trunk)
    n_experts = trunk.get(f"{architecture}.expert_count")
    if type(n_experts) is not int or n_experts < 1:
        raise _damaged(trunk, f"{architecture}.expert_count is {n_experts}")
    sets = [table.experts, *([table.low] if table.low else [])]
    first_file = [1, 1 + len(table.experts.files)]
    files = (trunk.path, *(path / name for blobs in sets for name in blobs.files))
    for name in (name for blobs in sets for name in blobs.files):
        if Path(name).name != name:
            raise _damaged(trunk, f"it names the file {name!r:.60} outside the bundle")
    for file, n_bytes in zip(
        files[1:], (n for blobs in sets for n in blobs.file_bytes), strict=True
    ):
        _check_size(file, n_bytes)
    for tensor in (tensor for blobs in sets for tensor in blobs.tensors):
        kind = GGML_TYPES.get(tensor.ggml_type)
        named = _EXPERT_NAME.fullmatch(tensor.name) and len(tensor.name) <= MAX_NAME_BYTES
        if not named or kind is None or min(tensor.ne) < 1 or tensor.ne[0] % kind.block:
            raise _damaged(trunk, f"{tensor.name!r:.60} has an impossible name, type or shape")
    infos = [TensorInfo(t.name, (*t.ne, n_experts), t.ggml_type, 0) for t in table.experts.tensors]
    _check_types(trunk.path, [*trunk.tensors, *infos])
    copies = [
        _copies(trunk, blobs, table.layers, n_experts, at)
        for blobs, at in zip(sets, first_file, strict=False)
    ]
    layers = tuple(
        MoeLayer(number, copies[0][i][0], tuple(each[i][1] for each in copies))
        for i, number in enumerate(table.layers)
    )
    for blobs in copies[1:]:
        for layer, (tensors, _) in zip(layers, blobs, strict=True):
            if [(t.name, t.ne) for t in tensors] != [(t.name, t.ne) for t in layer.tensors]:
                raise _damaged(trunk, f"the copies of layer {layer.layer} differ in shape")
    header, stream_bytes = _stream(trunk, [*trunk.tensors, *infos])
    stacked = (Tensor(i.name, i.ne, i.ggml_type, NOWHERE, 0, i.n_bytes) for i in infos)
    return ModelLayout(
        path=path,
        files=files,
        headers=(trunk,),
        metadata=trunk,
        architecture=architecture,
        n_experts=n_experts,
        layers=layers,
        tensors=(*_tensors([trunk]), *stacked),
        header=header,
        stream_bytes=stream_bytes,
        table=table,
    )


def _damaged(header: GgufHeader, what: str) -> UserError:
    return UserError(f"{header.path} is damaged ({what}); convert the model again")


def _check_size(file: Path, n_bytes: int) -> None:
    try:
        found = file.stat().st_size
    except OSError as error:
        raise UserError(f"cannot open {file} ({reason(error)}); convert the model again") from None
    if found != n_bytes:
        raise UserError(
            f"{file} has {found} bytes instead of {n_bytes}: the bundle is damaged; convert the "
            "model again"
        )


def _copies(
    trunk: GgufHeader, blobs: BlobSet, layers: Sequence[int], n_experts: int, first_file: int
) -> list[tuple[tuple[ExpertTensor, ...], Copy]]:
    """Per layer its tensors and the copy that this set of blobs is."""
    file = np.array(blobs.blob_file, np.int64)
    offset = np.array(blobs.blob_offset, np.uint64)
    n_bytes = np.array(blobs.blob_bytes, np.uint64)
    sizes = np.array(blobs.file_bytes, np.uint64)
    if len(file) != len(layers) * n_experts:
        raise _damaged(trunk, f"{len(file)} blobs for {len(layers)} layers of {n_experts} experts")
    if (file >= len(blobs.files)).any():
        raise _damaged(trunk, "a blob lies in a file that is not listed")
    room = sizes[file]
    if ((offset > room) | (n_bytes > room - np.minimum(offset, room))).any():
        raise _damaged(trunk, "a blob lies behind the end of its file")
    if (offset % np.uint64(BLOB_ALIGNMENT)).any():
        raise _damaged(trunk, "a blob is not aligned")
    names = [t.name for t in blobs.tensors]
    if len(set(names)) != len(names):
        raise _damaged(trunk, "a tensor is listed twice")
    by_layer: dict[int, list[int]] = {}
    for i, tensor in enumerate(blobs.tensors):
        match = _EXPERT_NAME.fullmatch(tensor.name)
        assert match is not None
        by_layer.setdefault(int(match[1]), []).append(i)
    if list(by_layer) != list(layers) or sorted(set(layers)) != list(layers):
        raise _damaged(trunk, "its layers and its tensors do not agree")
    copies = []
    for at, number in enumerate(layers):
        mine = slice(at * n_experts, (at + 1) * n_experts)
        placed = [blobs.tensors[i] for i in by_layer[number]]
        end = 0
        for tensor in placed:
            if tensor.offset < end or tensor.offset % BLOB_ALIGNMENT:
                raise _damaged(trunk, f"tensor {tensor.name} has no place in its blob")
            end = tensor.offset + tensor.n_bytes
        if (n_bytes[mine] != end).any():
            raise _damaged(trunk, f"a blob of layer {number} has not {end} bytes")
        tensors = tuple(_expert_tensor(t.name, (*t.ne, n_experts), t.ggml_type) for t in placed)
        piece = Piece(
            (file[mine] + first_file).astype(np.int32),
            offset[mine].astype(np.int64),
            end,
            tuple((i, tensor.offset) for i, tensor in enumerate(placed)),
        )
        copy = Copy(tuple(t.ggml_type for t in placed), tuple(t.layout for t in placed), (piece,))
        copies.append((tensors, copy))
    return copies


# --- the stream ---------------------------------------------------------------------------------


def _stream(first: GgufHeader, infos: Sequence[TensorInfo]) -> tuple[bytes, int]:
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
    header, stream_bytes = _stream(layout.metadata, infos)
    return replace(layout, tensors=both, header=header, stream_bytes=stream_bytes)


def _tensors(headers: Sequence[GgufHeader]) -> Iterator[Tensor]:
    for file, header in enumerate(headers):
        for info in header.tensors:
            offset = header.data_start + info.offset
            yield Tensor(info.name, info.ne, info.ggml_type, file, offset, info.n_bytes)


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
