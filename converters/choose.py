"""What a conversion will write: types, layouts and fallbacks, chosen before any byte is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from gguf import GGML_QUANT_VERSION, GGUFValueType

from ..runtime.errors import UserError, option
from ..runtime.files import sha256
from ..runtime.formats.bundle import COPY, BundlePair
from ..runtime.formats.interleaving import Bytes, Interleaving
from .blueprint import Matrix
from .imatrix import Imatrix, read_imatrix
from .mix import (
    FILE_TYPES,
    NEEDS_IMATRIX,
    fitting_type,
    is_quantizable,
    trunk_types,
    type_name,
    type_number,
)
from .source import ExpertStack, Pair, Source, SourceTensor
from .source_gguf import GgufSource

Note = Callable[[str], None]

IMATRIX_KEY = "quantize.imatrix.sha256"  # beside those that llama.cpp's own quantizer writes

LAYOUTS = ("auto", "plain", "repacked")


class KernelLayouts(Protocol):
    """What some machine's kernels want experts to look like; runtime/kernels.py is this one's."""

    def interleaving(self, ggml_type: int, ne: tuple[int, int], /) -> Interleaving | None:
        """The rule of their layout for such a matrix; None where they want it plain."""

    def repack(self, ggml_type: int, ne: tuple[int, int], plain: Bytes, /) -> Bytes:
        """Rows of a matrix in that layout, which must exist."""


@dataclass(frozen=True)
class ConvertOptions:
    """What to make of a source; `quant` None keeps a GGUF's bytes and takes q4_k for the rest."""

    quant: str | None = None
    low_quant: str | None = None
    imatrix: Path | None = None
    layout: str = "auto"
    shard_bytes: int | None = None
    threads: int | None = None


# --- choosing -----------------------------------------------------------------------------------


class Choices(NamedTuple):
    """What each part of the bundle becomes, in the source's order."""

    quant: str
    sets: list[list[Matrix]]
    trunk: list[tuple[SourceTensor, int]]
    metadata: Mapping[str, Pair]
    imatrix: Imatrix


def choose(source: Source, options: ConvertOptions, kernels: KernelLayouts, note: Note) -> Choices:
    quant = (options.quant or _default_quant(source)).lower()
    if options.imatrix and quant == COPY and options.low_quant is None:
        raise UserError(
            f"{option('imatrix')} weighs a quantization: give {option('quant')} or "
            f"{option('low_quant')} with it"
        )
    if options.layout not in LAYOUTS:
        raise UserError(f"{options.layout!r} is no layout: choose one of {', '.join(LAYOUTS)}")
    imatrix = read_imatrix(options.imatrix) if options.imatrix else {}
    fallbacks: Counter[tuple[int, int, int]] = Counter()
    types: dict[str, int] = {t.name: t.ggml_type for t in source.trunk}
    metadata = dict(source.metadata)
    if quant != COPY:
        wanted = type_number(quant)
        mix = trunk_types(source, wanted, bool(imatrix))
        for tensor in source.trunk:
            types[tensor.name] = _fit(mix[tensor.name], tensor.ne[0], fallbacks)
        u32 = GGUFValueType.UINT32
        metadata["general.file_type"] = Pair(FILE_TYPES[quant], u32)
        metadata["general.quantization_version"] = Pair(GGML_QUANT_VERSION, u32)
    if options.imatrix:
        metadata[IMATRIX_KEY] = Pair(sha256(options.imatrix), GGUFValueType.STRING)
    sets = []
    for name in (quant, options.low_quant):
        if name is not None:
            number = None if name == COPY else type_number(name)
            sets.append(
                [_matrix(stack, number, options, kernels, fallbacks) for stack in source.experts]
            )
    for (kind, fitting, row), n in sorted(fallbacks.items()):
        note(f"rows of {row} do not fit {type_name(kind)}: {n} tensors become {type_name(fitting)}")
    if options.layout == "repacked" and all(m.rule is None for s in sets for m in s):
        kinds = ", ".join(sorted({type_name(m.ggml_type) for s in sets for m in s}))
        raise UserError(
            f"this CPU's kernels take {kinds} as it is; give {option('layout', 'plain')}"
        )
    choices = Choices(quant, sets, [(t, types[t.name]) for t in source.trunk], metadata, imatrix)
    _check_imatrix(source, choices)
    return choices


def _default_quant(source: Source) -> str:
    """Weights that are quantized stay as they are; floats of a checkpoint become q4_k."""
    if isinstance(source, GgufSource):
        return COPY
    quantized = {type_name(s.ggml_type) for s in source.experts} - {"f32", "f16", "bf16"}
    return min(quantized, default="q4_k")


def _fit(wanted: int, row: int, fallbacks: Counter[tuple[int, int, int]]) -> int:
    fitting = fitting_type(wanted, row)
    if fitting != wanted:
        fallbacks[wanted, fitting, row] += 1
    return fitting


def _matrix(
    stack: ExpertStack,
    wanted: int | None,
    options: ConvertOptions,
    kernels: KernelLayouts,
    fallbacks: Counter[tuple[int, int, int]],
) -> Matrix:
    ggml_type = stack.ggml_type
    if wanted is not None and is_quantizable(stack.name, stack.ne):
        ggml_type = _fit(wanted, stack.ne[0], fallbacks)
    rule = None
    if options.layout != "plain" and stack.name.endswith(".weight"):
        rule = kernels.interleaving(ggml_type, stack.ne)
    return Matrix(stack, ggml_type, rule)


def describe_layouts(sets: Sequence[Sequence[Matrix]]) -> list[BundlePair]:
    """Keys from which another CPU learns to undo the layouts used."""
    rules = {m.rule.name: m.rule for s in sets for m in s if m.rule is not None}
    return [pair for rule in rules.values() for pair in rule.pairs()]


def _check_imatrix(source: Source, choices: Choices) -> None:
    """Whatever needs weights has them, and those there are have the right size."""
    matrices = {m.stack.name: m for s in choices.sets for m in s}.values()
    items = [(m.stack.name, m.stack.ggml_type, m.stack.ne[0] * source.n_experts) for m in matrices]
    trunk = {t.name: (t, kind) for t, kind in choices.trunk}
    items += [(t.name, t.ggml_type, t.ne[0] * (*t.ne, 1, 1)[2]) for t, _ in trunk.values()]
    targets: dict[str, set[int]] = {name: {kind} for name, (_, kind) in trunk.items()}
    for s in choices.sets:
        for m in s:
            targets.setdefault(m.stack.name, set()).add(m.ggml_type)
    for name, ggml_type, size in items:
        changed = {type_name(kind) for kind in targets[name] if kind != ggml_type}
        weights = choices.imatrix.get(name)
        if weights is not None and changed and weights.n_values != size:
            if name == "token_embd.weight":
                del choices.imatrix[name]  # looked up, not multiplied: never really measured
                continue
            raise UserError(
                f"the importance matrix has {weights.n_values} values for {name} where the model"
                f" has {size}; make one from this model"
            )
        if weights is None and (needy := sorted(changed & NEEDS_IMATRIX)):
            where = (
                "this one lacks" if choices.imatrix else f"give one with {option('imatrix')} for"
            )
            raise UserError(
                f"{needy[0]} is useless without an importance matrix: {where} {name}"
                + ("; choose a type of more bits" if choices.imatrix else "")
            )
