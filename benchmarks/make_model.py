"""Random-weight MoE models in real shapes whose routing behaves like a trained one's.

Owns the benchmark models: their shapes, the constants that give them realistic routing, and the
statistics that prove it, measured in stock llama.cpp during greedy decoding. Knows nothing of the
engine that will run them.

    python benchmarks/make_model.py olmoe.gguf                  write the benchmark model
    python benchmarks/make_model.py small.gguf --preset small   write a small one of its design
    python benchmarks/make_model.py --stats any.gguf            measure any MoE GGUF

Whatever is written is measured at once, unless --no-stats.

Why random weights need a design at all: in a plain random network consecutive tokens share no more
experts than chance allows and nothing can be predicted from one layer to the next, so a cache or a
predictor measured on it says nothing. Three mechanisms of trained models are put back:

- *slow context*: constant query and key biases turn RoPE into a recency kernel (`recency_gain`), so
  every layer's attention adds a running mean of the recent past, shared by consecutive tokens;
- *small steps*: each layer changes the residual stream by a fixed small fraction, so the next
  layer's router reads almost the same vector;
- *a common direction* in the token embeddings, which makes some experts popular.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import ctypes
import dataclasses
import itertools
import json
import logging
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Ids = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a model. `n_vocab` counts the three special tokens."""

    name: str
    n_layer: int
    n_expert: int
    n_expert_used: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_vocab: int
    n_ctx: int = 4096


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What gives a random model its routing statistics; amplitudes are relative to the residual.

    Tuned by hand against `measure`. The defaults are the `olmoe` preset's; none depends on a width,
    so a narrow model of the same depth and expert count is a fair stand-in while tuning.
    """

    # Layer 0's attention adds this much running context to an embedding of 1, before averaging many
    # tokens has shrunk it. Sets how much of the router's input consecutive tokens share, hence the
    # overlap of the first layers.
    context: float = 2.7
    # Per-layer step of attention (slow, shared by neighbours) and of the experts (fast, specific).
    # Their sum sets next-gate recall; their ratio keeps the overlap level over depth: experts
    # decorrelate neighbours, attention correlates them again.
    attention: float = 0.18
    experts: float = 0.145
    # Part of each embedding that all tokens share. Small, because every attention averages it while
    # the rest cancels: 0.15 already gives the top tenth of the experts 27 % of the selections.
    common: float = 0.04
    # Exponent a of the recency kernel distance^-a: at 1 the context freezes after a few hundred
    # tokens and the same experts win forever, at 2 it is little more than the previous token. In
    # between, overlap falls slowly with the distance of two tokens, as it does in text.
    recency: float = 1.27
    # Content-dependent part of queries and keys against their constant bias of 1. Keeps attention
    # from being a fixed filter, which is what lets greedy decoding fall into a cycle.
    content: float = 0.3


# Standard deviation of the router's logits: flat enough that all of the top k matter.
ROUTER_STD = 1.0
# Standard deviation of the output logits. Greedy decoding ignores it; at temperature 1 this gives
# text-like entropy.
LOGIT_STD = 3.0
# Root mean square of an attention head's output for values of 1: the recency kernel averages a few
# nearly independent values. Of the experts' weighted sum for inputs of 1: silu(g) * u of two unit
# normals has 0.6, and the top k carry squared weights that add up to about 0.15. Both only scale
# the amplitudes above into honest fractions.
ATTENTION_RMS = 0.5
EXPERTS_RMS = 0.23

ROPE_BASE = 10000.0
RMS_EPS = 1e-6

# The other shapes need a little more context to reach the same overlap: `small` has fewer RoPE
# frequencies per head, hence a blunter kernel; `qwen3` picks 8 of 128, where chance gives half as
# much, and over its 48 layers even a small common direction would win.
PRESETS: dict[str, tuple[Shape, Calibration]] = {
    "olmoe": (Shape("olmoe", 16, 64, 8, 2048, 1024, 16, 16, 128, 32000), Calibration()),
    "small": (
        Shape("small", 8, 32, 4, 512, 256, 8, 8, 64, 8000),
        Calibration(context=3.4, attention=0.19, experts=0.12),
    ),
    "qwen3": (
        Shape("qwen3", 48, 128, 8, 2048, 768, 32, 4, 128, 151936),
        Calibration(4.5, attention=0.165, experts=0.14, common=0, recency=1.5, content=0.25),
    ),
}


# --- tokenizer ---------------------------------------------------------------------------------

SPECIAL = ("<|begin|>", "<|end|>", "<|pad|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def byte_letters() -> list[str]:
    """The printable letter that byte-level BPE writes for each of the 256 bytes."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    fresh = itertools.count(0x100)
    return [chr(byte if byte in kept else next(fresh)) for byte in range(256)]


def vocabulary(n_vocab: int) -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level BPE that speaks in made-up words such as ` kaneto`.

    Order: 256 bytes, words by rising length, `SPECIAL` last. Bytes cover every text; the words
    exist to make `n_vocab` tokens that print.
    """
    letters = byte_letters()
    space = letters[0x20]
    syllables = [(c, v) for c in "bcdfghjklmnpqrstvwxyz" for v in "aeiou"]
    short = [c + v for c, v in syllables]

    def pairs() -> Iterator[tuple[str, str]]:
        yield from syllables
        yield from ((space, s) for s in short)
        yield from ((space + s, t) for s in short for t in short)
        yield from ((s, t) for s in short for t in short)
        yield from ((space + s + t, u) for s in short for t in short for u in short)

    chosen = list(itertools.islice(pairs(), n_vocab - 256 - len(SPECIAL)))
    tokens = [*letters, *(a + b for a, b in chosen), *SPECIAL]
    if len(tokens) != n_vocab:
        raise ValueError(f"a vocabulary of {n_vocab} tokens cannot be made; use 1000 to 1000000")
    return tokens, [f"{a} {b}" for a, b in chosen]


# --- weights -----------------------------------------------------------------------------------

# Nibble 0 stands for -8 and has no positive twin: left in, every matrix would get a nonzero mean,
# and over 16 layers that one direction outgrows all others. It becomes 8, which stands for 0.
_NIBBLE = np.array([8, *range(1, 16)], dtype=np.uint8)
_SYMMETRIC = (_NIBBLE[:, None] << 4 | _NIBBLE[None, :]).reshape(256)
_Q4_STD = math.sqrt(2 * sum(q * q for q in range(1, 8)) / 16)


def q4_0(rng: np.random.Generator, shape: tuple[int, ...], std: float) -> Bytes:
    """Random Q4_0 rows of standard deviation `std`, as bytes; `shape` is in elements, rows last."""
    *outer, n = shape
    n_blocks = math.prod(outer) * n // 32
    blocks = np.empty((n_blocks, 18), dtype=np.uint8)
    blocks[:, :2] = np.array([std / _Q4_STD], dtype="<f2").view(np.uint8)
    noise = rng.integers(0, 1 << 64, size=n_blocks * 2, dtype=np.uint64).view(np.uint8)
    blocks[:, 2:] = _SYMMETRIC[noise].reshape(n_blocks, 16)
    return blocks.reshape(*outer, n // 32 * 18)


def q8_0(rows: Floats) -> Bytes:
    """Q8_0 bytes of float rows, each block scaled to its largest value."""
    values = rows.reshape(-1, 32)
    scale = (np.abs(values).max(axis=1) / 127).astype("<f2")
    blocks = np.empty((len(values), 34), dtype=np.uint8)
    blocks[:, :2] = scale[:, None].view(np.uint8)
    safe = np.where(scale == 0, 1, scale).astype(np.float32)
    blocks[:, 2:] = (
        np.clip(np.rint(values / safe[:, None]), -127, 127).astype(np.int8).view(np.uint8)
    )
    return blocks.reshape(len(rows), -1)


def normal(rng: np.random.Generator, shape: tuple[int, ...], std: float = 1.0) -> Floats:
    return rng.standard_normal(shape, dtype=np.float32) * np.float32(std)


def recency_gain(exponent: float, head_dim: int) -> float:
    """Weight of the query and key norms for which a constant query and key attend by distance^-a.

    Two all-ones vectors of length d, rotated by RoPE to positions D apart, have the product
    d * mean_j cos(D * base^(-2j/d)). Frequencies below 1/D contribute 1, the others cancel, which
    leaves d * (1 - ln D / ln base): logarithmic in D, so its softmax is a power of D.
    """
    return math.sqrt(exponent * math.log(ROPE_BASE) / math.sqrt(head_dim))


Tensor = tuple[str, tuple[int, ...], gguf.GGMLQuantizationType]


def tensors(shape: Shape) -> list[Tensor]:
    """Every tensor of the file in order: name, shape (rows last), type."""
    f32, q4, q8 = (gguf.GGMLQuantizationType[t] for t in ("F32", "Q4_0", "Q8_0"))
    n, ff = shape.n_embd, shape.n_ff
    n_q, n_kv = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
    found: list[Tensor] = [
        ("token_embd.weight", (shape.n_vocab, n), q8),
        ("output_norm.weight", (n,), f32),
        ("output.weight", (shape.n_vocab, n), q8),
    ]
    for layer in range(shape.n_layer):
        rows: list[Tensor] = [
            ("attn_norm.weight", (n,), f32),
            ("attn_q.weight", (n_q, n), q4),
            ("attn_k.weight", (n_kv, n), q4),
            ("attn_v.weight", (n_kv, n), q4),
            ("attn_q.bias", (n_q,), f32),
            ("attn_k.bias", (n_kv,), f32),
            ("attn_q_norm.weight", (shape.head_dim,), f32),
            ("attn_k_norm.weight", (shape.head_dim,), f32),
            ("attn_output.weight", (n, n_q), q4),
            ("ffn_norm.weight", (n,), f32),
            ("ffn_gate_inp.weight", (shape.n_expert, n), f32),
            ("ffn_gate_exps.weight", (shape.n_expert, ff, n), q4),
            ("ffn_up_exps.weight", (shape.n_expert, ff, n), q4),
            ("ffn_down_exps.weight", (shape.n_expert, n, ff), q4),
        ]
        found += [(f"blk.{layer}.{name}", dims, kind) for name, dims, kind in rows]
    return found


class Weights:
    """Values of a model's tensors, each a function of the seed and the tensor's place alone."""

    def __init__(self, shape: Shape, calibration: Calibration, seed: int) -> None:
        self.shape = shape
        self.calibration = calibration
        self.seed = seed
        letters = byte_letters()
        # Tokens that greedy decoding must never choose: specials would end a run, and a lone byte
        # that is not printable ASCII would make the text invalid.
        self.silent = [b for b in range(256) if ord(letters[b]) != b or b >= 0x7F]
        self.silent += range(shape.n_vocab - len(SPECIAL), shape.n_vocab)

    def residual(self, layer: int) -> float:
        """Root mean square of the residual stream that enters a layer's experts, by design."""
        c = self.calibration
        return math.hypot(1, c.context) * math.hypot(1, c.attention, c.experts) ** layer

    def make(self, index: int, tensor: Tensor) -> npt.NDArray[Any]:
        """The bytes of one tensor as an array; `index` is its place in `tensors(shape)`."""
        name, dims, kind = tensor
        s, c = self.shape, self.calibration
        rng = np.random.Generator(np.random.SFC64([self.seed, index]))
        unit = 1 / math.sqrt(dims[-1])  # keeps the scale of a row's product with a unit vector
        layer = int(name.split(".")[1]) if name.startswith("blk.") else -1
        part = name.removeprefix(f"blk.{layer}.")
        if part in ("attn_q_norm.weight", "attn_k_norm.weight"):
            return np.full(dims, recency_gain(c.recency, s.head_dim), dtype=np.float32)
        if len(dims) == 1:
            return np.ones(dims, dtype=np.float32)
        if part == "token_embd.weight":
            shared = normal(rng, (dims[1],), c.common)
            own = math.sqrt(1 - c.common**2)
            return self.by_rows(dims, lambda n: shared + normal(rng, (n, dims[1]), own))
        if part == "output.weight":
            head = self.by_rows(dims, lambda n: normal(rng, (n, dims[1]), unit * LOGIT_STD))
            head[self.silent] = 0
            return head
        if part == "ffn_gate_inp.weight":
            return normal(rng, dims, unit * ROUTER_STD)
        if part in ("attn_q.weight", "attn_k.weight"):
            return q4_0(rng, dims, unit * c.content)
        if part == "attn_output.weight":
            step = c.context if layer == 0 else c.attention * self.residual(layer)
            return q4_0(rng, dims, unit * step / ATTENTION_RMS)
        if part == "ffn_down_exps.weight":
            return q4_0(rng, dims, unit * c.experts * self.residual(layer) / EXPERTS_RMS)
        assert kind == gguf.GGMLQuantizationType.Q4_0, name
        return q4_0(rng, dims, unit)

    @staticmethod
    def by_rows(dims: tuple[int, ...], rows: Any, step: int = 1024) -> Bytes:
        """Q8_0 of a matrix too large to hold in floats: `rows(n)` makes the next n of its rows."""
        parts = [q8_0(rows(min(step, dims[0] - at))) for at in range(0, dims[0], step)]
        return np.concatenate(parts)


# --- file --------------------------------------------------------------------------------------


def write_model(
    path: Path, shape: Shape, calibration: Calibration, seed: int = 0, jobs: int = 1
) -> None:
    """Write the model to `path`, few tensors in memory at a time; the same bytes for a seed.

    Appears under its name only when complete; a failure leaves nothing behind.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        _write(partial, shape, calibration, seed, jobs)
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # or its write-back would disturb the next benchmark's reads
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write(path: Path, shape: Shape, calibration: Calibration, seed: int, jobs: int) -> None:
    writer = gguf.GGUFWriter(path, arch="qwen3moe")
    writer.add_name(f"random {shape.name} (seed {seed})")
    writer.add_description(json.dumps(dataclasses.asdict(calibration)))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_expert_feed_forward_length(shape.n_ff)
    writer.add_expert_count(shape.n_expert)
    writer.add_expert_used_count(shape.n_expert_used)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_layer_norm_rms_eps(RMS_EPS)

    tokens, merges = vocabulary(shape.n_vocab)
    begin, end, pad = range(shape.n_vocab - len(SPECIAL), shape.n_vocab)
    kinds = [gguf.TokenType.NORMAL] * begin + [gguf.TokenType.CONTROL] * len(SPECIAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(begin)
    writer.add_eos_token_id(end)
    writer.add_pad_token_id(pad)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)

    todo = tensors(shape)
    for name, dims, kind in todo:
        bytes_shape = gguf.quant_shape_to_byte_shape(dims, kind)
        quantized = kind != gguf.GGMLQuantizationType.F32
        writer.add_tensor_info(
            name,
            bytes_shape if quantized else dims,
            np.dtype(np.uint8 if quantized else np.float32),
            math.prod(bytes_shape) if quantized else 4 * math.prod(dims),
            raw_dtype=kind,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    weights = Weights(shape, calibration, seed)
    try:
        for index, data in enumerate(_made(weights, todo, jobs)):
            writer.write_tensor_data(data)
            if (index + 1) * 10 // len(todo) > index * 10 // len(todo):
                print(f"{shape.name}: {index + 1} of {len(todo)} tensors", file=sys.stderr)
        writer.flush()
    finally:
        writer.close()


def _made(weights: Weights, todo: list[Tensor], jobs: int) -> Iterator[npt.NDArray[Any]]:
    """The tensors in their order; each is what it is whoever makes it."""
    if jobs == 1:
        yield from itertools.starmap(weights.make, enumerate(todo))
        return
    with concurrent.futures.ProcessPoolExecutor(jobs) as pool:
        coming: collections.deque[concurrent.futures.Future[npt.NDArray[Any]]] = collections.deque()
        for place in enumerate(todo):
            coming.append(pool.submit(weights.make, *place))
            if len(coming) > 2 * jobs:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


# --- statistics --------------------------------------------------------------------------------

PROMPT_TOKENS = 64
ROUTED_TOKENS = 256
GREEDY_TOKENS = 512
MAX_PERIOD = 64
PROMPT = (
    "The lighthouse keeper counted the ships that passed before dawn and wrote each name in a "
    "ledger bound with green thread. On quiet nights he read the old entries aloud, and the sea, "
    "which had heard them all before, answered only when he left one out. Nobody in the village "
    "believed this until the winter the lamp failed."
)


class GgmlTensor(ctypes.Structure):
    """`struct ggml_tensor` of ggml.h as the pinned llama-cpp-python builds it."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    ]


_NAME_OFFSET = GgmlTensor.name.offset


class Probe:
    """Records the routing of single-token steps through llama.cpp's evaluation callback.

    `steps[t][layer]` is (chosen experts, gate input) of recorded token t; `routers[layer]` the
    router's matrix. Reads tensor memory directly, so the model must live on the CPU.
    """

    def __init__(self) -> None:
        self.recording = False
        self.steps: list[dict[int, tuple[Ids, Floats]]] = []
        self.routers: dict[int, Floats] = {}
        self._input: Floats = np.empty(0, dtype=np.float32)

    def __call__(self, address: int, ask: bool, _: Any) -> bool:
        name = ctypes.string_at(address + _NAME_OFFSET)
        kind, _, layer = name.partition(b"-")
        wanted = kind in (b"ffn_moe_logits", b"ffn_moe_topk")
        if ask:
            return self.recording and wanted
        tensor = GgmlTensor.from_address(address)
        if kind == b"ffn_moe_logits":
            matrix, gate_input = (GgmlTensor.from_address(tensor.src[i]) for i in (0, 1))
            if int(layer) not in self.routers:
                self.routers[int(layer)] = _dequantized(matrix)
            n = gate_input.ne[0] * 4
            self._input = np.frombuffer(ctypes.string_at(gate_input.data, n), dtype=np.float32)
        elif wanted:
            chosen = np.frombuffer(ctypes.string_at(tensor.data, tensor.ne[0] * 4), dtype=np.int32)
            self.steps[-1][int(layer)] = chosen.astype(np.int64), self._input
        return True


def _dequantized(matrix: GgmlTensor) -> Floats:
    raw = np.frombuffer(ctypes.string_at(matrix.data, matrix.ne[1] * matrix.nb[1]), dtype=np.uint8)
    rows = raw.reshape(matrix.ne[1], matrix.nb[1])
    kind = gguf.GGMLQuantizationType(matrix.type)
    if kind == gguf.GGMLQuantizationType.F32:
        return rows.view(np.float32)
    return np.asarray(gguf.dequantize(rows, kind), dtype=np.float32)


def overlap(chosen: Ids) -> float:
    """Mean share of a token's experts that the next token uses; `chosen` is [token, layer, k]."""
    shared = (chosen[1:, :, :, None] == chosen[:-1, :, None, :]).any(axis=-1)
    return float(shared.mean())


def top_share(chosen: Ids, n_expert: int, part: float = 0.1) -> float:
    """Share of all selections that goes to the most used `part` of each layer's experts.

    The expert on the border counts by the fraction of it that belongs to the part, so that an even
    use of all experts gives exactly `part`.
    """
    shares = []
    whole, rest = int(part * n_expert), part * n_expert % 1
    for layer in range(chosen.shape[1]):
        counts = np.sort(np.bincount(chosen[:, layer].ravel(), minlength=n_expert))[::-1]
        shares.append((counts[:whole].sum() + rest * counts[whole]) / counts.sum())
    return float(np.mean(shares))


def recall(scores: Floats, chosen: Ids, width: int) -> float:
    """Mean share of `chosen` [token, k] that is in the `width` highest `scores` [token, E]."""
    guessed = np.argpartition(-scores, width - 1, axis=1)[:, :width]
    return float((chosen[:, :, None] == guessed[:, None, :]).any(axis=-1).mean())


def period(tokens: list[int], longest: int = MAX_PERIOD) -> int:
    """Length of the shortest cycle that runs at least three times (and 16 tokens), or 0."""
    for p in range(1, longest + 1):
        run = 0
        for before, now in zip(tokens, tokens[p:], strict=False):
            run = run + 1 if before == now else 0
            if run >= max(2 * p, 16):
                return p
    return 0


def measure(
    path: Path,
    routed: int = ROUTED_TOKENS,
    greedy: int = GREEDY_TOKENS,
    threads: int | None = None,
) -> dict[str, Any]:
    """Routing statistics of a MoE GGUF in stock llama.cpp: a fixed prompt, then greedy decoding.

    Routing is recorded over the first `routed` generated tokens, repetition over `greedy` of them.
    Next-gate recall feeds layer i's gate input to layer i+1's router matrix, without any bias.
    """
    import llama_cpp as lc

    # The binding owns llama.cpp's log and prints what its Python logger lets through.
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    lc.llama_backend_init()
    model_params = lc.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model_params.use_extra_bufts = False
    model = lc.llama_model_load_from_file(os.fsencode(path), model_params)
    if not model:
        raise ValueError(f"llama.cpp cannot load {path}")
    probe = Probe()
    callback = lc.ggml_backend_sched_eval_callback(probe)
    params = lc.llama_context_default_params()
    params.n_ctx = PROMPT_TOKENS + greedy
    params.n_batch = params.n_ubatch = PROMPT_TOKENS
    params.n_threads = params.n_threads_batch = threads or os.cpu_count() or 1
    params.cb_eval = callback
    context = lc.llama_init_from_model(model, params)
    if not context:
        raise ValueError(f"llama.cpp cannot make a context for {path}")
    vocab = lc.llama_model_get_vocab(model)
    n_vocab = lc.llama_vocab_n_tokens(vocab)

    def decode(ids: list[int]) -> int:
        held = (lc.llama_token * len(ids))(*ids)  # the batch only points at it
        if lc.llama_decode(context, lc.llama_batch_get_one(held, len(ids))) != 0:
            raise RuntimeError(f"llama.cpp failed to decode with {path}")
        logits = lc.llama_get_logits_ith(context, -1)
        return int(np.argmax(np.ctypeslib.as_array(logits, shape=(n_vocab,))))

    try:
        prompt = (lc.llama_token * 1024)()
        text = PROMPT.encode()
        n = lc.llama_tokenize(vocab, text, len(text), prompt, len(prompt), True, False)
        tokens = [decode(prompt[: min(n, PROMPT_TOKENS)])]
        while len(tokens) < greedy:
            probe.recording = len(probe.steps) < routed
            if probe.recording:
                probe.steps.append({})
            tokens.append(decode(tokens[-1:]))
    finally:
        lc.llama_free(context)
        lc.llama_model_free(model)
    return {"model": path.name, **statistics(probe, tokens)}


def statistics(probe: Probe, tokens: list[int]) -> dict[str, Any]:
    """The table of `measure`, from what the probe saw and what was generated."""
    layers = sorted(probe.routers)
    if not layers:
        raise ValueError("no routed experts were seen; is this a mixture-of-experts model?")
    chosen = np.stack([np.stack([step[i][0] for i in layers]) for step in probe.steps])
    n_expert, k = len(probe.routers[layers[0]]), chosen.shape[2]
    widths = {"recall_at_k": k, "recall_at_1_5k": math.ceil(1.5 * k), "recall_at_2k": 2 * k}
    recalls: dict[str, list[float]] = {name: [] for name in widths}
    for i, j in itertools.pairwise(layers):
        scores = np.stack([step[i][1] for step in probe.steps]) @ probe.routers[j].T
        for name, width in widths.items():
            truth = chosen[:, layers.index(j)]
            recalls[name].append(recall(scores, truth, min(width, n_expert)))
    by_layer = [overlap(chosen[:, [at]]) for at in range(len(layers))]
    return {
        "layers": len(layers),
        "experts": n_expert,
        "experts_used": k,
        "tokens_routed": len(chosen),
        "overlap": overlap(chosen),
        "overlap_by_layer": [round(x, 3) for x in by_layer],
        "top10_share": top_share(chosen, n_expert),
        **{name: float(np.mean(values)) for name, values in recalls.items()},
        "recall_by_layer": [round(x, 3) for x in recalls["recall_at_k"]],
        "tokens_greedy": len(tokens),
        "tokens_distinct": len(set(tokens)),
        "loop_period": period(tokens),
    }


def report(stats: dict[str, Any]) -> str:
    """One aligned line per statistic, then all of them as one line of JSON."""

    def show(value: Any) -> str:
        if isinstance(value, list):
            return " ".join(f"{x:.2f}" for x in value)
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    rows = [f"{name.replace('_', ' '):<18} {show(value)}" for name, value in stats.items()]
    return "\n".join([*rows, json.dumps(stats)])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write a benchmark model, or measure one.")
    parser.add_argument("out", type=Path, nargs="?", help="GGUF file to write, then measure")
    parser.add_argument("--preset", choices=PRESETS, default="olmoe")
    parser.add_argument("--layers", type=int, help="number of layers, instead of the preset's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stats", type=Path, metavar="MODEL", help="only measure this MoE GGUF")
    parser.add_argument("--no-stats", action="store_true", help="only write")
    parser.add_argument("--threads", type=int, help="threads to measure with (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="processes that make tensors")
    fields = [field.name for field in dataclasses.fields(Calibration)]
    for name in fields:
        parser.add_argument(f"--{name}", type=float, help="instead of the preset's constant")
    args = parser.parse_args(argv)
    if (args.out is None) == (args.stats is None):
        parser.error("give either a file to write or --stats MODEL")
    try:
        if args.out is not None:
            shape, calibration = PRESETS[args.preset]
            shape = dataclasses.replace(shape, n_layer=args.layers or shape.n_layer)
            given = {
                name: getattr(args, name) for name in fields if getattr(args, name) is not None
            }
            calibration = dataclasses.replace(calibration, **given)
            write_model(args.out, shape, calibration, args.seed, args.jobs)
        if not args.no_stats:
            print(report(measure(args.stats or args.out, threads=args.threads)))
    except (OSError, ValueError) as error:
        print(f"make_model: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
