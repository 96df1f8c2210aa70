"""Which type a tensor gets: llama.cpp's mixes for the trunk, its fallbacks for odd row lengths.

A mix spends more bits where a model is sensitive: output, attention's values, some layers' down
projections. The tables say what `llama-quantize` 's usual file type of that base type does (Q4_K_M
for q4_k) to a mixture of experts; routed experts themselves get the type that was asked for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..runtime.errors import UserError
from ..runtime.formats.ggml_types import GGML_TYPES
from .source import Source, SourceTensor, keys_of

NUMBERS: dict[str, int] = {kind.name.lower(): number for number, kind in GGML_TYPES.items()}

# What ggml_quantize_chunk can write, with the llama_ftype that a file made of it is labelled.
FILE_TYPES: dict[str, int] = {
    "f32": 0,
    "f16": 1,
    "bf16": 32,
    "q8_0": 7,
    "q6_k": 18,
    "q5_k": 17,
    "q5_1": 9,
    "q5_0": 8,
    "q4_k": 15,
    "q4_1": 3,
    "q4_0": 2,
    "q3_k": 12,
    "q2_k": 10,
    "q2_0": 41,
    "q1_0": 40,
    "iq4_xs": 30,
    "iq4_nl": 25,
    "iq3_s": 26,
    "iq3_xxs": 23,
    "iq2_s": 29,
    "iq2_xs": 20,
    "iq2_xxs": 19,
    "iq1_m": 31,
    "iq1_s": 24,
    "tq2_0": 37,
    "tq1_0": 36,
    "mxfp4": 38,
    "nvfp4": 39,
}
FLOATS = frozenset(NUMBERS[name] for name in ("f32", "f16", "bf16"))

# Below these llama.cpp asks for an importance matrix; ggml itself would abort for some of them.
NEEDS_IMATRIX = frozenset(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs"))

_FALLBACKS = {
    **dict.fromkeys(
        ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs"), "iq4_nl"
    ),
    **dict.fromkeys(("q2_0", "q2_k", "q3_k", "tq1_0", "tq2_0"), "q4_0"),
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
}

_KEEP = re.compile(  # small, or lookups, or feeding sums: never quantized
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid|altup|laurel|per_layer_model_proj"
    r"|ssm_conv1d|shortconv\.conv\.weight|indexer\.[kq]_proj\.weight|time_mix_(first|w[012]|v[012]"
    r"|a[012]|g[12]|decay_w[12]|lerp_fused)\.weight|attn_rel_b\.weight|position_embd|token_types"
)
_LAYER = re.compile(r"blk\.(\d+)\.")


def type_number(name: str) -> int:
    """The ggml type a --quant option names."""
    if name.lower() not in FILE_TYPES:
        raise UserError(
            f"{name!r} is no type to quantize to: choose one of {', '.join(FILE_TYPES)}"
        )
    return NUMBERS[name.lower()]


def type_name(number: int) -> str:
    return GGML_TYPES[number].name.lower()


def fitting_type(wanted: int, row: int) -> int:
    """The type itself, or what llama.cpp takes instead for rows that are not whole blocks of it."""
    number = wanted
    if row % GGML_TYPES[number].block:
        number = NUMBERS[_FALLBACKS.get(type_name(number), "f16")]
    return NUMBERS["f16"] if row % GGML_TYPES[number].block else number


def trunk_types(source: Source, wanted: int, with_imatrix: bool) -> dict[str, int]:
    """What each trunk tensor wants to be; `fitting_type` has not been asked yet."""
    names = [t.name for t in source.trunk]
    names += [s.name for s in source.experts]
    names.sort(key=lambda name: (_layer(name), name))  # the order llama-quantize counts in
    mix = _Mix(source, wanted, with_imatrix, names)
    return {
        t.name: mix.type(t) if is_quantizable(t.name, t.ne) else t.ggml_type for t in source.trunk
    }


def is_quantizable(name: str, ne: Sequence[int]) -> bool:
    n_dims = max((i + 1 for i, n in enumerate(ne) if n > 1), default=1)
    return n_dims > 1 and name.endswith("weight") and not _KEEP.search(name)


class _Mix:
    """One base type's rules for one model."""

    def __init__(
        self, source: Source, wanted: int, with_imatrix: bool, names: Sequence[str]
    ) -> None:
        self.wanted = wanted
        self.base = type_name(wanted)
        self.with_imatrix = with_imatrix
        self.tied = "output.weight" not in names
        keys = keys_of(source)
        self.n_layers = keys.integer(".block_count", default=0)
        self.eight = source.n_experts == 8
        # Of a list per layer, the first layer's.
        heads = keys.integers(".attention.head_count", default=(0,))[0]
        kv_heads = keys.integers(".attention.head_count_kv", default=(0,))[0]
        self.shared_values = kv_heads > 0 and heads // kv_heads >= 4
        self.values = [name for name in names if _category(name) == "attn_v"]
        self.downs = [name for name in names if _category(name) == "ffn_down"]

    def type(self, tensor: SourceTensor) -> int:
        if self.wanted in FLOATS:
            return self.wanted
        category = _category(tensor.name)
        name: str | None
        if category == "output" or (self.tied and category == "token_embd"):
            name = self._output(tensor.ne[0])
        elif self.base in ("mxfp4", "nvfp4"):
            name = "q8_0"
        else:
            rules = {
                "token_embd": self._token_embd,
                "attn_v": self._attn_v,
                "attn_k": self._attn_k,
                "attn_q": self._attn_q,
                "attn_output": self._attn_output,
                "ffn_down": self._ffn_down,
            }
            name = rules[category](tensor.name) if category else None
        return NUMBERS[name or self.base]

    def _output(self, row: int) -> str:
        if self.base in ("mxfp4", "nvfp4", "q8_0") or row % GGML_TYPES[self.wanted].block:
            return "q8_0"
        return "q5_k" if self.base[:3] in ("iq1", "iq2") or self.base == "iq3_xxs" else "q6_k"

    def _token_embd(self, name: str) -> str | None:
        return {
            **dict.fromkeys(("iq2_xxs", "iq2_xs", "iq1_s", "iq1_m"), "q2_k"),
            **dict.fromkeys(("iq2_s", "iq3_xxs"), "iq3_s"),
            **dict.fromkeys(("tq1_0", "tq2_0", "q2_0"), "q4_k"),
        }.get(self.base)

    def _attn_v(self, name: str) -> str | None:
        if self.base[:3] in ("iq1", "iq2"):
            return "q4_k"  # from four experts on
        if self.eight:
            return "q8_0"
        at, more = self.values.index(name), self.shared_values
        if self.base in ("q4_k", "q5_k"):
            return "q6_k" if _more_bits(at, len(self.values)) else None
        if self.base == "iq3_xxs":
            return "q4_k" if more else None if self.with_imatrix else "iq3_s"
        return {
            "q2_k": "q4_k" if more else "q3_k",
            "q3_k": "q5_k" if at < 2 else "q4_k",
            "iq3_s": "q4_k" if more else None,
            "iq4_nl": "q5_k" if more else None,
            "iq4_xs": "q5_k" if more else None,
        }.get(self.base)

    def _attn_k(self, name: str) -> str | None:
        if self.base[:3] in ("iq1", "iq2"):
            return "q4_k" if self.eight else None
        if self.eight:
            return "q8_0"
        return "iq2_s" if self.base == "iq3_xxs" else None

    def _attn_q(self, name: str) -> str | None:
        return "iq2_s" if self.base == "iq3_xxs" else None

    def _attn_output(self, name: str) -> str | None:
        if self.base[:3] in ("iq1", "iq2"):
            return (
                "q5_k"
                if self.eight
                else {"iq1_s": "iq2_xxs", "iq1_m": "iq2_xxs", "iq2_s": "iq3_s"}.get(self.base)
            )
        if self.eight:
            sensitive = ("q2_k", "iq3_xxs", "q3_k", "iq4_nl", "q4_k", "iq3_s", "iq4_xs")
            return "q5_k" if self.base in sensitive else None
        return {"q2_k": "q3_k", "iq3_xxs": "iq3_s", "q3_k": "q4_k"}.get(self.base)

    def _ffn_down(self, name: str) -> str | None:
        layer, n = _layer(name), self.n_layers
        if self.base[:3] in ("iq1", "iq2"):
            if self.downs.index(name) < n // 8:
                return "iq3_s" if self.base == "iq2_s" else "q2_k"
            return None
        if self.base in ("q4_k", "q5_k"):
            return "q6_k" if _more_bits(layer, n) else None
        early = layer < n // 8
        if self.with_imatrix:
            return {
                "q2_k": "q3_k",
                "q3_k": "q5_k" if layer < n // 16 else "q4_k",
                "q4_0": "q4_1" if early else None,
                "q5_0": "q5_1" if early else None,
            }.get(self.base)
        return {
            "q2_k": "q3_k",
            "q3_k": "q5_k" if layer < n // 16 else "q4_k",
            "iq3_xxs": "q4_k" if early else "q3_k",
            "iq4_nl": "q5_k" if early else None,
            "iq4_xs": "q5_k" if early else None,
        }.get(self.base)


def _category(name: str) -> str | None:
    if name == "output.weight":
        return "output"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "token_embd"
    if re.search(r"attn_(v|qkv|kv_b)\.weight", name):
        return "attn_v"
    match = re.search(r"(attn_[kq]|attn_output)\.weight|(ffn_down)", name)
    return (match[1] or match[2]) if match else None


def _more_bits(at: int, n: int) -> bool:
    return at < n // 8 or at >= 7 * n // 8 or (at - n // 8) % 3 == 2


def _layer(name: str) -> int:
    match = _LAYER.match(name)
    return int(match[1]) if match else -1
