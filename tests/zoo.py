"""One tiny random model for every MoE architecture that the pinned llama.cpp knows.

Owns what each architecture wants in its metadata, at about the smallest size that it takes. The
tensors are llama.cpp's own: it creates all that an architecture can have, this module gives them
values and has llama.cpp save the file, with all the keys that it writes. Knows nothing of the
runtime.

Every model has 16 experts of which a token uses 4. Their weights are random blocks of the types
in TYPES, so that a byte moved anywhere changes the logits; everything else is F32.
"""

from __future__ import annotations

import ctypes
import functools
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Quant
from mutant import Field, Mutant, Weight
from tiny import random_weights

from moe_gguf.runtime import logs
from moe_gguf.runtime.formats.gguf_header import ValueType

Value = bool | int | float | str | Sequence[int] | Sequence[float]
Keys = dict[str, Value]
Fields = Mapping[str, Field]

N_EXPERTS, N_USED = 16, 4
N_LAYERS, N_EMBD, N_HEAD, N_FF = 3, 64, 2, 64
EXPERT_TABLE = "blk.0.ffn_gate_tid2eid.weight"
TYPES = {"gate": Quant.Q8_0, "up": Quant.Q8_0, "gate_up": Quant.Q8_0, "down": Quant.Q5_0}


# --- what the architectures want ----------------------------------------------------------------

# Each key is asked for by several; who does not know one passes over it.
COMMON: Keys = {
    "context_length": 256,
    "embedding_length": N_EMBD,
    "block_count": N_LAYERS,
    "feed_forward_length": N_FF,
    "leading_dense_block_count": 1,
    "use_parallel_residual": False,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "full_attention_interval": 2,
    "expert_count": N_EXPERTS,
    "expert_used_count": N_USED,
    "expert_feed_forward_length": N_FF,
    "expert_shared_count": 1,
    "expert_shared_feed_forward_length": N_FF // 2,
    "expert_latent_length": N_FF,
    "expert_gating_func": 2,  # sigmoid
    "expert_group_scale": 1.0,
    "experts_per_group": 1,
    "interleave_moe_layer_step": 2,
    "attention.head_count": N_HEAD,
    "attention.head_count_kv": N_HEAD,
    "attention.max_alibi_bias": 8.0,
    "attention.clamp_kqv": 1.0,
    "attention.layer_norm_epsilon": 1e-5,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.q_lora_rank": 32,
    "attention.kv_lora_rank": 64,
    "attention.sliding_window": 32,
    "attention.sliding_window_pattern": 2,
    "attention.indexer.head_count": 4,
    "attention.indexer.key_length": 64,
    "attention.indexer.top_k": 1024,
    "attention.indexer.block_size": 4,
    "attention.indexer.kpool": 4,
    "attention.indexer.local_blocks": 1,
    "rope.dimension_sections": [8, 8, 8, 8],
    "ssm.inner_size": 2 * N_EMBD,
    "ssm.conv_kernel": 4,
    "ssm.state_size": 64,
    "ssm.time_step_rank": N_HEAD,
    "ssm.group_count": 2,
    "kda.head_dim": 64,
    "kda.safe_gate": True,
    "kda.gate_lower_bound": -5.0,
    "shortconv.l_cache": 3,
    "attn_res.block_size": 12,
    "activation.situ_beta": 4.0,
    "activation.situ_linear_beta": 25.0,
}

# Groups of keys, for several architectures each.
_WINDOWS: Keys = {"attention.sliding_window_pattern": [0, 1, 0]}
_LATENT: Keys = {  # multi-head latent attention: one cached row for all heads
    "attention.head_count": 1,
    "attention.head_count_kv": 1,
    "attention.kv_lora_rank": 64,
    "attention.key_length": 96,
    "attention.value_length": 64,
    "attention.key_length_mla": 64,
    "attention.value_length_mla": 64,
    "rope.dimension_count": 32,
}
# A layer without key-value heads is a recurrent one.
_HYBRID: Keys = {"attention.head_count": [2, 0, 2], "attention.head_count_kv": [2, 0, 2]}
_LATENT_HYBRID: Keys = _LATENT | {
    "attention.head_count": [1, 0, 1],
    "attention.head_count_kv": [1, 0, 1],
}
_HYPER: Keys = {
    "hyper_connection.count": 4,
    "hyper_connection.sinkhorn_iterations": 2,
    "hyper_connection.epsilon": 1e-6,
    "hyper_connection.magnitude": 2.0,
}
_CLAMPED: Keys = {
    "swiglu_clamp_exp": 10.0,
    "expert_weights_scale": 1.0,
    "expert_weights_norm": True,
}
_NEMOTRON: Keys = {  # a layer is one thing: attention, recurrence, or experts
    "block_count": 4,
    "feed_forward_length": [0, 0, N_FF, N_FF],
    "attention.head_count": [N_HEAD, 0, 0, 0],
    "attention.head_count_kv": [N_HEAD, 0, 0, 0],
}

# By architecture: what differs from COMMON.
MADE: dict[str, Keys] = {
    "afmoe": {},
    "arctic": {},
    "bailingmoe": {},
    "bailingmoe2": {},
    "bailingmoe3": _LATENT_HYBRID,
    "cohere2moe": _WINDOWS,
    "dbrx": {},
    "deepseek": {},
    "deepseek2": _LATENT,
    "deepseek2-ocr": {},
    "deepseek32": _LATENT,
    "deepseek4": _HYPER
    | _CLAMPED
    | {
        "block_count": 4,
        "attention.head_count_kv": 1,
        "attention.key_length": 64,
        "attention.value_length": 64,
        "rope.dimension_count": 32,
        "attention.output_group_count": 2,
        "attention.output_lora_rank": 32,
        "attention.compress_ratios": [0, 0, 4, 128],
        "attention.compress_rope_freq_base": 160000.0,
        "hash_layer_count": 1,  # the first layer's experts stand in a table of tokens
        "expert_gating_func": 4,  # the square root of softplus, and no other
    },
    "dots1": {},
    "dots3note": _LATENT
    | _WINDOWS
    | {
        "attention.kv_lora_rank_swa": 64,
        "attention.key_length_swa": 96,
        "attention.value_length_swa": 64,
        "attention.key_length_mla_swa": 64,
        "attention.value_length_mla_swa": 64,
        "attention.indexer.types": [1, 0, 1],
        "rope.freq_base_swa": 10000.0,
    },
    "ernie4_5-moe": {"interleave_moe_layer_step": 1},
    "exaone-moe": {},
    "gemma4": {
        "embedding_length_per_layer_input": 32,
        "attention.key_length_swa": 32,
        "attention.value_length_swa": 32,
        "attention.sliding_window_pattern": [True, True, False],
    },
    "glm4moe": {},
    "glm-dsa": _LATENT,
    "glm5-next": _LATENT_HYBRID
    | _HYPER
    | {"attention.head_count": 1, "attention.key_length": 64, "rope.dimension_count": 0},
    "gpt-oss": {},
    "granite": {},
    "granite_swa": _WINDOWS,
    "granitehybrid": _HYBRID,
    "granitemoe": {},
    "grok": {},
    "grovemoe": {},
    "hunyuan-moe": {},
    "hy_v3": {},
    "hy_v4": _LATENT | _HYPER | _CLAMPED | {"attention.indexer.types": [1, 0, 1]},
    "jamba": _HYBRID,
    "kimi-k3": _LATENT_HYBRID,
    "kimi-linear": _LATENT_HYBRID,
    "laguna": {},
    "lfm2moe": _HYBRID,
    "llada-moe": {},
    "llama": {},
    "llama-embed": {},
    "llama4": {"block_count": 4},  # every fourth layer does without rotation
    "maple": _WINDOWS | {"swiglu_clamp_exp": 7.0},
    "mellum": {},
    "mimo2": _WINDOWS,
    "minicpm": {},
    "minimax-01": {},
    "minimax-m2": {},
    "minimax-m3": {"attention.indexer.head_count": N_HEAD},
    "mistral3": {},
    "mistral4": _LATENT,
    "nemotron_h": _NEMOTRON,
    "nemotron_h_moe": _NEMOTRON,
    "nomic-bert-moe": {"moe_every_n_layers": 2},
    "olmoe": {},
    "phimoe": {},
    "qwen2moe": {},
    "qwen35moe": {},
    "qwen3moe": {},
    "qwen3next": {},
    "qwen3vlmoe": {},
    "qwen4exp": _HYPER
    | {
        "hyper_connection.low_rank": 8,
        "attention.indexer.key_length": 32,
        "attention.compress_ratios": [4, 4, 4],
        "embedding_length_per_layer_input": 16,
        "ple.layers": [0],
        "ple.ngram_size": 3,
        "ple.heads_per_ngram": 2,
        "ple.conv_kernel": 4,
        "ple.eos_token_id": 0,
        "ple.layer_multipliers": [1, 3, 5],
        "ple.head_offsets": [0, 300, 600, 900],
        "ple.head_vocab_sizes": [300, 300, 300, 300],
    },
    "refact": {},
    "rnd1": {},
    "smallthinker": {},
    "step35": _WINDOWS,
}

# Named by llama.cpp, and never a model of its own.
UNMADE: dict[str, str] = {
    "clip": "the encoder of images that goes with a model; llama.cpp refuses it as one",
    "dflash": "drafts for another model, whose layers its graph reads (its own may have experts)",
    "eagle3": "drafts for another model, whose layers its graph reads",
    "gemma4-assistant": "drafts for another model, whose cache its graph reads",
    "gptj": "a name without a loader",
    "wavtokenizer-dec": "the decoder of sound that goes with a model",
}

# llama.cpp creates experts for them, and then computes without.
IDLE = ("refact",)

# They end in embeddings, without logits.
EMBEDDERS = ("llama-embed", "nomic-bert-moe")

_RWKV: Keys = {
    "wkv.head_size": 32,
    "time_mix_extra_dim": 32,
    "time_decay_extra_dim": 32,
    "attention.decay_lora_rank": 32,
    "attention.iclr_lora_rank": 32,
    "attention.value_residual_mix_lora_rank": 32,
    "attention.gate_lora_rank": 32,
}
# What else some of the dense architectures ask for before they show their tensors.
DENSE: dict[str, Keys] = {
    "graniteswitch": {
        "adapters.count": 1,
        "adapters.lora_rank": 8,
        "adapters.token_ids_activate": [1],
        "adapters.token_ids_substitute": [2],
    },
    "hrm_text": {"hrm.layers_per_stack": 1, "hrm.h_cycles": 1, "hrm.l_cycles": 2},
    "spark2_5": _WINDOWS,
    "t5": {"attention.relative_buckets_count": 8},
    "t5encoder": {"attention.relative_buckets_count": 8},
    "rwkv6": _RWKV,
    "rwkv6qwen2": _RWKV,
    "rwkv7": _RWKV,
    "arwkv7": _RWKV,
}

_LONG = ("ple.layer_multipliers", "ple.head_offsets", "ple.head_vocab_sizes")
# What llama_model_save_to_file aborts on, or writes without a key or a tensor that it needs.
_UNSAVED = ("gemma4", "nomic-bert-moe", "step35")


# --- making one ---------------------------------------------------------------------------------


class _InitParams(ctypes.Structure):
    """gguf_init_params."""

    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


@functools.cache
def _ggml() -> ctypes.CDLL:
    lib: ctypes.CDLL = llama_cpp.llama_cpp._lib
    pointer = ctypes.c_void_p
    for name, restype, argtypes in (
        ("gguf_init_from_file", pointer, [ctypes.c_char_p, _InitParams]),
        ("gguf_free", None, [pointer]),
        ("ggml_get_name", ctypes.c_char_p, [pointer]),
        ("ggml_get_data", pointer, [pointer]),
        ("ggml_nbytes", ctypes.c_size_t, [pointer]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = restype, argtypes
    return lib


class _Head(ctypes.Structure):
    """The first fields of a ggml_tensor."""

    _fields_ = [("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4)]


def write(architecture: str, path: Path, vocabulary: Fields, **more: Value) -> None:
    """Make the model of this architecture, with these tokenizer keys and more of its own."""
    with _made(architecture, path, vocabulary, more) as (model, mutant):
        if architecture in _UNSAVED:
            mutant.write(path)
        else:
            llama_cpp.llama_model_save_to_file(model, str(path).encode())


def expert_tensors(architecture: str, path: Path, vocabulary: Fields) -> list[str]:
    """Names of the routed experts that an architecture has if its metadata speaks of experts."""
    with _made(architecture, path, vocabulary) as (_, mutant):
        return [name for name in mutant.weights if "_exps." in name]


@contextmanager
def _made(
    architecture: str, path: Path, vocabulary: Fields, more: Keys | None = None
) -> Iterator[tuple[llama_cpp.llama_model_p, Mutant]]:
    """llama.cpp's model and the file that it would be; ``path`` is where metadata may lie."""
    keys = COMMON | (MADE | DENSE).get(architecture, {}) | (more or {})
    metadata = Mutant(_fields(architecture, keys, vocabulary), dict(_wanted_types()))
    made = Mutant(metadata.fields, {})

    @llama_cpp.llama_model_set_tensor_data_t
    def fill(tensor: int, _: Any) -> None:
        name = _ggml().ggml_get_name(tensor).decode()
        head = _Head.from_address(tensor)
        ne = list(head.ne)
        while len(ne) > 1 and ne[-1] == 1:
            ne.pop()
        data = _values(name, ne, Quant(head.type)).tobytes()
        assert len(data) == _ggml().ggml_nbytes(tensor), name
        ctypes.memmove(_ggml().ggml_get_data(tensor), data, len(data))
        made.weights[name] = Weight(ne, head.type, data)

    with logs.capture() as log:
        raw = str(metadata.write(path)).encode()
        context = _ggml().gguf_init_from_file(raw, _InitParams(True, None))
        params = llama_cpp.llama_model_default_params()
        params.load_mtp = True  # draft layers, where keys ask for some
        model = llama_cpp.llama_model_init_from_user(context, fill, None, params)
        _ggml().gguf_free(context)
        if not model:
            raise ValueError(f"llama.cpp cannot make {architecture}: {log.reason()}")
        try:
            yield model, made
        finally:
            llama_cpp.llama_model_free(model)


def _fields(architecture: str, keys: Keys, vocabulary: Fields) -> dict[str, Field]:
    fields = {
        "general.architecture": Field(ValueType.STRING, architecture),
        "general.name": Field(ValueType.STRING, "zoo"),  # llama.cpp knows some names and acts
    }
    for key, value in keys.items():
        fields[f"{architecture}.{key}"] = _field(key, value)
    fields |= {k: v for k, v in vocabulary.items() if k.startswith("tokenizer.")}
    fields["tokenizer.ggml.token_type_count"] = Field(ValueType.UINT32, 2)
    for name in ("alpha_n", "alpha_p", "beta", "eps"):  # apertus; not named after it
        fields[f"xielu.{name}"] = Field(ValueType.FLOAT32, 1.0)
    return fields


def _field(key: str, value: Value) -> Field:
    items = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else None
    first = items[0] if items else value
    kinds = {bool: ValueType.BOOL, int: ValueType.UINT32, float: ValueType.FLOAT32}
    kind = ValueType.UINT64 if key in _LONG else kinds.get(type(first), ValueType.STRING)
    return Field(kind, value if items is None else items)  # type: ignore[arg-type]


def _wanted_types() -> Iterator[tuple[str, Weight]]:
    """What tells llama.cpp the types of experts: it asks a tensor of that name, whatever its
    shape."""
    for layer in range(4):
        for part, quant in TYPES.items():
            data = random_weights(np.random.default_rng(0), quant, [32], 1.0).tobytes()
            yield f"blk.{layer}.ffn_{part}_exps.weight", Weight([32], int(quant), data)
    yield EXPERT_TABLE, Weight([1], int(Quant.I32), bytes(4))


def _values(name: str, ne: Sequence[int], quant: Quant) -> npt.NDArray[Any]:
    """Random, by the name alone: norms and scales about 1, decays of a state negative, and rows
    of matrices that keep the variance. A router's are steeper, so that it decides clearly."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name == EXPERT_TABLE:
        ranked = rng.random((ne[1], N_EXPERTS)).argsort(axis=1)
        return ranked[:, : ne[0]].astype(np.int32)
    if re.search(r"ssm_a\b", name):
        return -np.abs(random_weights(rng, Quant.F32, ne, 1.0))
    if "norm" in name or "scale" in name or len(ne) == 1:
        values = random_weights(rng, Quant.F32, ne, 0.1)
        return values + np.float32("norm" in name or "scale" in name)
    gain = 3.0 if "gate_inp" in name else 1.5
    return random_weights(rng, quant, [*reversed(ne)], gain / ne[0] ** 0.5)


# --- what the library knows ---------------------------------------------------------------------


def architectures() -> list[str]:
    """Every architecture of the installed llama.cpp, by its own C++ function."""
    name_of = _ggml()._Z13llm_arch_name8llm_arch  # llm_arch_name(llm_arch), not part of the API
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.c_int]
    names: list[str] = []
    while (name := name_of(len(names)).decode()) not in ("unknown", "(unknown)"):
        names.append(name)
    return names


# --- the README ---------------------------------------------------------------------------------

README = Path(__file__).parents[1] / "README.md"
_BEGIN, _END = "<!-- architectures -->", "<!-- /architectures -->"


def with_list(readme: str) -> str:
    """The README with the list as it should be, between its two marks."""
    head, rest = readme.split(_BEGIN)
    tail = rest.split(_END)[1]
    names = ", ".join(sorted(MADE))
    return f"{head}{_BEGIN}{names} ({len(MADE)} in all){_END}{tail}"


if __name__ == "__main__":
    README.write_text(with_list(README.read_text()))
