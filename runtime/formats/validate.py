"""Refuse models that would bring llama.cpp down.

llama.cpp reports most faults of a file, but asserts on others, and an assertion ends the process.
Each rule here stands for one of those: a number it divides by, an index it trusts, an equality it
asserts. What it reports by itself (a missing key, a shape that does not follow from the keys) is
left to it, so that new architectures are not held up by rules that were never theirs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection

from ..errors import UserError
from .ggml_types import GGML_TYPES
from .gguf_header import ValueType
from .keys import Keys
from .layout import NOWHERE, ModelLayout


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

# Types no llama.cpp kernel takes as a weight: it aborts or calls a null pointer. Token tables
# (hash routing in deepseek4, draft vocabularies) are looked up, not multiplied, and are fine.
_NO_WEIGHT = frozenset(("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"))
_LOOKUPS = re.compile(r"blk\.\d+\.ffn_gate_tid2eid\.weight|d2t|t2d")

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
    for rule in (
        _types,
        _layers,
        _experts,
        _embedding,
        _attention,
        _recurrence,
        _numbers,
        _vocabulary,
        _weights,
    ):
        rule(layout, layout.keys)


# --- the rules ----------------------------------------------------------------------------------


def _types(layout: ModelLayout, keys: Keys) -> None:
    for tensor in layout.tensors:
        kind = GGML_TYPES[tensor.ggml_type].name
        if kind in _NO_WEIGHT and not (kind in ("I32", "I64") and _LOOKUPS.fullmatch(tensor.name)):
            path = layout.path if tensor.file == NOWHERE else layout.files[tensor.file]
            raise UserError(
                f"{path}: tensor {tensor.name} is {kind}, which llama.cpp cannot compute"
                " with; convert the model to F32, F16, BF16 or a quantised type"
            )


def _layers(layout: ModelLayout, keys: Keys) -> None:
    n_layers = keys.integer(".block_count", 1, MAX_LAYERS)
    n_drafts = keys.integer(".nextn_predict_layers", 0, n_layers - 1, 0)
    matches = (re.match(r"blk\.(\d+)\.", t.name) for t in layout.tensors)
    present = {int(m[1]) for m in matches if m}
    if missing := sorted(set(range(n_layers - n_drafts)) - present):  # drafts may be left out
        raise keys.damaged(f"layer {missing[0]} of {n_layers} has no tensors")
    if max(present) >= n_layers:
        raise keys.damaged(f"it has tensors of layer {max(present)} but claims {n_layers} layers")


def _experts(layout: ModelLayout, keys: Keys) -> None:
    n_experts = keys.integer(".expert_count", 1, MAX_EXPERTS)
    used = keys.integers(".expert_used_count", 0, n_experts, layout.n_layers, ())
    for layer in layout.layers:
        if not used or used[layer.layer] < 1:
            raise keys.damaged(f"{layout.architecture}.expert_used_count is not given or zero")
    if 0 in used and not keys.has(".expert_feed_forward_length"):
        raise keys.damaged("a layer uses no experts, and their width is not given")
    groups = keys.integer(".expert_group_count", 0, max(0, n_experts - 1), 0)
    if groups > 1:
        if n_experts % groups:
            raise keys.damaged(f"{n_experts} experts do not divide into {groups} groups")
        keys.integer(".expert_group_used_count", 1, groups - 1)


def _embedding(layout: ModelLayout, keys: Keys) -> None:
    n_embd = keys.integer(".embedding_length", 1, 1 << 24)
    table = next((t for t in layout.tensors if t.name == "token_embd.weight"), None)
    if table is None:
        raise keys.damaged("tensor token_embd.weight is missing")
    if table.ne != (n_embd, layout.n_vocab):
        raise keys.damaged(
            f"token_embd.weight has shape {list(table.ne)}, but the embedding has {n_embd} items"
            f" and the vocabulary {layout.n_vocab} tokens",
        )


def _attention(layout: ModelLayout, keys: Keys) -> None:
    n_layers = layout.n_layers
    heads = keys.integers(".attention.head_count", 0, 1 << 16, n_layers, (0,) * n_layers)
    kv_heads = keys.integers(".attention.head_count_kv", 0, 1 << 16, n_layers, heads)
    for n, n_kv in zip(heads, kv_heads, strict=True):
        if n_kv and n % n_kv:
            raise keys.damaged(f"{n} attention heads do not share {n_kv} key-value heads evenly")
    if heads[0] == 0:  # llama.cpp divides by it, or takes every size for zero
        raise keys.damaged(f"{layout.architecture}.attention.head_count is not given or zero")
    arch, most = layout.architecture, 1 << 20
    even = keys.integer(".embedding_length") // heads[0]
    key = keys.integer(".attention.key_length", 1, most, even)
    value = keys.integer(".attention.value_length", 1, most, even)
    rotated = keys.integer(".rope.dimension_count", 0, most, key)
    key_swa = keys.integer(".attention.key_length_swa", 1, most, key)
    value_swa = keys.integer(".attention.value_length_swa", 1, most, value)
    rotated_swa = keys.integer(".rope.dimension_count_swa", 0, most, rotated)
    if arch in _EQUAL_KEY_VALUE and (key, key_swa) != (value, value_swa):
        raise keys.damaged(f"keys have {key} items but values {value}, which {arch} does not allow")
    if arch in _WHOLE_HEAD_ROTATED and (rotated, rotated_swa) != (key, key_swa):
        raise keys.damaged(f"{rotated} of {key} items of a head are rotated, but {arch} needs all")
    if arch in _NO_ROPE:
        return
    head = key
    if arch in _LATENT and keys.has(".attention.key_length_mla"):
        head = _latent_head(keys, key, value, rotated)
    for n, size in ((rotated, head), (rotated_swa, min(head, key_swa))):
        if n % 2 or not 0 < n <= size:
            raise keys.damaged(f"{n} of {size} items of a head are rotated: not an even part")


def _latent_head(keys: Keys, key: int, value: int, rotated: int) -> int:
    """The size of a head before compression; checks that the cached row is what is computed."""
    rank = keys.integer(".attention.kv_lora_rank", 1, 1 << 20)
    head = keys.integer(".attention.key_length_mla", rotated + 1, 1 << 20)
    keys.integer(".attention.value_length_mla", 1, 1 << 20)
    if set(keys.integers(".attention.head_count_kv", 0, 1 << 16, default=())) != {1}:
        raise keys.damaged(f"{keys.name('.attention.head_count_kv')} is not 1")
    if (key, value) != (rank + rotated, rank):
        raise keys.damaged(
            f"a cached row of {key} and {value} items does not hold {rank} and {rotated} rotated",
        )
    return head


def _recurrence(layout: ModelLayout, keys: Keys) -> None:
    """State-space and linear-attention layers: heads and groups must come out even."""
    if not keys.has(".ssm.inner_size"):
        return
    inner = keys.integer(".ssm.inner_size", 1, 1 << 24)
    doubled = inner == 2 * keys.integer(".embedding_length")
    if layout.architecture in ("jamba", "granitehybrid") and not doubled:
        raise keys.damaged(f"{layout.architecture}.ssm.inner_size is not twice the embedding")
    if layout.architecture == "jamba":  # there the rank is no number of heads
        return
    heads = keys.integer(".ssm.time_step_rank", 1, 1 << 16)
    groups = keys.integer(".ssm.group_count", 1, 1 << 16)
    if inner % heads or inner % groups or heads % groups:
        raise keys.damaged(f"{inner} state items, {heads} heads and {groups} groups do not divide")


def _window(layout: ModelLayout, keys: Keys) -> None:
    """An architecture with sliding windows must have one in some layer."""
    arch = layout.architecture
    default = 1 if arch == "llama4" else 0
    window = keys.integer(".attention.sliding_window", default=default)
    if arch not in _WINDOWED and not (arch in _WINDOWED_IF_SAID and window):
        return
    pattern = keys.value(".attention.sliding_window_pattern")
    flags = pattern[: layout.n_layers] if isinstance(pattern, tuple) else (pattern != 1,)
    if not any(flags):
        raise keys.damaged(f"no layer has a sliding window, which {arch} needs")


def _numbers(layout: ModelLayout, keys: Keys) -> None:
    for key, low, high in _BOUNDS.get(layout.architecture, ()):
        keys.integer(key, low, high)
    keys.integer(".context_length", 1, MAX_CONTEXT)
    if layout.architecture in _GATED:
        keys.integer(".expert_gating_func", 1, _MAX_GATING_FUNC)
    keys.integer(".expert_gating_func", 0, _MAX_GATING_FUNC, 0)
    keys.integer(".attention.sliding_window", 0, _MAX_WINDOW, 0)
    if layout.architecture == "gemma4":
        keys.integer(".attention.shared_kv_layers", 0, layout.n_layers - 2, 0)
    _window(layout, keys)
    scaling = keys.value(".rope.scaling.type")
    if scaling is not None and scaling not in _ROPE_SCALING:
        raise keys.damaged(f"{layout.architecture}.rope.scaling.type is {scaling!r:.60}")
    for key, pair in layout.metadata.pairs.items():
        if not key.startswith(layout.architecture + "."):
            continue
        values = pair.value if isinstance(pair.value, tuple) else (pair.value,)
        floats = [v for v in values if isinstance(v, float)]
        if any(math.isnan(v) for v in floats):
            raise keys.damaged(f"{key} is not a number")
        if key.endswith("epsilon") and not all(0 <= v < 1 for v in floats):
            raise keys.damaged(f"{key} is {floats[0]}")


def _vocabulary(layout: ModelLayout, keys: Keys) -> None:
    """llama.cpp asserts that tokens, as C sees them, are all different."""
    pair = layout.metadata.pairs.get("tokenizer.ggml.tokens")
    if pair is None or pair.item is not ValueType.STRING:
        return
    words = layout.metadata.strings(pair.key)
    if keys.text("tokenizer.ggml.model", "") == "llama":
        _byte_tokens(words, keys)
    tokens = {word.split(b"\0", 1)[0] for word in words}
    n_empty = 0
    if b"" in tokens:
        n_empty = sum(not w or w[0] == 0 for w in words) - 1
    if len(tokens) + n_empty != pair.count:
        raise keys.damaged("its vocabulary holds a token twice")


def _byte_tokens(words: Collection[bytes], keys: Keys) -> None:
    """A sentencepiece vocabulary without a token per byte ends the process on unknown text."""
    tokens = set(words)
    for byte in range(256):
        if b"<0x%02X>" % byte not in tokens and bytes((byte,)) not in tokens:
            raise keys.damaged(f"its vocabulary has no token for byte {byte}")


def _weights(layout: ModelLayout, keys: Keys) -> None:
    experts = {t.name for layer in layout.layers for t in layer.tensors}
    names = {t.name for t in layout.tensors}
    for first, second in _TOGETHER.get(layout.architecture, ()):
        for name in names:
            other = name.replace(first, second)
            if other not in names:
                raise keys.damaged(f"tensor {other} is missing")
    for tensor in layout.tensors:
        if tensor.name in experts or tensor.ggml_type == 0:
            continue
        if len(tensor.ne) == 1 or _ELEMENTWISE.fullmatch(tensor.name):
            kind = GGML_TYPES[tensor.ggml_type].name
            raise keys.damaged(f"tensor {tensor.name} is {kind}, but must be F32")
