"""Tiny random-weight MoE models as GGUF, one per expert layout, written in milliseconds.

Owns what each llama.cpp architecture wants in a file, at the smallest size that still exercises
it. Knows nothing of the runtime: the files are stock GGUF, and any reader may be held to them.

What the tests may rely on, for every layout:

- The same arguments give the same bytes.
- Expert weights are random *blocks* (random bytes with chosen scales), not quantised floats, so
  a byte moved anywhere changes the logits.
- The router is sharp enough that a layer's routing weights differ clearly, and flat enough that
  200 random tokens reach every expert of every MoE layer (at seed 0; elsewhere nearly so).
- Control tokens and bytes outside printable ASCII have faint output rows: greedy text is ASCII
  and never ends early.
- Expert sizes are awkward on purpose: only mixtral's gate and up are multiples of 4096 bytes,
  and gpt-oss and deepseek2 miss multiples of 512 too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Quant
from gguf import GGUFValueType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, Keys
from gguf.gguf_writer import GGUFValue
from gguf.quants import quantize

Array = npt.NDArray[Any]
Value = bool | int | float | str | Sequence[int] | Sequence[bool]
Types = tuple[Quant, Quant, Quant]  # of gate (or fused gate_up), up, down

N_EMBD = 256  # one K-quant block
N_HEAD = 4
N_HEAD_KV = 2
HEAD_DIM = 64
N_CTX = 512
SPLIT_FILES = 3

# Types of the second and third MoE layer of a mixed file; the first keeps the layout's own.
MIXED: tuple[Types, Types] = (
    (Quant.Q8_0, Quant.Q6_K, Quant.Q4_0),
    (Quant.F16, Quant.Q4_0, Quant.F16),
)

# --- random blocks ------------------------------------------------------------------------------

# Where a block keeps its f16 scale d, and the standard deviation of its weights, in units of d,
# when every other byte of the block is uniformly random. Signs of d are random, so the mean is 0.
_SCALES: dict[Quant, tuple[int, float]] = {
    Quant.Q4_0: (0, 4.6),
    Quant.Q5_0: (0, 9.2),
    Quant.Q8_0: (0, 73.9),
    Quant.Q4_K: (0, 258.0),
    Quant.Q6_K: (208, 1366.0),
}


def random_weights(
    rng: np.random.Generator, quant: Quant, shape: Sequence[int], std: float
) -> Array:
    """Weights of about this standard deviation; shape is row-major, rows last.

    Floats come as floats, block types as bytes [..., bytes of a row].
    """
    if quant is Quant.F32:
        return rng.standard_normal(shape, np.float32) * np.float32(std)
    if quant is Quant.F16:
        return (rng.standard_normal(shape, np.float32) * std).astype(np.float16)
    block, block_bytes = GGML_QUANT_SIZES[quant]
    assert shape[-1] % block == 0, f"{quant.name} needs rows of a multiple of {block}"
    n = int(np.prod(shape)) // block
    raw = rng.integers(0, 256, (n, block_bytes), np.uint8)
    if quant is Quant.MXFP4:
        # A weight is a table entry of root mean square 5.85 times 2^(e - 128).
        e = 128 + round(float(np.log2(std / 5.85)))
        raw[:, 0] = rng.integers(e - 1, e + 2, n, np.uint8)
    else:
        at, unit = _SCALES[quant]
        d = rng.uniform(0.5, 1.5, n) * rng.choice((-1.0, 1.0), n) * std / unit
        raw[:, at : at + 2] = d.astype("<f2").view(np.uint8).reshape(n, 2)
        if quant is Quant.Q4_K:  # the minimum that centres a sub-block: the mean of 0..15 times d
            raw[:, 2:4] = (7.5 * d).astype("<f2").view(np.uint8).reshape(n, 2)
    return raw.reshape(*shape[:-1], shape[-1] // block * block_bytes)


# --- tokenizer ----------------------------------------------------------------------------------

BOS, EOS, TURN, END = "<|bos|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_WORDS = "Ġthe Ġand Ġof Ġto Ġin Ġis Ġa Ġexpert Ġtoken Ġmemory ing ed er on st re the Hello Ġworld"
_CHAT = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _byte_letters() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself where visible, else from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(b) if b in visible else chr(next(spare)) for b in range(256)]


@dataclass(frozen=True)
class _Vocab:
    """Byte-level BPE: 256 bytes, the prefixes of a few words, four control tokens."""

    tokens: list[str]
    merges: list[str]
    controls: int

    @classmethod
    def make(cls, multiple: int = 1) -> _Vocab:
        """Padded with control tokens to a multiple of so many."""
        merges: dict[str, str] = {}
        for word in _WORDS.split():
            for i in range(1, len(word)):
                merges.setdefault(word[: i + 1], f"{word[:i]} {word[i]}")
        controls = [BOS, EOS, TURN, END]
        spare = -(256 + len(merges) + len(controls)) % multiple
        controls += [f"<|spare_{i}|>" for i in range(spare)]
        return cls([*_byte_letters(), *merges, *controls], list(merges.values()), len(controls))

    def faint(self) -> list[int]:
        """Tokens that generation should not choose."""
        n = len(self.tokens)
        return [b for b in range(256) if not 0x20 <= b < 0x7F] + list(range(n - self.controls, n))


# --- a file in the making -----------------------------------------------------------------------


class _Writer(GGUFWriter):
    """GGUFWriter that repeats a custom alignment in every file of a split set.

    Upstream keeps it in the first alone, though all are laid out by it: llama.cpp refuses those.
    """

    def add_shard_kv_data(self) -> None:
        super().add_shard_kv_data()
        for pairs in self.kv_data:
            pairs[Keys.General.ALIGNMENT] = GGUFValue(self.data_alignment, GGUFValueType.UINT32)


@dataclass
class _Draft:
    """Keys and tensors of one model, in file order, before they are written."""

    arch: str
    types: Types
    mixed: bool
    rng: np.random.Generator
    vocab: _Vocab = field(default_factory=_Vocab.make)
    keys: dict[str, Value] = field(default_factory=dict)
    tensors: dict[str, tuple[Array, Quant]] = field(default_factory=dict)
    moe_layers: list[int] = field(default_factory=list)

    def set(self, **keys: Value) -> None:
        """Keys of this architecture; a double underscore stands for a dot."""
        self.keys.update({f"{self.arch}.{k.replace('__', '.')}": v for k, v in keys.items()})

    def vector(self, name: str, *shape: int, mean: float = 1.0, std: float = 0.1) -> None:
        """F32 of mean 1 for norms and scales, of mean 0 for biases; shape is row-major."""
        data = random_weights(self.rng, Quant.F32, shape, std) + np.float32(mean)
        self.tensors[name] = (data, Quant.F32)

    def matrix(self, name: str, n_in: int, *n_out: int, gain: float = 1.0) -> None:
        """F16 that maps unit-variance rows to rows of variance gain squared."""
        shape = (*reversed(n_out), n_in)
        data = random_weights(self.rng, Quant.F16, shape, gain / n_in**0.5)
        self.tensors[name] = (data, Quant.F16)

    def quantize_trunk(self, quant: Quant, embedding: bool) -> None:
        for name, (data, kind) in self.tensors.items():
            if kind is Quant.F16 and data.ndim == 2 and (embedding or name != "token_embd.weight"):
                self.tensors[name] = (quantize(data.astype(np.float32), quant), quant)

    def router(self, layer: int, n_experts: int) -> None:
        """F32 router whose logits have standard deviation 2: sharp, and no expert starves."""
        data = random_weights(self.rng, Quant.F32, (n_experts, N_EMBD), 2.0 / N_EMBD**0.5)
        self.tensors[f"blk.{layer}.ffn_gate_inp.weight"] = (data, Quant.F32)

    def expert(self, layer: int, part: str, n_in: int, n_out: int, n_experts: int) -> None:
        """One stacked expert tensor; part is gate, up, gate_up or down."""
        if layer not in self.moe_layers:
            self.moe_layers.append(layer)
        nth = self.moe_layers.index(layer)
        types = (self.types, *MIXED)[nth % 3] if self.mixed else self.types
        quant = types[{"gate": 0, "gate_up": 0, "up": 1, "down": 2}[part]]
        gain = 2.0 if part == "down" else 1.5  # the activation and the routing weights shrink it
        data = random_weights(self.rng, quant, (n_experts, n_out, n_in), gain / n_in**0.5)
        self.tensors[f"blk.{layer}.ffn_{part}_exps.weight"] = (data, quant)

    def common(self, layers: int, experts: int, used: int, ff: int, embd_std: float = 0.5) -> None:
        """Keys every architecture reads, and the tensors outside the layers."""
        self.set(context_length=N_CTX, embedding_length=N_EMBD, block_count=layers)
        self.set(attention__head_count=N_HEAD, attention__head_count_kv=N_HEAD_KV)
        self.set(attention__key_length=HEAD_DIM, attention__value_length=HEAD_DIM)
        self.set(attention__layer_norm_rms_epsilon=1e-6, feed_forward_length=ff)
        self.set(rope__dimension_count=HEAD_DIM, rope__freq_base=10000.0)
        self.set(expert_count=experts, expert_used_count=used, expert_feed_forward_length=ff)
        n_vocab = len(self.vocab.tokens)
        self.matrix("token_embd.weight", N_EMBD, n_vocab, gain=embd_std * N_EMBD**0.5)
        self.vector("output_norm.weight", N_EMBD)
        self.matrix("output.weight", N_EMBD, n_vocab, gain=3.0)
        self.tensors["output.weight"][0][self.vocab.faint()] *= np.float16(0.05)

    def attention(self, layer: int) -> None:
        at = f"blk.{layer}."
        self.vector(at + "attn_norm.weight", N_EMBD)
        self.matrix(at + "attn_q.weight", N_EMBD, N_HEAD * HEAD_DIM)
        self.matrix(at + "attn_k.weight", N_EMBD, N_HEAD_KV * HEAD_DIM)
        self.matrix(at + "attn_v.weight", N_EMBD, N_HEAD_KV * HEAD_DIM)
        self.matrix(at + "attn_output.weight", N_HEAD * HEAD_DIM, N_EMBD)

    def dense(self, layer: int, ff: int, suffix: str = "", gate: bool = True) -> None:
        """A plain feed-forward block; suffix "_shexp" makes it the shared expert."""
        at = f"blk.{layer}.ffn_"
        if gate:
            self.matrix(f"{at}gate{suffix}.weight", N_EMBD, ff)
        self.matrix(f"{at}up{suffix}.weight", N_EMBD, ff)
        self.matrix(f"{at}down{suffix}.weight", ff, N_EMBD)

    def gated_experts(self, layer: int, n_experts: int, ff: int) -> None:
        self.router(layer, n_experts)
        self.expert(layer, "gate", N_EMBD, ff, n_experts)
        self.expert(layer, "up", N_EMBD, ff, n_experts)
        self.expert(layer, "down", ff, N_EMBD, n_experts)

    def scales(self) -> None:
        """A scale for every expert of every stacked tensor that has none yet."""
        for name, (data, _) in list(self.tensors.items()):
            scale = name.replace("_exps.weight", "_exps.scale")
            if scale not in self.tensors:
                self.vector(scale, len(data), std=0.4)

    def write(self, path: Path, split: bool, align: int) -> Path:
        per_file = -(-len(self.tensors) // SPLIT_FILES) if split else 0
        writer = _Writer(path, self.arch, split_max_tensors=per_file)
        writer.add_custom_alignment(align)
        writer.add_name(f"tiny {self.arch}")
        for key, value in self.keys.items():
            _add_key(writer, key, value)
        self._add_tokenizer(writer)
        for name, (data, quant) in self.tensors.items():
            writer.add_tensor(name, data, raw_dtype=quant)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        assert writer.fout is not None
        first = Path(writer.fout[0].name)
        writer.close()
        return first

    def _add_tokenizer(self, writer: GGUFWriter) -> None:
        tokens, n_controls = self.vocab.tokens, self.vocab.controls
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types([1] * (len(tokens) - n_controls) + [3] * n_controls)
        writer.add_token_merges(self.vocab.merges)
        writer.add_bos_token_id(tokens.index(BOS))
        writer.add_eos_token_id(tokens.index(EOS))
        writer.add_add_bos_token(True)
        writer.add_chat_template(_CHAT)


def _add_key(writer: GGUFWriter, key: str, value: Value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


# --- the layouts --------------------------------------------------------------------------------


def _qwen3moe(m: _Draft) -> None:
    """Separate gate, up, down; softmax, top-k renormalised."""
    layers, experts, ff = 3, 16, 96
    m.common(layers, experts, 4, ff)
    for i in range(layers):
        m.attention(i)
        m.vector(f"blk.{i}.attn_q_norm.weight", HEAD_DIM)
        m.vector(f"blk.{i}.attn_k_norm.weight", HEAD_DIM)
        m.vector(f"blk.{i}.ffn_norm.weight", N_EMBD)
        m.gated_experts(i, experts, ff)


def _gemma4(m: _Draft) -> None:
    """Fused gate_up, a scale per down expert, a dense block beside the experts, GELU."""
    layers, experts, ff = 3, 16, 96
    m.common(layers, experts, 4, ff, embd_std=0.5 / N_EMBD**0.5)  # the graph multiplies it back
    m.set(feed_forward_length=128, embedding_length_per_layer_input=0)
    m.set(attention__key_length_swa=HEAD_DIM, attention__value_length_swa=HEAD_DIM)
    m.set(attention__sliding_window=128, attention__sliding_window_pattern=[True, False, True])
    m.set(final_logit_softcapping=30.0)
    m.vector("rope_freqs.weight", HEAD_DIM // 2)
    for i in range(layers):
        at = f"blk.{i}."
        m.attention(i)
        m.vector(at + "attn_q_norm.weight", HEAD_DIM)
        m.vector(at + "attn_k_norm.weight", HEAD_DIM)
        for norm in ("post_attention_norm", "ffn_norm", "post_ffw_norm", "post_ffw_norm_1"):
            m.vector(f"{at}{norm}.weight", N_EMBD)
        for norm in ("pre_ffw_norm_2", "post_ffw_norm_2"):
            m.vector(f"{at}{norm}.weight", N_EMBD)
        m.dense(i, 128)
        m.router(i, experts)
        # The router sees a row of unit length, not of unit variance: this restores it.
        m.vector(at + "ffn_gate_inp.scale", N_EMBD, mean=N_EMBD**0.5)
        m.expert(i, "gate_up", N_EMBD, 2 * ff, experts)
        m.expert(i, "down", ff, N_EMBD, experts)
        m.vector(at + "ffn_down_exps.scale", experts, std=0.4)
        m.vector(at + "layer_output_scale.weight", 1)


def _gpt_oss(m: _Draft) -> None:
    """MXFP4 experts with biases, attention sinks, softmax over the chosen, clamped SwiGLU."""
    layers, experts, ff = 3, 16, 96
    m.common(layers, experts, 4, ff)
    m.set(attention__sliding_window=128)
    for i in range(layers):
        at = f"blk.{i}."
        m.attention(i)
        for part, n in (("q", N_HEAD), ("k", N_HEAD_KV), ("v", N_HEAD_KV), ("output", N_HEAD)):
            m.vector(f"{at}attn_{part}.bias", n * HEAD_DIM, mean=0.0)
        m.vector(at + "attn_sinks.weight", N_HEAD, mean=0.0, std=1.0)
        m.vector(at + "post_attention_norm.weight", N_EMBD)
        m.gated_experts(i, experts, ff)
        m.vector(at + "ffn_gate_inp.bias", experts, mean=0.0, std=0.5)
        m.vector(at + "ffn_gate_exps.bias", experts, ff, mean=0.0, std=0.5)
        m.vector(at + "ffn_up_exps.bias", experts, ff, mean=0.0, std=0.5)
        m.vector(at + "ffn_down_exps.bias", experts, N_EMBD, mean=0.0, std=0.5)


def _deepseek2(m: _Draft) -> None:
    """V3: a leading dense layer, a shared expert, grouped sigmoid routing with a bias, MLA."""
    layers, experts, ff = 4, 16, 96
    q_rank, kv_rank, nope, rope = 64, 64, 32, 32
    m.common(layers, experts, 4, ff)
    m.set(feed_forward_length=128, leading_dense_block_count=1, expert_shared_count=1)
    m.set(expert_group_count=4, expert_group_used_count=2, expert_gating_func=2)  # 2: sigmoid
    m.set(expert_weights_scale=2.5, expert_weights_norm=True, rope__dimension_count=rope)
    m.set(attention__q_lora_rank=q_rank, attention__kv_lora_rank=kv_rank)
    m.set(attention__head_count_kv=1)  # MLA caches one head: the compressed row and its rope part
    m.set(attention__key_length=kv_rank + rope, attention__value_length=kv_rank)
    m.set(attention__key_length_mla=nope + rope, attention__value_length_mla=HEAD_DIM)
    for i in range(layers):
        at = f"blk.{i}."
        m.vector(at + "attn_norm.weight", N_EMBD)
        m.vector(at + "attn_q_a_norm.weight", q_rank)
        m.vector(at + "attn_kv_a_norm.weight", kv_rank)
        m.matrix(at + "attn_q_a.weight", N_EMBD, q_rank)
        m.matrix(at + "attn_q_b.weight", q_rank, N_HEAD * (nope + rope))
        m.matrix(at + "attn_kv_a_mqa.weight", N_EMBD, kv_rank + rope)
        m.matrix(at + "attn_k_b.weight", nope, kv_rank, N_HEAD)
        m.matrix(at + "attn_v_b.weight", kv_rank, HEAD_DIM, N_HEAD)
        m.matrix(at + "attn_output.weight", N_HEAD * HEAD_DIM, N_EMBD)
        m.vector(at + "ffn_norm.weight", N_EMBD)
        if i == 0:
            m.dense(i, 128)
        else:
            m.gated_experts(i, experts, ff)
            m.vector(at + "exp_probs_b.bias", experts, mean=0.0, std=0.1)
            m.dense(i, ff, "_shexp")


def _mixtral(m: _Draft) -> None:
    """Few big experts under the llama architecture, K-quants."""
    layers, experts, ff = 3, 8, 512
    m.common(layers, experts, 2, ff)
    for i in range(layers):
        m.attention(i)
        m.vector(f"blk.{i}.ffn_norm.weight", N_EMBD)
        m.gated_experts(i, experts, ff)


def _llama4(m: _Draft) -> None:
    """Top-1, weight applied before the expert, a shared expert, experts in every other layer."""
    layers, experts, ff = 4, 16, 96
    m.common(layers, experts, 1, ff)
    m.set(feed_forward_length=128, interleave_moe_layer_step=2)
    for i in range(layers):
        m.attention(i)
        m.vector(f"blk.{i}.ffn_norm.weight", N_EMBD)
        if i % 2 == 0:
            m.dense(i, 128)
        else:
            m.gated_experts(i, experts, ff)
            m.dense(i, ff, "_shexp")


def _updown(m: _Draft) -> None:
    """No gate, squared ReLU: nemotron_h_moe, a layer being recurrent, attention *or* experts.

    llama.cpp tells the kinds apart by the two per-layer lists, and aborts without a recurrent
    layer. Its state is why the tail of a sequence cannot be removed from this model's memory.
    """
    layers, experts, ff = 5, 16, 160
    m.common(layers, experts, 4, ff)
    kv_heads, widths = [0, 0, N_HEAD_KV, 0, 0], [0, ff, 0, ff, ff]
    m.set(attention__head_count_kv=kv_heads, feed_forward_length=widths)
    m.set(attention__layer_norm_epsilon=1e-6)
    m.set(expert_shared_feed_forward_length=64, expert_shared_count=1)
    m.set(expert_weights_norm=True, expert_weights_scale=2.5)
    for i in range(layers):
        if widths[i]:
            m.vector(f"blk.{i}.attn_norm.weight", N_EMBD)
            m.router(i, experts)
            m.vector(f"blk.{i}.exp_probs_b.bias", experts, mean=0.0, std=0.1)
            m.expert(i, "up", N_EMBD, ff, experts)
            m.expert(i, "down", ff, N_EMBD, experts)
            m.dense(i, 64, "_shexp", gate=False)
        elif kv_heads[i]:
            m.attention(i)
        else:
            _mamba2(m, i)


def _mamba2(m: _Draft, layer: int) -> None:
    inner, state, heads, kernel = 64, 128, 4, 4
    m.set(ssm__inner_size=inner, ssm__state_size=state, ssm__time_step_rank=heads)
    m.set(ssm__conv_kernel=kernel, ssm__group_count=1)
    at, mixed_rows = f"blk.{layer}.", inner + 2 * state  # x, B and C go through the convolution
    m.vector(at + "attn_norm.weight", N_EMBD)
    m.matrix(at + "ssm_in.weight", N_EMBD, inner + mixed_rows + heads)
    m.vector(at + "ssm_conv1d.weight", mixed_rows, kernel, mean=0.0, std=0.5)
    m.vector(at + "ssm_conv1d.bias", mixed_rows, mean=0.0)
    m.vector(at + "ssm_dt.bias", heads, mean=0.0)
    m.vector(at + "ssm_a", heads, 1, mean=-1.0)
    m.vector(at + "ssm_d", heads, 1)
    m.vector(at + "ssm_norm.weight", 1, inner)
    m.matrix(at + "ssm_out.weight", inner, N_EMBD)


_LAYOUTS: dict[str, tuple[str, Types, Callable[[_Draft], None]]] = {
    "qwen3moe": ("qwen3moe", (Quant.Q4_0, Quant.Q4_0, Quant.Q4_0), _qwen3moe),
    "gemma4": ("gemma4", (Quant.Q4_0, Quant.Q4_0, Quant.Q8_0), _gemma4),
    "gpt-oss": ("gpt-oss", (Quant.MXFP4, Quant.MXFP4, Quant.MXFP4), _gpt_oss),
    "deepseek2": ("deepseek2", (Quant.Q6_K, Quant.Q6_K, Quant.Q5_0), _deepseek2),
    "mixtral": ("llama", (Quant.Q4_K, Quant.Q4_K, Quant.Q6_K), _mixtral),
    "llama4": ("llama4", (Quant.Q8_0, Quant.Q8_0, Quant.Q8_0), _llama4),
    "updown": ("nemotron_h_moe", (Quant.Q8_0, Quant.Q8_0, Quant.Q4_0), _updown),
}
LAYOUTS: tuple[str, ...] = tuple(_LAYOUTS)


def write_tiny(
    layout: str,
    path: Path,
    *,
    seed: int = 0,
    mixed: bool = False,
    split: bool = False,
    align: int = 32,
    scales: bool = False,
    experts: Quant | None = None,
    trunk: Quant | None = None,
    tied: bool = False,
    vocab: int = 1,
) -> Path:
    """Write a tiny model and return the path to open.

    mixed: quantisation differs between MoE layers and between gate, up and down of one layer.
    split: a set of three files, experts in at least two; the path returned is the first's.
    align: the file's general.alignment, a power of two.
    scales: a scale per expert for gate and up (and down) as well; qwen3moe and mixtral apply it.
    experts: the type of every expert tensor, instead of the layout's own.
    trunk: the type of the trunk's matrices, instead of F16.
    tied: the token embedding, then of the trunk's type, is the output matrix too.
    vocab: the vocabulary is padded to a multiple of so many tokens; kernels want 16 to repack.
    """
    arch, types, build = _LAYOUTS[layout]
    types = types if experts is None else (experts, experts, experts)
    draft = _Draft(arch, types, mixed, np.random.default_rng(seed), _Vocab.make(vocab))
    build(draft)
    if scales:
        draft.scales()
    if tied:
        del draft.tensors["output.weight"]
    if trunk is not None:
        draft.quantize_trunk(trunk, embedding=tied)
    return draft.write(path, split, align)


class _Hole(np.ndarray[Any, Any]):
    """Zeros that take neither memory nor disk."""

    def tofile(self, file: Any, sep: str = "", format: str = "%s") -> None:
        file.truncate(file.tell() + self.nbytes)
        file.seek(self.nbytes, os.SEEK_CUR)


def write_huge(path: Path) -> Path:
    """One expert of three matrices of 205 MB, all zeros, in a file with holes; it is never run."""
    draft = _Draft("qwen3moe", (Quant.F32,) * 3, False, np.random.default_rng(0))
    ff = 784 * N_EMBD
    draft.common(1, 1, 1, ff)
    draft.attention(0)
    draft.router(0, 1)
    for part, shape in (("gate", (ff, N_EMBD)), ("up", (ff, N_EMBD)), ("down", (N_EMBD, ff))):
        zeros = np.broadcast_to(np.zeros(1, np.float32), (1, *shape)).view(_Hole)
        draft.tensors[f"blk.0.ffn_{part}_exps.weight"] = (zeros, Quant.F32)
    return draft.write(path, split=False, align=32)


def write_big(path: Path) -> Path:
    """A model of 320 MB with experts of 3.3 MB, for measuring memory; it is never run."""
    draft = _Draft("qwen3moe", (Quant.Q8_0,) * 3, False, np.random.default_rng(0))
    layers, n_experts, ff = 6, 16, 4096
    draft.common(layers, n_experts, 4, ff)
    for i in range(layers):
        draft.attention(i)
        draft.gated_experts(i, n_experts, ff)
    return draft.write(path, split=False, align=32)
