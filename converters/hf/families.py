"""The Hugging Face model families `convert` knows: what their checkpoints hold, and its meaning.

Owns, for each family, the keys llama.cpp wants, the tensors and how some are rearranged on the
way. Where llama.cpp computes one thing only, a configuration that asks for another is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gguf import MODEL_ARCH, RopeScalingType
from numpy.typing import NDArray

from ...runtime.errors import UserError
from .wants import OTHER_WAY, Config, Groups, WantExperts, Wants, rope_number

Array = NDArray[Any]

SUPPORTED = "Mixtral, Qwen2-MoE, Qwen3-MoE, DeepSeek-MoE, DeepSeek-V2, OLMoE and gpt-oss"


def _mixtral(config: Config) -> Wants:
    p = Wants(config, MODEL_ARCH.LLAMA)
    p.only(hidden_act="silu", attention_bias=False)
    p.keys(ff="intermediate_size")
    p.writer.add_vocab_size(config.count("vocab_size"))
    p.writer.add_rope_dimension_count(config.head_dim)
    for layer, at in p.layers():
        p.attention(at, rotate=True)
        moe, fused = f"{at}.block_sparse_moe", f"{at}.mlp"
        p.tensor(
            f"{moe}.gate.weight", p.n_experts, p.hidden, also=f"{fused}.gate.weight", as_f32=True
        )
        parts = ("w1", "w3", "w2")
        p.experts.append(WantExperts(layer, f"{moe}.experts", f"{fused}.experts", parts))
    return p


def _qwen2_moe(config: Config) -> Wants:
    p = Wants(config, MODEL_ARCH.QWEN2MOE)
    p.only(
        hidden_act="silu",
        norm_topk_prob=False,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        use_sliding_window=False,
    )
    p.keys(ff="moe_intermediate_size")
    shared = config.count("shared_expert_intermediate_size")
    p.writer.add_expert_feed_forward_length(p.ff)
    p.writer.add_expert_shared_feed_forward_length(shared)
    for layer, at in p.layers():
        p.attention(at, ("q", "k", "v") if config.get("qkv_bias") else ())
        p.moe(layer)
        p.swiglu(f"{at}.mlp.shared_expert", shared)
        p.tensor(f"{at}.mlp.shared_expert_gate.weight", 1, p.hidden, as_f32=True)
    return p


def _qwen3_moe(config: Config) -> Wants:
    p = Wants(config, MODEL_ARCH.QWEN3MOE)
    p.only(
        hidden_act="silu",
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        use_sliding_window=False,
        attention_bias=False,
    )
    p.keys(ff="moe_intermediate_size")
    p.writer.add_expert_feed_forward_length(p.ff)
    for layer, at in p.layers():
        p.attention(at)
        p.tensor(f"{at}.self_attn.q_norm.weight", config.head_dim)
        p.tensor(f"{at}.self_attn.k_norm.weight", config.head_dim)
        p.moe(layer)
    return p


def _olmoe(config: Config) -> Wants:
    p = Wants(config, MODEL_ARCH.OLMOE)
    p.only(hidden_act="silu", norm_topk_prob=False, attention_bias=False, clip_qkv=None)
    p.keys(ff="intermediate_size")
    p.only(num_key_value_heads=config.count("num_attention_heads"))
    for layer, at in p.layers():
        p.attention(at)
        # Over all heads at once, unlike everyone else's.
        p.tensor(f"{at}.self_attn.q_norm.weight", p.hidden)
        p.tensor(f"{at}.self_attn.k_norm.weight", p.hidden)
        p.moe(layer)
    return p


def _gpt_oss(config: Config) -> Wants:
    p = Wants(config, MODEL_ARCH.GPT_OSS, alternating=True)
    p.only(attention_bias=True, swiglu_alpha=1.702, swiglu_limit=7.0)
    p.keys(ff="intermediate_size")
    turns = ["sliding_attention", "full_attention"]
    p.only(layer_types=[turns[layer % 2] for layer in range(p.n_layers)])
    p.writer.add_sliding_window(config.count("sliding_window"))
    p.writer.add_expert_feed_forward_length(p.ff)
    n, ff = p.n_experts, p.ff
    for layer, at in p.layers():
        p.attention(at, ("q", "k", "v", "o"))
        sinks = f"{at}.self_attn.sinks"
        p.tensor(f"{sinks}.weight", config.count("num_attention_heads"), source=sinks)
        p.tensor(f"{at}.mlp.router.weight", n, p.hidden, as_f32=True)
        p.tensor(f"{at}.mlp.router.bias", n)
        moe = f"{at}.mlp.experts"
        for part, first in (("gate", 0), ("up", 1)):
            p.tensor(
                f"{moe}.{part}_proj.bias",
                n,
                2 * ff,
                source=f"{moe}.gate_up_proj_bias",
                ne=(ff, n),
                groups=Groups(1, 1, _every_other(first)),
                as_f32=True,
            )
        p.tensor(f"{moe}.down_proj.bias", n, p.hidden, source=f"{moe}.down_proj_bias", as_f32=True)
        p.experts.append(WantExperts(layer, moe, moe))
    return p


def _every_other(first: int) -> Callable[[Array], Array]:
    return lambda rows: rows[:, first::2]


def _deepseek_moe(p: Wants, layer: int, dense: int) -> None:
    """A layer's feed-forward part: dense in the first layers, then routed and shared experts."""
    at = f"model.layers.{layer}.mlp"
    if layer < dense:
        p.swiglu(at, p.config.count("intermediate_size"))
    else:
        p.moe(layer)
        p.swiglu(f"{at}.shared_experts", p.ff * p.config.count("n_shared_experts"))


def _deepseek_keys(p: Wants) -> int:
    """Keys of both generations; the number of leading dense layers."""
    dense = p.config.get("first_k_dense_replace", 0)
    if type(dense) is not int or not 0 <= dense < p.n_layers:
        raise UserError(
            f"{p.config.path}: first_k_dense_replace should be less than the number "
            f"of layers, not {dense!r}"
        )
    p.writer.add_leading_dense_block_count(dense)
    p.writer.add_vocab_size(p.config.count("vocab_size"))
    p.writer.add_expert_feed_forward_length(p.ff)
    p.writer.add_expert_shared_count(p.config.count("n_shared_experts"))
    return dense


def _deepseek(config: Config) -> Wants:
    p = Wants(config, MODEL_ARCH.DEEPSEEK)
    p.only(
        hidden_act="silu",
        norm_topk_prob=False,
        scoring_func="softmax",
        moe_layer_freq=1,
        attention_bias=False,
    )
    p.keys(ff="moe_intermediate_size")
    if config.rope["rope_type"] == "default":
        p.writer.add_rope_scaling_type(RopeScalingType.NONE)
    p.writer.add_rope_dimension_count(config.head_dim)
    p.writer.add_expert_weights_scale(1.0)
    dense = _deepseek_keys(p)
    for layer, at in p.layers():
        p.attention(at, rotate=True)
        _deepseek_moe(p, layer, dense)
    return p


_LITE_LAYERS = (26, 27)  # how llama.cpp tells DeepSeek-V2-Lite from V2


def _deepseek_v2(config: Config) -> Wants:
    p = Wants(config, MODEL_ARCH.DEEPSEEK2)
    p.only(
        hidden_act="silu",
        scoring_func="softmax",
        moe_layer_freq=1,
        attention_bias=False,
        mlp_bias=False,
    )
    # transformers calls the rotary part of a head head_dim; the keys below say it better.
    config.values.pop("head_dim", None)
    p.keys(ff="moe_intermediate_size")
    w, rank = p.writer, config.count("kv_lora_rank")
    nope, rope = config.count("qk_nope_head_dim"), config.count("qk_rope_head_dim")
    value = config.count("v_head_dim")
    # Multi-head latent attention runs as one shared key head: the compressed row and its rope part.
    w.kv_data[0].pop(f"{w.arch}.attention.head_count_kv")
    w.add_head_count_kv(1)
    dense = _deepseek_keys(p)
    q_rank = None if config.get("q_lora_rank") is None else config.count("q_lora_rank")
    if q_rank is not None:
        w.add_q_lora_rank(q_rank)
    if (q_rank is None) != (p.n_layers in _LITE_LAYERS):
        raise UserError(
            f"{config.path}: llama.cpp expects uncompressed queries (no q_lora_rank) with 26 or 27 "
            f"layers and nowhere else, but this model has {p.n_layers}; use another model"
        )
    w.add_kv_lora_rank(rank)
    w.add_key_length(rank + rope)
    w.add_value_length(rank)
    w.add_key_length_mla(nope + rope)
    w.add_value_length_mla(value)
    w.add_expert_weights_scale(config.number("routed_scaling_factor", 1.0))
    if config.get("norm_topk_prob", False):
        w.add_expert_weights_norm(True)
    if config.get("n_group") is not None and config.get("topk_method") != "greedy":
        w.add_expert_group_count(config.count("n_group"))
        w.add_expert_group_used_count(config.count("topk_group"))
    w.add_rope_dimension_count(rope)
    if "mscale_all_dim" in config.rope:  # llama.cpp divides by the same 0.1 for this architecture
        w.add_rope_scaling_yarn_log_mul(0.1 * rope_number(config, config.rope, "mscale_all_dim"))
    for layer, at in p.layers():
        _latent_attention(p, f"{at}.self_attn", q_rank)
        _deepseek_moe(p, layer, dense)
    return p


def _latent_attention(p: Wants, attn: str, q_rank: int | None) -> None:
    """Queries and key-value rows through ranks; kv_b is two matrices of every head in one."""
    count = p.config.count
    heads, rank = count("num_attention_heads"), count("kv_lora_rank")
    nope, rope, value = count("qk_nope_head_dim"), count("qk_rope_head_dim"), count("v_head_dim")
    q = heads * (nope + rope)
    if q_rank is None:
        p.tensor(f"{attn}.q_proj.weight", q, p.hidden)
    else:
        p.tensor(f"{attn}.q_a_proj.weight", q_rank, p.hidden)
        p.tensor(f"{attn}.q_a_layernorm.weight", q_rank)
        p.tensor(f"{attn}.q_b_proj.weight", q, q_rank)
    p.tensor(f"{attn}.kv_a_proj_with_mqa.weight", rank + rope, p.hidden)
    p.tensor(f"{attn}.kv_a_layernorm.weight", rank)
    both, stored = f"{attn}.kv_b_proj.weight", (heads * (nope + value), rank)
    p.tensor(
        f"{attn}.k_b_proj.weight",
        *stored,
        source=both,
        ne=(nope, rank, heads),
        groups=Groups(nope + value, rank, lambda head: head[:nope].T),
    )
    p.tensor(
        f"{attn}.v_b_proj.weight",
        *stored,
        source=both,
        ne=(rank, value, heads),
        groups=Groups(nope + value, value, lambda head: head[nope:]),
    )
    p.tensor(f"{attn}.o_proj.weight", p.hidden, heads * value)


FAMILIES: dict[str, Callable[[Config], Wants]] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "deepseek": _deepseek,
    "deepseek_v2": _deepseek_v2,
    "olmoe": _olmoe,
    "gpt_oss": _gpt_oss,
}


def wants_of(config: Config) -> Wants:
    """What a checkpoint with this configuration must hold."""
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(
            f"{config.path}: model type {family!r} is not among {SUPPORTED}; {OTHER_WAY}"
        )
    quantized = config.get("quantization_config")
    method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
    if method is not None and (family, method) != ("gpt_oss", "mxfp4"):
        raise UserError(
            f"{config.path}: the weights are quantized ({method}); give the unquantized "
            f"checkpoint, or {OTHER_WAY}"
        )
    return FAMILIES[family](config)
