"""The layout of a stock GGUF: one file, or a split set.

Experts are found by shape instead of by an allow-list of architectures. This file knows how the
files of a set belong together; whether llama.cpp survives what they say is validate.py's to tell.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ..errors import UserError
from .bundle import PLAIN
from .drafts import first_draft, is_draft
from .gguf_header import GgufHeader, read_header
from .keys import Keys
from .layout import (
    EXPERT_NAME,
    Copy,
    ExpertTensor,
    ModelLayout,
    MoeLayer,
    Piece,
    architecture_of,
    expert_tensor,
    role_order,
    tensors_of,
)

_SINGLE_EXPERT_NAME = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.\d+\.weight")
_SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_MOST_FILES = 99_999  # as many as their names can number
_SPLIT_COUNT, _SPLIT_NO, _SPLIT_TENSORS = "split.count", "split.no", "split.tensors.count"


def read_gguf(path: Path) -> ModelLayout:
    headers = _read_set(path)
    first = headers[0]
    architecture = architecture_of(first)
    n_experts = first.get(f"{architecture}.expert_count")
    drafts_from = first_draft(first, architecture, (i.name for h in headers for i in h.tensors))
    layers = _find_experts(headers, n_experts if type(n_experts) is int else 0, drafts_from)
    if not layers or type(n_experts) is not int:
        raise _no_experts(path, architecture, headers)
    return ModelLayout(
        path=path,
        files=tuple(header.path for header in headers),
        headers=headers,
        architecture=architecture,
        n_experts=n_experts,
        layers=layers,
        tensors=tuple(tensors_of(headers)),
    )


def _read_set(path: Path) -> tuple[GgufHeader, ...]:
    """The headers of a file and of its split siblings, first to last."""
    first = read_header(path)
    keys = Keys(path, first.get, "download it again")
    count = keys.integer(_SPLIT_COUNT, 0, _MOST_FILES, default=0)
    if count < 2:
        return (first,)
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


def _find_experts(
    headers: Sequence[GgufHeader], n_experts: int, drafts_from: int | None
) -> tuple[MoeLayer, ...]:
    found: dict[int, list[tuple[ExpertTensor, int, int]]] = {}
    for file, header in enumerate(headers):
        for info in header.tensors:
            match = EXPERT_NAME.fullmatch(info.name)
            shape = info.ne[:3] if info.ne[3:] in ((), (1,)) else ()
            if match is None or len(shape) != 3 or shape[2] != n_experts:
                continue
            if is_draft(info.name, drafts_from):
                continue
            expert = expert_tensor(info.name, (shape[0], shape[1], shape[2]), info.ggml_type)
            place = (expert, file, header.data_start + info.offset)
            found.setdefault(expert.layer, []).append(place)
    layers = []
    for number in sorted(found):
        places = sorted(found[number], key=lambda place: role_order(place[0]))
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


def _no_experts(path: Path, architecture: str, headers: Iterable[GgufHeader]) -> UserError:
    names = [info.name for header in headers for info in header.tensors]
    if not names:
        return UserError(f"{path} holds no tensors, only metadata; give a file with the weights")
    if any(_SINGLE_EXPERT_NAME.fullmatch(name) for name in names):
        return UserError(
            f"{path} keeps each expert in a tensor of its own, a form llama.cpp dropped;"
            " convert the model again"
        )
    stacked = next((name for name in names if EXPERT_NAME.fullmatch(name)), None)
    if stacked is not None:
        return UserError(
            f"{path} is damaged ({stacked} does not have {architecture}.expert_count experts);"
            " download or convert it again"
        )
    return UserError(f"{path} is a dense model: nothing to offload, use llama.cpp")
