"""The Hugging Face model families `convert` knows: what their configuration means in GGUF.

Owns, for each family, the metadata keys llama.cpp wants, the tensors a checkpoint must hold with
their shapes, and how some are rearranged on the way. Reads no weights and no tokenizer. Where
llama.cpp computes one thing only, a configuration that asks for another is refused here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import (
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    ExpertGatingFuncType,
    GGUFWriter,
    RopeScalingType,
    TensorNameMap,
    get_tensor_name_map,
)
from numpy.typing import NDArray

from moe_gguf.converters.checkpoint import read_json
from moe_gguf.runtime.errors import UserError

Array = NDArray[Any]

SUPPORTED = "Mixtral, Qwen2-MoE, Qwen3-MoE, DeepSeek-MoE, DeepSeek-V2, OLMoE and gpt-oss"
OTHER_WAY = (
    "make a GGUF of it with llama.cpp's convert_hf_to_gguf.py and give that to `moe-gguf convert`"
)


class Config:
    """config.json, asked for one value at a time."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "config.json"
        if not self.path.exists():
            raise UserError(
                f"{folder} has no config.json; give the folder of a Hugging Face model, or a GGUF"
            )
        self.values = read_json(self.path)

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def count(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if type(value) is not int or value <= 0:
            raise UserError(f"{self.path}: {key} should be a positive whole number, not {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if type(value) not in (int, float):
            raise UserError(f"{self.path}: {key} should be a number, not {value!r}")
        return float(value)

    @property
    def head_dim(self) -> int:
        heads = self.count("num_attention_heads")
        return self.count("head_dim", self.count("hidden_size") // heads or 1)

    @property
    def n_experts(self) -> int:
        """Under the name of its family, or the one transformers 5 gave it."""
        names = ("num_experts", "num_local_experts", "n_routed_experts")
        return self.count(next((name for name in names if name in self.values), names[0]))

    @property
    def rope(self) -> dict[str, Any]:
        """Rotary parameters under one set of names; transformers 5 moved them."""
        raw = self.get("rope_parameters", self.get("rope_scaling", {}))
        if not isinstance(raw, dict):
            raise UserError(f"{self.path}: the rope parameters should be an object, not {raw!r}")
        rope = {key: value for key, value in raw.items() if value is not None}
        rope.setdefault("rope_type", rope.get("type", "default"))
        for key in ("rope_theta", "original_max_position_embeddings"):
            if key not in rope and self.get(key) is not None:
                rope[key] = self.get(key)
        return rope


@dataclass(frozen=True)
class Groups:
    """Rows taken in groups (heads, experts), each group rearranged by itself.

    ``apply`` maps [rows_in, row length] of the checkpoint to [rows_out, row length out].
    """

    rows_in: int
    rows_out: int
    apply: Callable[[Array], Array]


@dataclass(frozen=True)
class Want:
    """One tensor of the trunk: its names in the checkpoint (the first there is), shape, and place.

    ``ne`` is in ggml's order; without ``groups`` it is the shape reversed.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    target: str
    ne: tuple[int, ...]
    groups: Groups | None = None
    as_f32: bool = False


@dataclass(frozen=True)
class WantExperts:
    """The experts of one layer: ``prefix`` + ``.7.gate_proj.weight`` or a fused tensor.

    ``parts`` are the names of gate, up and down where each expert's matrices lie apart;
    ``fused_prefix`` is where transformers' own classes keep all of them in one tensor.
    """

    layer: int
    prefix: str
    fused_prefix: str
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


@dataclass
class Plan:
    """What one checkpoint must hold and what becomes of it; filled by its family's function."""

    config: Config
    arch: MODEL_ARCH
    alternating: bool = False  # fused experts keep gate and up in turns, and transposed
    writer: GGUFWriter = field(init=False)  # a collector of keys: it writes no file
    trunk: list[Want] = field(default_factory=list)
    experts: list[WantExperts] = field(default_factory=list)
    n_experts: int = 0
    ff: int = 0  # of one expert
    n_layers: int = 0
    hidden: int = 0
    _map: TensorNameMap = field(init=False)

    def __post_init__(self) -> None:
        self.writer = GGUFWriter(path=None, arch=MODEL_ARCH_NAMES[self.arch])
        self.n_layers = self.config.count("num_hidden_layers")
        self.hidden = self.config.count("hidden_size")
        self._map = get_tensor_name_map(self.arch, self.n_layers)

    def tensor(
        self,
        name: str,
        *shape: int,
        also: str | None = None,
        source: str | None = None,
        ne: tuple[int, ...] | None = None,
        groups: Groups | None = None,
        as_f32: bool = False,
    ) -> None:
        """``name`` is llama.cpp's idea of it; ``source`` and ``also`` where it really is."""
        target = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target is not None, name
        names = (source or name,) if also is None else (source or name, also)
        small = as_f32 or len(shape) == 1 or target.endswith("_norm.weight")
        self.trunk.append(Want(names, shape, target, ne or shape[::-1], groups, small))

    def ends(self) -> None:
        """The tensors outside the layers; a tied output is not stored twice."""
        vocab = self.config.count("vocab_size")
        self.tensor("model.embed_tokens.weight", vocab, self.hidden)
        self.tensor("model.norm.weight", self.hidden)
        if not self.config.get("tie_word_embeddings", False):
            self.tensor("lm_head.weight", vocab, self.hidden)

    def norms(self, at: str) -> None:
        self.tensor(f"{at}.input_layernorm.weight", self.hidden)
        self.tensor(f"{at}.post_attention_layernorm.weight", self.hidden)

    def attention(self, at: str, biases: tuple[str, ...] = (), rotate: bool = False) -> None:
        """Grouped-query attention; ``rotate`` brings q and k to llama.cpp's first rope layout."""
        c, dim = self.config, self.config.head_dim
        q = c.count("num_attention_heads") * dim
        kv = c.count("num_key_value_heads", c.count("num_attention_heads")) * dim
        halves = Groups(dim, dim, _halves_to_pairs) if rotate else None
        for part, shape in {"q": (q, self.hidden), "k": (kv, self.hidden)}.items():
            self.tensor(f"{at}.self_attn.{part}_proj.weight", *shape, groups=halves)
        self.tensor(f"{at}.self_attn.v_proj.weight", kv, self.hidden)
        self.tensor(f"{at}.self_attn.o_proj.weight", self.hidden, q)
        for part in biases:
            rows = {"q": q, "k": kv, "v": kv, "o": self.hidden}[part]
            self.tensor(f"{at}.self_attn.{part}_proj.bias", rows)

    def swiglu(self, at: str, ff: int) -> None:
        self.tensor(f"{at}.gate_proj.weight", ff, self.hidden)
        self.tensor(f"{at}.up_proj.weight", ff, self.hidden)
        self.tensor(f"{at}.down_proj.weight", self.hidden, ff)

    def moe(self, layer: int) -> None:
        """A softmax router and its experts, as most families name them."""
        at = f"model.layers.{layer}.mlp"
        self.tensor(f"{at}.gate.weight", self.n_experts, self.hidden, as_f32=True)
        self.experts.append(WantExperts(layer, f"{at}.experts", f"{at}.experts"))

    def keys(self, *, ff: str, eps: float = 1e-6) -> None:
        """The keys every architecture has; ``ff`` is config.json's name for an expert's width."""
        c, w = self.config, self.writer
        self.n_experts, self.ff = c.n_experts, c.count(ff)
        heads = c.count("num_attention_heads")
        w.add_block_count(self.n_layers)
        w.add_context_length(c.count("max_position_embeddings"))
        w.add_embedding_length(self.hidden)
        w.add_feed_forward_length(c.count("intermediate_size"))
        w.add_head_count(heads)
        w.add_head_count_kv(c.count("num_key_value_heads", heads))
        self._rope_keys()
        w.add_layer_norm_rms_eps(c.number("rms_norm_eps", eps))
        w.add_expert_count(self.n_experts)
        used = c.count("num_experts_per_tok")
        if used > self.n_experts:
            raise UserError(f"{c.path} uses {used} of {self.n_experts} experts; download it again")
        w.add_expert_used_count(used)
        if c.get("scoring_func") == "softmax":
            w.add_expert_gating_func(ExpertGatingFuncType.SOFTMAX)
        if c.get("head_dim") is not None:
            w.add_key_length(c.head_dim)
            w.add_value_length(c.head_dim)

    def _rope_keys(self) -> None:
        c, w, rope = self.config, self.writer, self.config.rope
        kind = rope["rope_type"]
        if kind in ("linear", "yarn"):
            w.add_rope_scaling_type(RopeScalingType(kind))
            w.add_rope_scaling_factor(_number(c, rope, "factor"))
        elif kind != "default":
            raise UserError(
                f"{c.path}: rope type {kind!r} is not one this converter knows; " + OTHER_WAY
            )
        if kind == "yarn":
            rope.setdefault("original_max_position_embeddings", c.count("max_position_embeddings"))
            context = _number(c, rope, "original_max_position_embeddings")
            w.add_rope_scaling_orig_ctx_len(int(context))
            for key, add in {
                "extrapolation_factor": w.add_rope_scaling_yarn_ext_factor,
                "attention_factor": w.add_rope_scaling_yarn_attn_factor,
                "beta_fast": w.add_rope_scaling_yarn_beta_fast,
                "beta_slow": w.add_rope_scaling_yarn_beta_slow,
            }.items():
                if key in rope:
                    add(_number(c, rope, key))
        if "rope_theta" in rope:
            w.add_rope_freq_base(_number(c, rope, "rope_theta"))

    def only(self, **allowed: Any) -> None:
        """Refuse a configuration that llama.cpp would compute differently; absent is fine."""
        for key, value in allowed.items():
            found = self.config.get(key, value)
            if found != value:
                raise UserError(
                    f"{self.config.path}: {key} is {found!r}, and llama.cpp's "
                    f"{MODEL_ARCH_NAMES[self.arch]} computes {value!r} only; use another model"
                )


def _number(config: Config, rope: dict[str, Any], key: str) -> float:
    value = rope.get(key)
    if not isinstance(value, int | float):
        raise UserError(f"{config.path}: rope {key} should be a number, not {value!r}")
    return float(value)


def _halves_to_pairs(head: Array) -> Array:
    """Rotary partners from (i, i + dim/2) to (2i, 2i + 1)."""
    return head.reshape(2, len(head) // 2, -1).swapaxes(0, 1).reshape(head.shape)


def _mixtral(config: Config) -> Plan:
    p = Plan(config, MODEL_ARCH.LLAMA)
    p.only(hidden_act="silu", attention_bias=False)
    p.keys(ff="intermediate_size", eps=1e-5)
    p.writer.add_vocab_size(config.count("vocab_size"))
    p.writer.add_rope_dimension_count(config.head_dim)
    p.ends()
    for layer in range(p.n_layers):
        at = f"model.layers.{layer}"
        p.norms(at)
        p.attention(at, rotate=True)
        moe, fused = f"{at}.block_sparse_moe", f"{at}.mlp"
        p.tensor(
            f"{moe}.gate.weight", p.n_experts, p.hidden, also=f"{fused}.gate.weight", as_f32=True
        )
        parts = ("w1", "w3", "w2")
        p.experts.append(WantExperts(layer, f"{moe}.experts", f"{fused}.experts", parts))
    return p


def _qwen2_moe(config: Config) -> Plan:
    p = Plan(config, MODEL_ARCH.QWEN2MOE)
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
    p.ends()
    for layer in range(p.n_layers):
        at = f"model.layers.{layer}"
        p.norms(at)
        p.attention(at, ("q", "k", "v") if config.get("qkv_bias", True) else ())
        p.moe(layer)
        p.swiglu(f"{at}.mlp.shared_expert", shared)
        p.tensor(f"{at}.mlp.shared_expert_gate.weight", 1, p.hidden, as_f32=True)
    return p


def _qwen3_moe(config: Config) -> Plan:
    p = Plan(config, MODEL_ARCH.QWEN3MOE)
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
    p.ends()
    for layer in range(p.n_layers):
        at = f"model.layers.{layer}"
        p.norms(at)
        p.attention(at)
        p.tensor(f"{at}.self_attn.q_norm.weight", config.head_dim)
        p.tensor(f"{at}.self_attn.k_norm.weight", config.head_dim)
        p.moe(layer)
    return p


def _olmoe(config: Config) -> Plan:
    p = Plan(config, MODEL_ARCH.OLMOE)
    p.only(hidden_act="silu", norm_topk_prob=False, attention_bias=False, clip_qkv=None)
    p.keys(ff="intermediate_size", eps=1e-5)
    p.only(num_key_value_heads=config.count("num_attention_heads"))
    p.ends()
    for layer in range(p.n_layers):
        at = f"model.layers.{layer}"
        p.norms(at)
        p.attention(at)
        # Over all heads at once, unlike everyone else's.
        p.tensor(f"{at}.self_attn.q_norm.weight", p.hidden)
        p.tensor(f"{at}.self_attn.k_norm.weight", p.hidden)
        p.moe(layer)
    return p


def _gpt_oss(config: Config) -> Plan:
    p = Plan(config, MODEL_ARCH.GPT_OSS, alternating=True)
    p.only(attention_bias=True, swiglu_alpha=1.702, swiglu_limit=7.0)
    p.keys(ff="intermediate_size", eps=1e-5)
    turns = ["sliding_attention", "full_attention"]
    p.only(layer_types=[turns[layer % 2] for layer in range(p.n_layers)])
    p.writer.add_sliding_window(config.count("sliding_window"))
    p.writer.add_expert_feed_forward_length(p.ff)
    p.ends()
    n, ff = p.n_experts, p.ff
    for layer in range(p.n_layers):
        at = f"model.layers.{layer}"
        p.norms(at)
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


def _deepseek_moe(p: Plan, layer: int, dense: int) -> None:
    """A layer's feed-forward part: dense in the first layers, then routed and shared experts."""
    at = f"model.layers.{layer}.mlp"
    if layer < dense:
        p.swiglu(at, p.config.count("intermediate_size"))
    else:
        p.moe(layer)
        p.swiglu(f"{at}.shared_experts", p.ff * p.config.count("n_shared_experts"))


def _deepseek_keys(p: Plan) -> int:
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


def _deepseek(config: Config) -> Plan:
    p = Plan(config, MODEL_ARCH.DEEPSEEK)
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
    p.ends()
    for layer in range(p.n_layers):
        at = f"model.layers.{layer}"
        p.norms(at)
        p.attention(at, rotate=True)
        _deepseek_moe(p, layer, dense)
    return p


_LITE_LAYERS = (26, 27)  # how llama.cpp tells DeepSeek-V2-Lite from V2


def _deepseek_v2(config: Config) -> Plan:
    p = Plan(config, MODEL_ARCH.DEEPSEEK2)
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
    w, heads, rank = p.writer, config.count("num_attention_heads"), config.count("kv_lora_rank")
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
    if config.get("n_group") is not None:
        w.add_expert_group_count(config.count("n_group"))
        w.add_expert_group_used_count(config.count("topk_group"))
    w.add_rope_dimension_count(rope)
    if "mscale_all_dim" in config.rope:  # llama.cpp divides by the same 0.1 for this architecture
        w.add_rope_scaling_yarn_log_mul(0.1 * _number(config, config.rope, "mscale_all_dim"))
    p.ends()
    for layer in range(p.n_layers):
        at = f"model.layers.{layer}"
        p.norms(at)
        attn, q = f"{at}.self_attn", heads * (nope + rope)
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
        _deepseek_moe(p, layer, dense)
    return p


FAMILIES: dict[str, Callable[[Config], Plan]] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "deepseek": _deepseek,
    "deepseek_v2": _deepseek_v2,
    "olmoe": _olmoe,
    "gpt_oss": _gpt_oss,
}


def plan(config: Config) -> Plan:
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
