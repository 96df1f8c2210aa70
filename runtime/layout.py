"""Where every byte of a model lies: experts by layer, the trunk, and the header llama.cpp is shown.

The only reader of offsets. Joins split sets, finds experts by shape instead of by an allow-list
of architectures, and writes the header of one complete GGUF that stands for all files. Reads
headers only. Knows no budget, no slots in use and no llama.cpp.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_gguf.runtime.errors import UserError
from moe_gguf.runtime.gguf_header import (
    GGML_TYPES,
    MAGIC,
    GgufHeader,
    Value,
    ValueType,
    pad_up,
    read_header,
)

ROLES = ("gate", "up", "gate_up", "down")  # the order of a layer's tensors; others follow
PAGE = 4096
MAP_ALIGNMENT = 32  # ggml's TENSOR_ALIGNMENT

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
    file: int
    offset: int  # in that file
    n_bytes: int


@dataclass(frozen=True)
class ExpertTensor:
    """The stacked experts of one role; expert e lies at offset + e * expert_bytes."""

    name: str
    layer: int
    role: str  # one of ROLES, or the name's own suffix
    ggml_type: int
    ne: tuple[int, int, int]  # the last is the number of experts
    file: int
    offset: int
    expert_bytes: int


@dataclass(frozen=True)
class MoeLayer:
    """A layer that routes: what one of its experts is made of."""

    layer: int
    tensors: tuple[ExpertTensor, ...]  # in the order of ROLES

    @property
    def blob_bytes(self) -> int:
        """One expert's bytes on disk."""
        return sum(t.expert_bytes for t in self.tensors)


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
    def expert_bytes(self) -> int:
        """All experts of all layers."""
        return sum(layer.blob_bytes * self.n_experts for layer in self.layers)

    @property
    def trunk_bytes(self) -> int:
        """Everything that is not a routed expert."""
        return sum(t.n_bytes for t in self.tensors) - self.expert_bytes


@dataclass(frozen=True)
class SlotLayout:
    """Where the parts of a blob go inside a slot, so that direct reads land in place.

    Slots are slot_bytes apart and start at multiples of PAGE (and of align).
    """

    slot_bytes: int
    align: int
    offsets: Mapping[tuple[int, str], int]  # by (layer, tensor name)


# --- reading ------------------------------------------------------------------------------------


def read_layout(path: Path) -> ModelLayout:
    """Lay out the model that starts in this file; every fault of it is a UserError.

    What comes back was validated: llama.cpp can be given its stream.
    """
    from moe_gguf.runtime.validate import validate

    headers = _read_set(path)
    first = headers[0]
    for header in headers:
        _check_types(header)
    architecture = first.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise UserError(f"{path} names no general.architecture; convert the model again")
    n_experts = first.get(f"{architecture}.expert_count")
    layers = _find_experts(headers, n_experts if type(n_experts) is int else 0)
    if not layers or type(n_experts) is not int:
        raise _no_experts(path, architecture, headers)
    stream_header, stream_bytes = _stream(headers)
    layout = ModelLayout(
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
    validate(layout)
    return layout


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


def _check_types(header: GgufHeader) -> None:
    for info in header.tensors:
        kind = GGML_TYPES[info.ggml_type].name
        if kind in _NO_WEIGHT and not (kind in ("I32", "I64") and _LOOKUPS.fullmatch(info.name)):
            raise UserError(
                f"{header.path}: tensor {info.name} is {kind}, which llama.cpp cannot compute"
                " with; convert the model to F32, F16, BF16 or a quantised type"
            )


def _find_experts(headers: Sequence[GgufHeader], n_experts: int) -> tuple[MoeLayer, ...]:
    found: dict[int, list[ExpertTensor]] = {}
    for file, header in enumerate(headers):
        for info in header.tensors:
            match = _EXPERT_NAME.fullmatch(info.name)
            shape = info.ne[:3] if info.ne[3:] in ((), (1,)) else ()
            if match is None or len(shape) != 3 or shape[2] != n_experts:
                continue
            layer = int(match[1])
            role = match[2] if match[3] == "weight" else f"{match[2]}.{match[3]}"
            expert = ExpertTensor(
                name=info.name,
                layer=layer,
                role=role,
                ggml_type=info.ggml_type,
                ne=(shape[0], shape[1], shape[2]),
                file=file,
                offset=header.data_start + info.offset,
                expert_bytes=info.n_bytes // n_experts,
            )
            found.setdefault(layer, []).append(expert)

    def order(tensor: ExpertTensor) -> tuple[int, str]:
        return ROLES.index(tensor.role) if tensor.role in ROLES else len(ROLES), tensor.role

    return tuple(MoeLayer(i, tuple(sorted(found[i], key=order))) for i in sorted(found))


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


# --- the stream ---------------------------------------------------------------------------------


def _stream(headers: Sequence[GgufHeader]) -> tuple[bytes, int]:
    """The header that stands for all files, and the size of the GGUF it describes.

    Keys are the first file's, byte for byte, less those that speak of the split. The alignment is
    raised to what llama.cpp asks of a file it maps.
    """
    first = headers[0]
    alignment = max(first.alignment, MAP_ALIGNMENT)
    keys = [key for key in first.pairs if not key.startswith("split.") and key != _ALIGNMENT]
    infos = [info for header in headers for info in header.tensors]
    out = bytearray(MAGIC + struct.pack("<IQQ", 3, len(infos), len(keys) + 1))
    for key in keys:
        out += first.raw(key)
    name = _ALIGNMENT.encode()
    out += struct.pack("<Q", len(name)) + name
    out += struct.pack("<II", ValueType.UINT32, alignment)
    offset = 0
    for info in infos:
        name = info.name.encode()
        out += struct.pack("<Q", len(name)) + name
        out += struct.pack(f"<I{len(info.ne)}Q", len(info.ne), *info.ne)
        out += struct.pack("<IQ", info.ggml_type, offset)
        offset += pad_up(info.n_bytes, alignment)
    out += bytes(-len(out) % alignment)
    return bytes(out), len(out) + offset


def _tensors(headers: Sequence[GgufHeader]) -> Iterator[Tensor]:
    for file, header in enumerate(headers):
        for info in header.tensors:
            offset = header.data_start + info.offset
            yield Tensor(info.name, info.ne, info.ggml_type, file, offset, info.n_bytes)


# --- slots --------------------------------------------------------------------------------------


def slot_layout(layout: ModelLayout, align: int) -> SlotLayout:
    """Place the parts of every layer's blob in a slot for direct reads of this alignment.

    A direct read starts and ends at multiples of align, so it writes up to align - 1 bytes on
    either side of what was asked for: each part keeps at least align bytes clear before and
    behind it. A part has its file offset's remainder (expert 0's: others share it where
    expert_bytes is a multiple of align), so that bytes land where they are used.
    """
    assert align >= 1
    assert align & (align - 1) == 0
    offsets: dict[tuple[int, str], int] = {}
    need = 0
    for layer in layout.layers:
        at = align
        for tensor in layer.tensors:
            at += (tensor.offset - at) % align
            offsets[layer.layer, tensor.name] = at
            at += tensor.expert_bytes + align
        need = max(need, at)
    return SlotLayout(pad_up(need, max(align, PAGE)), align, offsets)
