"""Refuse models that would bring llama.cpp down.

llama.cpp reports most faults of a file, but asserts on others, and an assertion ends the process.
Each rule here stands for one of those: a number it divides by, an index it trusts, an equality it
asserts. What it reports by itself (a missing key, a shape that does not follow from the keys) is
left to it, so that new architectures are not held up by rules that were never theirs.
"""

from __future__ import annotations

import math
import re

from ..errors import UserError
from .ggml_types import GGML_TYPES
from .gguf_header import ValueType
from .layout import ModelLayout


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
MAX_CONTEXT = 1 << 31

_ROPE_SCALING = ("none", "linear", "yarn", "longrope")
_MAX_GATING_FUNC = 4  # LLAMA_EXPERT_GATING_FUNC_TYPE_SQRT_SOFTPLUS
_MAX_WINDOW = 1 << 24  # larger ones overflow llama.cpp's 32-bit cache arithmetic

# Architectures whose graphs assert that all of a head is rotated, and that keys and values are
# of one size. Only these: a model of another architecture may well differ.
_WHOLE_HEAD_ROTATED = _names(
    "arctic bailingmoe cohere2moe dbrx deepseek dots1 ernie4_5-moe exaone-moe gpt-oss"
    " granitemoe granite_swa graniteswitch grok grovemoe hunyuan-moe hy_v3 llada-moe llama"
    " llama4 mellum granite minicpm mistral3 olmoe qwen2moe qwen3moe qwen3vlmoe rnd1"
    " smallthinker"
)
_EQUAL_KEY_VALUE = _WHOLE_HEAD_ROTATED | _names(
    "afmoe bailingmoe2 gemma4 glm4moe granitehybrid laguna lfm2moe maple minimax-01"
    " minimax-m2 minimax-m3 nemotron_h_moe phimoe qwen35moe qwen3next qwen4exp"
)
# They take the gating function from the file as it is; zero, or none given, ends them.
_GATED = _names(
    "bailingmoe2 bailingmoe3 deepseek32 dots1 dots3note exaone-moe hy_v4 kimi-k3 kimi-linear"
    " lfm2moe minimax-m2 minimax-m3 smallthinker"
)
# Their layers have sliding windows always, or if the file gives the window's size.
_WINDOWED = _names("cohere2moe exaone-moe gemma4 gpt-oss granite_swa maple mimo2 step35")
_WINDOWED_IF_SAID = _names("afmoe laguna llama4 mellum smallthinker")
# Multi-head latent attention caches one row per token: the compressed one and its rotated part.
_LATENT = frozenset(("deepseek2", "deepseek32", "glm-dsa", "mistral4"))
# No rotary embedding at all: every other architecture hangs or aborts without one.
_NO_ROPE = _names("glm5-next jamba kimi-k3 kimi-linear nemotron_h_moe")
# Tensors llama.cpp calls optional and then uses: by architecture, what goes with what.
_TOGETHER: dict[str, tuple[tuple[str, str], ...]] = {
    "nemotron_h_moe": (("ssm_conv1d.weight", "ssm_conv1d.bias"),),
    "granitehybrid": (("ssm_conv1d.weight", "ssm_conv1d.bias"),),
}

# Tensors that are added, multiplied or convolved element by element: ggml's CPU kernels take
# them as F32 only and abort otherwise. Matrices and lookup tables may have any type.
_ELEMENTWISE = re.compile(
    r".*(norm|norm_\d|\.bias|\.scale|_scale|_base|rope_freqs|rope_factors_long|rope_factors_short"
    r"|attn_sinks|exp_probs_b|exp_probs_b_vl|ssm_a|ssm_d|ssm_conv1d|ssm_conv1d_[qkv]|ple_conv1d"
    r"|shortconv\.conv|ffn\.act|_res_score|ssm_dt)(\.weight|\.bias)?"
)

# Numbers whole architectures assert or divide by, and the range in which they survive.
_BOUNDS: dict[str, tuple[tuple[str, int, int], ...]] = {
    "deepseek4": ((".hyper_connection.count", 4, 4), (".attention.output_group_count", 1, 1 << 16)),
    "ernie4_5-moe": ((".interleave_moe_layer_step", 1, 1 << 16),),
    "glm5-next": ((".hyper_connection.count", 4, 4), (".attention.indexer.kpool", 2, 1 << 16)),
    "grovemoe": ((".experts_per_group", 1, MAX_EXPERTS),),
    "lfm2moe": ((".shortconv.l_cache", 2, 1 << 16),),
    "minimax-m3": ((".attention.indexer.block_size", 1, 1 << 24),),
}


def validate(layout: ModelLayout) -> None:
    """Raise a UserError if llama.cpp would not survive this model."""
    _layers(layout)
    _experts(layout)
    _embedding(layout)
    _attention(layout)
    _recurrence(layout)
    _numbers(layout)
    _vocabulary(layout)
    _weights(layout)


def _bad(layout: ModelLayout, what: str) -> UserError:
    return UserError(f"{layout.path}: {what}; download or convert the model again")


def _int(layout: ModelLayout, key: str, low: int, high: int, default: int | None = None) -> int:
    """A whole number that must be in [low, high]; without a default it must be there."""
    value = layout.value(key)
    if value is None and default is not None and not _exists(layout, key):
        return default
    if type(value) is not int or not low <= value <= high:
        said = "missing" if value is None else repr(value)
        name = layout.architecture + key
        raise _bad(layout, f"{name} is {said} instead of a number from {low} to {high}")
    return value


def _exists(layout: ModelLayout, key: str) -> bool:
    return layout.architecture + key in layout.metadata.pairs


def _per_layer(layout: ModelLayout, key: str, low: int, high: int) -> tuple[int, ...]:
    """A number for each layer, given as one or as a list; () if there is none."""
    value = layout.value(key)
    if value is None and not _exists(layout, key):
        return ()
    numbers = value if isinstance(value, tuple) else (value,) * layout.n_layers
    if len(numbers) != layout.n_layers:
        name = layout.architecture + key
        raise _bad(layout, f"{name} has {len(numbers)} items for {layout.n_layers} layers")
    whole = tuple(n for n in numbers if type(n) is int and low <= n <= high)
    if len(whole) != len(numbers):
        name = layout.architecture + key
        raise _bad(layout, f"{name} is {value!r:.60} instead of numbers from {low} to {high}")
    return whole


# --- the rules ----------------------------------------------------------------------------------


def _layers(layout: ModelLayout) -> None:
    n_layers = _int(layout, ".block_count", 1, MAX_LAYERS)
    n_drafts = _int(layout, ".nextn_predict_layers", 0, n_layers - 1, 0)
    matches = (re.match(r"blk\.(\d+)\.", t.name) for t in layout.tensors)
    present = {int(m[1]) for m in matches if m}
    if missing := sorted(set(range(n_layers - n_drafts)) - present):  # drafts may be left out
        raise _bad(layout, f"layer {missing[0]} of {n_layers} has no tensors")
    if max(present) >= n_layers:
        raise _bad(layout, f"it has tensors of layer {max(present)} but claims {n_layers} layers")


def _experts(layout: ModelLayout) -> None:
    n_experts = _int(layout, ".expert_count", 1, MAX_EXPERTS)
    used = _per_layer(layout, ".expert_used_count", 0, n_experts)
    for layer in layout.layers:
        if not used or used[layer.layer] < 1:
            raise _bad(layout, f"{layout.architecture}.expert_used_count is not given or zero")
    if 0 in used and not _exists(layout, ".expert_feed_forward_length"):
        raise _bad(layout, "a layer uses no experts, and their width is not given")
    groups = _int(layout, ".expert_group_count", 0, max(0, n_experts - 1), 0)
    if groups > 1:
        if n_experts % groups:
            raise _bad(layout, f"{n_experts} experts do not divide into {groups} groups")
        _int(layout, ".expert_group_used_count", 1, groups - 1)


def _embedding(layout: ModelLayout) -> None:
    n_embd = _int(layout, ".embedding_length", 1, 1 << 24)
    table = next((t for t in layout.tensors if t.name == "token_embd.weight"), None)
    if table is None:
        raise _bad(layout, "tensor token_embd.weight is missing")
    if table.ne != (n_embd, layout.n_vocab):
        raise _bad(
            layout,
            f"token_embd.weight has shape {list(table.ne)}, but the embedding has {n_embd} items"
            f" and the vocabulary {layout.n_vocab} tokens",
        )


def _attention(layout: ModelLayout) -> None:
    heads = _per_layer(layout, ".attention.head_count", 0, 1 << 16) or (0,) * layout.n_layers
    kv_heads = _per_layer(layout, ".attention.head_count_kv", 0, 1 << 16) or heads
    for n, n_kv in zip(heads, kv_heads, strict=True):
        if n_kv and n % n_kv:
            raise _bad(layout, f"{n} attention heads do not share {n_kv} key-value heads evenly")
    if heads[0] == 0:  # llama.cpp divides by it, or takes every size for zero
        raise _bad(layout, f"{layout.architecture}.attention.head_count is not given or zero")
    arch, most = layout.architecture, 1 << 20
    even = layout.get_int(".embedding_length") // heads[0]
    key = _int(layout, ".attention.key_length", 1, most, even)
    value = _int(layout, ".attention.value_length", 1, most, even)
    rotated = _int(layout, ".rope.dimension_count", 0, most, key)
    key_swa = _int(layout, ".attention.key_length_swa", 1, most, key)
    value_swa = _int(layout, ".attention.value_length_swa", 1, most, value)
    rotated_swa = _int(layout, ".rope.dimension_count_swa", 0, most, rotated)
    if arch in _EQUAL_KEY_VALUE and (key, key_swa) != (value, value_swa):
        raise _bad(layout, f"keys have {key} items but values {value}, which {arch} does not allow")
    if arch in _WHOLE_HEAD_ROTATED and (rotated, rotated_swa) != (key, key_swa):
        raise _bad(layout, f"{rotated} of {key} items of a head are rotated, but {arch} needs all")
    if arch in _NO_ROPE:
        return
    head = key
    if arch in _LATENT and _exists(layout, ".attention.key_length_mla"):
        head = _latent_head(layout, key, value, rotated)
    for n, size in ((rotated, head), (rotated_swa, min(head, key_swa))):
        if n % 2 or not 0 < n <= size:
            raise _bad(layout, f"{n} of {size} items of a head are rotated: not an even part")


def _latent_head(layout: ModelLayout, key: int, value: int, rotated: int) -> int:
    """The size of a head before compression; checks that the cached row is what is computed."""
    rank = _int(layout, ".attention.kv_lora_rank", 1, 1 << 20)
    head = _int(layout, ".attention.key_length_mla", rotated + 1, 1 << 20)
    _int(layout, ".attention.value_length_mla", 1, 1 << 20)
    if set(_per_layer(layout, ".attention.head_count_kv", 0, 1 << 16)) != {1}:
        raise _bad(layout, f"{layout.architecture}.attention.head_count_kv is not 1")
    if (key, value) != (rank + rotated, rank):
        raise _bad(
            layout,
            f"a cached row of {key} and {value} items does not hold {rank} and {rotated} rotated",
        )
    return head


def _recurrence(layout: ModelLayout) -> None:
    """State-space and linear-attention layers: heads and groups must come out even."""
    if not _exists(layout, ".ssm.inner_size"):
        return
    inner = _int(layout, ".ssm.inner_size", 1, 1 << 24)
    doubled = inner == 2 * layout.get_int(".embedding_length")
    if layout.architecture in ("jamba", "granitehybrid") and not doubled:
        raise _bad(layout, f"{layout.architecture}.ssm.inner_size is not twice the embedding")
    if layout.architecture == "jamba":  # there the rank is no number of heads
        return
    heads = _int(layout, ".ssm.time_step_rank", 1, 1 << 16)
    groups = _int(layout, ".ssm.group_count", 1, 1 << 16)
    if inner % heads or inner % groups or heads % groups:
        raise _bad(layout, f"{inner} state items, {heads} heads and {groups} groups do not divide")


def _window(layout: ModelLayout) -> None:
    """An architecture with sliding windows must have one in some layer."""
    arch = layout.architecture
    default = 1 if arch == "llama4" else 0
    window = layout.get_int(".attention.sliding_window", default)
    if arch not in _WINDOWED and not (arch in _WINDOWED_IF_SAID and window):
        return
    pattern = layout.value(".attention.sliding_window_pattern")
    flags = pattern[: layout.n_layers] if isinstance(pattern, tuple) else (pattern != 1,)
    if not any(flags):
        raise _bad(layout, f"no layer has a sliding window, which {arch} needs")


def _numbers(layout: ModelLayout) -> None:
    for key, low, high in _BOUNDS.get(layout.architecture, ()):
        _int(layout, key, low, high)
    _int(layout, ".context_length", 1, MAX_CONTEXT)
    if layout.architecture in _GATED:
        _int(layout, ".expert_gating_func", 1, _MAX_GATING_FUNC)
    _int(layout, ".expert_gating_func", 0, _MAX_GATING_FUNC, 0)
    _int(layout, ".attention.sliding_window", 0, _MAX_WINDOW, 0)
    if layout.architecture == "gemma4":
        _int(layout, ".attention.shared_kv_layers", 0, layout.n_layers - 2, 0)
    _window(layout)
    scaling = layout.value(".rope.scaling.type")
    if scaling is not None and scaling not in _ROPE_SCALING:
        raise _bad(layout, f"{layout.architecture}.rope.scaling.type is {scaling!r:.60}")
    for key, pair in layout.metadata.pairs.items():
        if not key.startswith(layout.architecture + "."):
            continue
        values = pair.value if isinstance(pair.value, tuple) else (pair.value,)
        floats = [v for v in values if isinstance(v, float)]
        if any(math.isnan(v) for v in floats):
            raise _bad(layout, f"{key} is not a number")
        if key.endswith("epsilon") and not all(0 <= v < 1 for v in floats):
            raise _bad(layout, f"{key} is {floats[0]}")


def _vocabulary(layout: ModelLayout) -> None:
    """llama.cpp asserts that tokens, as C sees them, are all different."""
    pair = layout.metadata.pairs.get("tokenizer.ggml.tokens")
    if pair is None or pair.item is not ValueType.STRING:
        return
    if layout.get_str("tokenizer.ggml.model") == "llama":
        _byte_tokens(layout)
    tokens = {word.split(b"\0", 1)[0] for word in layout.metadata.strings(pair.key)}
    n_empty = 0
    if b"" in tokens:
        n_empty = sum(not w or w[0] == 0 for w in layout.metadata.strings(pair.key)) - 1
    if len(tokens) + n_empty != pair.count:
        raise _bad(layout, "its vocabulary holds a token twice")


def _byte_tokens(layout: ModelLayout) -> None:
    """A sentencepiece vocabulary without a token per byte ends the process on unknown text."""
    tokens = set(layout.metadata.strings("tokenizer.ggml.tokens"))
    for byte in range(256):
        if b"<0x%02X>" % byte not in tokens and bytes((byte,)) not in tokens:
            raise _bad(layout, f"its vocabulary has no token for byte {byte}")


def _weights(layout: ModelLayout) -> None:
    experts = {t.name for layer in layout.layers for t in layer.tensors}
    names = {t.name for t in layout.tensors}
    for first, second in _TOGETHER.get(layout.architecture, ()):
        for name in names:
            other = name.replace(first, second)
            if other not in names:
                raise _bad(layout, f"tensor {other} is missing")
    for tensor in layout.tensors:
        if tensor.name in experts or tensor.ggml_type == 0:
            continue
        if len(tensor.ne) == 1 or _ELEMENTWISE.fullmatch(tensor.name):
            kind = GGML_TYPES[tensor.ggml_type].name
            raise _bad(layout, f"tensor {tensor.name} is {kind}, but must be F32")
