"""What a Hugging Face configuration asks for: metadata keys, and tensors with shape and place.

Owns reading config.json and the vocabulary in which a family says what its checkpoints hold. Knows
no family, and reads no weights and no tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

from ...runtime.errors import UserError
from .checkpoint import read_json
from .defaults import DEFAULTS

Array = NDArray[Any]

OTHER_WAY = (
    "make a GGUF of it with llama.cpp's convert_hf_to_gguf.py and give that to `moe-gguf convert`"
)

MAX_LAYERS = 512  # of llama.cpp


class Config:
    """config.json, asked for one value at a time.

    A key it lacks means what transformers means by that; ``null`` is a value like others, for which
    ``default`` stands.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "config.json"
        if not self.path.exists():
            raise UserError(
                f"{folder} has no config.json; give the folder of a Hugging Face model, or a GGUF"
            )
        self.values = read_json(self.path)
        family = self.values.get("model_type")
        self.defaults = DEFAULTS.get(family, {}) if isinstance(family, str) else {}

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values[key] if key in self.values else self.defaults.get(key)
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
        known = (name for given in (self.values, self.defaults) for name in names if name in given)
        return self.count(next(known, names[0]))

    @property
    def rope(self) -> dict[str, Any]:
        """Rotary parameters under one set of names; transformers 5 moved them."""
        raw = self.get("rope_scaling") or self.get("rope_parameters", {})
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
class Wants:
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
        if self.n_layers > MAX_LAYERS:
            raise UserError(
                f"{self.config.path}: llama.cpp runs at most {MAX_LAYERS} layers, "
                f"not {self.n_layers}; download it again"
            )
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

    def layers(self) -> Iterator[tuple[int, str]]:
        """Every layer and the name it goes by, once the tensors outside the layers and then its own
        norms are wanted. A tied output is not stored twice."""
        vocab = self.config.count("vocab_size")
        self.tensor("model.embed_tokens.weight", vocab, self.hidden)
        self.tensor("model.norm.weight", self.hidden)
        if not self.config.get("tie_word_embeddings", False):
            self.tensor("lm_head.weight", vocab, self.hidden)
        for layer in range(self.n_layers):
            at = f"model.layers.{layer}"
            self.tensor(f"{at}.input_layernorm.weight", self.hidden)
            self.tensor(f"{at}.post_attention_layernorm.weight", self.hidden)
            yield layer, at

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

    def keys(self, *, ff: str) -> None:
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
        w.add_layer_norm_rms_eps(c.number("rms_norm_eps"))
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
            w.add_rope_scaling_factor(rope_number(c, rope, "factor"))
        elif kind != "default":
            raise UserError(
                f"{c.path}: rope type {kind!r} is not one this converter knows; " + OTHER_WAY
            )
        if kind == "yarn":
            rope.setdefault("original_max_position_embeddings", c.count("max_position_embeddings"))
            context = rope_number(c, rope, "original_max_position_embeddings")
            w.add_rope_scaling_orig_ctx_len(int(context))
            for key, add in {
                "extrapolation_factor": w.add_rope_scaling_yarn_ext_factor,
                "attention_factor": w.add_rope_scaling_yarn_attn_factor,
                "beta_fast": w.add_rope_scaling_yarn_beta_fast,
                "beta_slow": w.add_rope_scaling_yarn_beta_slow,
            }.items():
                if key in rope:
                    add(rope_number(c, rope, key))
        if "rope_theta" in rope:
            w.add_rope_freq_base(rope_number(c, rope, "rope_theta"))

    def only(self, **allowed: Any) -> None:
        """Refuse a configuration that llama.cpp would compute differently.

        What neither it nor the family's class names is fine.
        """
        for key, value in allowed.items():
            found = self.config.get(key, self.config.defaults.get(key, value))
            if found != value:
                raise UserError(
                    f"{self.config.path}: {key} is {found!r}, and llama.cpp's "
                    f"{MODEL_ARCH_NAMES[self.arch]} computes {value!r} only; use another model"
                )


def rope_number(config: Config, rope: dict[str, Any], key: str) -> float:
    value = rope.get(key)
    if not isinstance(value, int | float):
        raise UserError(f"{config.path}: rope {key} should be a number, not {value!r}")
    return float(value)


def _halves_to_pairs(head: Array) -> Array:
    """Rotary partners from (i, i + dim/2) to (2i, 2i + 1)."""
    return head.reshape(2, len(head) // 2, -1).swapaxes(0, 1).reshape(head.shape)
