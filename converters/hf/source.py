"""A Hugging Face folder as a `Source`: configuration, tokenizer and safetensors, as GGUF has them.

Binds what a family wants to what the checkpoint holds, refuses what does not fit at
opening, and reads slices on demand. The trunk and the experts keep the checkpoint's own type;
vectors, norms and routers become F32, as in every GGUF, and gpt-oss experts stay MXFP4.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from gguf import (
    GGML_QUANT_VERSION,
    GGMLQuantizationType,
    GGUFType,
    GGUFWriter,
    LlamaFileType,
    size_label,
)

from ...runtime.errors import UserError
from ...runtime.text import well_formed
from ..source import Bytes, ExpertStack, Pair, SourceTensor, forget
from . import families, tokenizer
from .about import CARD, GENERATION, about
from .checkpoint import INDEX, Array, Checkpoint, Stored, floats
from .wants import OTHER_WAY, Config, Want, WantExperts, Wants

# Part of some checkpoints and of no computation; prediction layers follow the last real one.
_UNUSED = re.compile(r"\.rotary_emb\.inv_freq$|\.attention\.(masked_)?bias$")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")

BLOCK_ROWS = 256  # of a matrix that lies the other way round

# Files besides the tokenizer's and the weights that shape the result.
_DESCRIBING = ("config.json", INDEX, GENERATION, CARD)

_FILE_TYPES = {
    GGMLQuantizationType.F32: LlamaFileType.ALL_F32,
    GGMLQuantizationType.F16: LlamaFileType.MOSTLY_F16,
    GGMLQuantizationType.BF16: LlamaFileType.MOSTLY_BF16,
    GGMLQuantizationType.MXFP4: LlamaFileType.MOSTLY_MXFP4_MOE,
}


def open_hf(path: Path) -> HfSource:
    """The checkpoint in this folder; UserError with one sentence if it cannot be converted."""
    return HfSource(path)


class HfSource:
    """A checkpoint of one of the supported families; see `Source`."""

    name: str
    notes: Sequence[str]
    n_bytes: int
    sha256: str
    n_experts: int
    metadata: Mapping[str, Pair]
    trunk: Sequence[SourceTensor]
    experts: Sequence[ExpertStack]

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise UserError(f"{path} is not a folder; give the folder of a Hugging Face model")
        config = Config(path)
        wants = families.wants_of(config)
        self.name = _model_name(path)
        self.n_experts = wants.n_experts
        self._checkpoint = Checkpoint(path)
        try:
            binder = _Binder(wants, self._checkpoint)
            self.trunk = [binder.trunk(want) for want in wants.trunk]
            self.experts = [stack for want in wants.experts for stack in binder.stacks(want)]
            binder.check_leftovers()
            notes: list[str] = []
            tokenizer.add_tokenizer(path, config, wants.writer, notes)
            self.metadata = self._metadata(path, wants, notes)
            self.notes = notes
        except BaseException:
            self.close()
            raise
        digest = self._checkpoint.headers
        self.n_bytes = self._checkpoint.n_bytes
        for pattern in (*_DESCRIBING, *tokenizer.FILES):
            for file in sorted(path.glob(pattern)):
                if not file.is_file():
                    continue
                content = file.read_bytes()
                digest.update(os.fsencode(file.name) + f"\0{len(content)}\0".encode() + content)
                self.n_bytes += len(content)
        self.sha256 = digest.hexdigest()

    def _metadata(self, path: Path, wants: Wants, notes: list[str]) -> dict[str, Pair]:
        """General keys, then what the plan's writer collected: the architecture's and the
        tokenizer's."""
        writer = wants.writer
        general = GGUFWriter(path=None, arch=writer.arch)
        general.add_type(GGUFType.MODEL)
        expert = sum(math.prod(stack.ne) for stack in self.experts)
        shared = sum(math.prod(tensor.ne) for tensor in self.trunk)
        total = shared + expert * self.n_experts
        known = about(path, self.name, wants.config, total, notes)
        known.size_label = known.size_label or size_label(total, shared, expert, self.n_experts)
        known.set_gguf_meta_model(general)
        general.add_file_type(_FILE_TYPES[GGMLQuantizationType(self.experts[0].ggml_type)])
        general.add_quantization_version(GGML_QUANT_VERSION)
        collected = {**general.kv_data[0], **writer.kv_data[0]}
        return {key: Pair(v.value, v.type, v.sub_type) for key, v in collected.items()}

    def forget(self) -> None:
        forget({stored.fd for stored in self._checkpoint.tensors.values()})

    def close(self) -> None:
        self._checkpoint.close()


def _model_name(path: Path) -> str:
    """The folder's name, or the repository's where the folder is a hub cache's snapshot."""
    path = path.resolve()
    name = path.parent.parent.name.split("--")[-1]
    return well_formed(name if path.parent.name == "snapshots" else path.name)


class _Binder:
    """Finds in a checkpoint what is wanted of it, and remembers what was found."""

    def __init__(self, wants: Wants, checkpoint: Checkpoint) -> None:
        self.wants = wants
        self.checkpoint = checkpoint
        self.used: set[str] = set()

    def find(self, names: Iterable[str], *shape: int) -> Stored:
        """The first of these tensors that is there, held to its shape."""
        names = tuple(names)
        name = next((name for name in names if name in self.checkpoint), None)
        config = self.wants.config
        if name is None:
            raise UserError(
                f"{config.path.parent} lacks the tensor {names[0]}; download its shards again"
            )
        stored = self.checkpoint[name]
        if stored.shape != shape:
            raise UserError(
                f"{stored.path}: {name} has shape {list(stored.shape)} where {config.path.name} "
                f"implies {list(shape)}; download both again"
            )
        self.used.add(name)
        return stored

    def floating(self, names: Iterable[str], *shape: int) -> Stored:
        stored = self.find(names, *shape)
        if stored.kind.ggml is None:
            raise UserError(
                f"{stored.path}: {stored.name} is stored as {stored.dtype}, which is "
                "no type for weights; download it again"
            )
        return stored

    def trunk(self, want: Want) -> SourceTensor:
        stored = self.floating(want.names, *want.shape)
        ggml_type = GGMLQuantizationType.F32 if want.as_f32 else stored.kind.ggml
        assert ggml_type is not None
        return SourceTensor(want.target, want.ne, int(ggml_type), partial(_rows, want, stored))

    def stacks(self, want: WantExperts) -> list[ExpertStack]:
        """Gate, up and down of one layer, however the checkpoint keeps them."""
        fused = want.fused_prefix
        if f"{fused}.gate_up_proj_blocks" in self.checkpoint:
            reads = self._mxfp4(fused)
        elif f"{fused}.gate_up_proj" in self.checkpoint:
            reads = self._fused(fused)
        else:
            reads = [self._apart(want, part) for part in range(3)]
        n_embd, ff = self.wants.hidden, self.wants.ff
        return [
            ExpertStack(
                f"blk.{want.layer}.ffn_{role}_exps.weight",
                want.layer,
                role,
                ne,
                int(ggml_type),
                read,
            )
            for role, ne, (ggml_type, read) in zip(
                ("gate", "up", "down"),
                ((n_embd, ff), (n_embd, ff), (ff, n_embd)),
                reads,
                strict=True,
            )
        ]

    def _apart(self, want: WantExperts, part: int) -> _Read:
        """A tensor per matrix."""
        shape = (
            (self.wants.hidden, self.wants.ff) if part == 2 else (self.wants.ff, self.wants.hidden)
        )
        stored = [
            self.floating([f"{want.prefix}.{expert}.{want.parts[part]}.weight"], *shape)
            for expert in range(self.wants.n_experts)
        ]
        if len({one.dtype for one in stored}) > 1:
            raise UserError(
                f"{stored[0].path}: experts of layer {want.layer} are stored in "
                "different types; save the model in one type first"
            )
        return _type(stored[0]), lambda expert, first, n: _bytes(stored[expert].rows(first, n))

    def _fused(self, prefix: str) -> list[_Read]:
        """All experts in one tensor, as transformers holds them in memory.

        gpt-oss multiplies from the other side and alternates gate and up; the others keep gate's
        rows before up's.
        """
        n, ff, n_embd = self.wants.n_experts, self.wants.ff, self.wants.hidden
        names = [f"{prefix}.gate_up_proj"], [f"{prefix}.down_proj"]
        if self.wants.alternating:
            both = self.floating(names[0], n, n_embd, 2 * ff)
            down = self.floating(names[1], n, ff, n_embd)
            return [
                (_type(both), partial(_columns, both, 0, 2)),
                (_type(both), partial(_columns, both, 1, 2)),
                (_type(down), partial(_columns, down, 0, 1)),
            ]
        both = self.floating(names[0], n, 2 * ff, n_embd)
        down = self.floating(names[1], n, n_embd, ff)
        return [
            (_type(both), partial(_rows_behind, both, 0)),
            (_type(both), partial(_rows_behind, both, ff)),
            (_type(down), partial(_rows_behind, down, 0)),
        ]

    def _mxfp4(self, prefix: str) -> list[_Read]:
        """gpt-oss's own format: blocks of 32 weights in 16 bytes, and a scale byte each."""
        n, ff, n_embd = self.wants.n_experts, self.wants.ff, self.wants.hidden
        if n_embd % 32 or ff % 32:
            raise UserError(
                f"{self.wants.config.path}: MXFP4 needs sizes that are multiples of "
                f"32, not {n_embd} and {ff}; download it again"
            )
        found = {}
        for part, rows, length in (("gate_up", 2 * ff, n_embd), ("down", n_embd, ff)):
            name, blocks = f"{prefix}.{part}_proj", length // 32
            found[part] = (
                self.find([f"{name}_blocks"], n, rows, blocks, 16),
                self.find([f"{name}_scales"], n, rows, blocks),
            )
            for stored in found[part]:
                if stored.dtype != "U8":
                    raise UserError(
                        f"{stored.path}: {stored.name} is stored as {stored.dtype}, "
                        "not as MXFP4's bytes; download it again"
                    )
        kind = GGMLQuantizationType.MXFP4
        return [
            (kind, partial(_mxfp4_rows, *found["gate_up"], 0, 2)),
            (kind, partial(_mxfp4_rows, *found["gate_up"], 1, 2)),
            (kind, partial(_mxfp4_rows, *found["down"], 0, 1)),
        ]

    def check_leftovers(self) -> None:
        """A weight nobody asked for means that the model is not what its configuration says."""
        tied = {"lm_head.weight"} if self.wants.config.get("tie_word_embeddings") else set()
        for name in self.checkpoint.tensors.keys() - self.used - tied:
            layer = _LAYER.match(name)
            if _UNUSED.search(name) or (layer and int(layer[1]) >= self.wants.n_layers):
                continue
            raise UserError(
                f"{self.checkpoint[name].path}: {name} has no place in llama.cpp's "
                f"{self.wants.writer.arch} models; {OTHER_WAY}"
            )


_Read = tuple[GGMLQuantizationType, Callable[[int, int, int], Bytes]]


def _type(stored: Stored) -> GGMLQuantizationType:
    assert stored.kind.ggml is not None
    return stored.kind.ggml


def _bytes(values: Array) -> Bytes:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _rows(want: Want, stored: Stored, first: int, n: int) -> Bytes:
    """Rows [first, first + n) of a trunk tensor as GGUF has it."""
    if want.groups is None:
        row = want.ne[0]
        values = stored.read(first * row, n, row)
    else:
        rows_in, rows_out = want.groups.rows_in, want.groups.rows_out
        head, last = first // rows_out, -(-(first + n) // rows_out)
        length = want.shape[-1]
        heads = stored.read(head * rows_in * length, last - head, rows_in, length)
        values = np.concatenate([want.groups.apply(one) for one in heads])
        values = values[first - head * rows_out :][:n]
    return _bytes(floats(values, stored.dtype) if want.as_f32 else values)


def _rows_behind(stored: Stored, skipped: int, expert: int, first: int, n: int) -> Bytes:
    """Rows of an expert, counted from behind its first ``skipped``."""
    _, rows, length = stored.shape
    return _bytes(stored.read((expert * rows + skipped + first) * length, n, length))


def _columns(stored: Stored, start: int, step: int, expert: int, first: int, n: int) -> Bytes:
    """Columns of an expert as rows: every ``step``-th from ``start`` on. What lies between them is
    read too, a block at a time."""
    _, rows, length = stored.shape
    out = np.empty((n, rows), stored.kind.read_as)
    for at in range(0, rows, BLOCK_ROWS):
        block = stored.read((expert * rows + at) * length, min(BLOCK_ROWS, rows - at), length)
        out[:, at : at + len(block)] = block[:, start + first * step : (first + n) * step : step].T
    return _bytes(out)


def _mxfp4_rows(
    blocks: Stored, scales: Stored, start: int, step: int, expert: int, first: int, n: int
) -> Bytes:
    """Every ``step``-th row from ``start`` on in ggml's block_mxfp4: the scale, then 16 bytes, byte
    i holding weights i, i+16.

    The checkpoint's byte i holds weights 2i and 2i + 1, the low half first.
    """
    _, rows, length = scales.shape
    at = (expert * rows + first * step) * length
    packed = blocks.read(16 * at, n * step, length, 16)[start::step]
    scale = scales.read(at, n * step, length)[start::step]
    if int(scale.max()) == 0xFF:
        raise UserError(
            f"{scales.path}: {scales.name} holds NaN scales; the checkpoint is "
            "damaged, so download it again"
        )
    out = np.empty((*scale.shape, 17), np.uint8)
    out[..., 0] = scale
    low, high = packed & 0xF, packed >> 4
    out[..., 1::2] = low[..., :8] | low[..., 8:] << 4
    out[..., 2::2] = high[..., :8] | high[..., 8:] << 4
    return out.reshape(-1)
