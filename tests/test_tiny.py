"""The tiny models are what their module docstring promises, to stock llama.cpp and to gguf."""

from __future__ import annotations

import ctypes
from collections import defaultdict
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
import tiny
from gguf import GGMLQuantizationType as Quant
from gguf import GGUFReader
from gguf.quants import dequantize

TOP_K = {"mixtral": 2, "llama4": 1}  # elsewhere 4
N_EXPERTS = {"mixtral": 8}  # elsewhere 16


def load(path: Path) -> Any:
    """Stock Llama, untyped; one thread, since a second only spins in barriers at this size."""
    return llama_cpp.Llama(str(path), n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)


def last_logits(model: Any, text: str) -> npt.NDArray[np.float32]:
    """Logits after a prompt of its own, on a cleared memory."""
    model.reset()
    model.eval(model.tokenize(text.encode()))
    row = llama_cpp.llama_get_logits_ith(model.ctx, -1)
    return np.ctypeslib.as_array(row, (model.n_vocab(),)).copy()


def routing(path: Path, n_tokens: int) -> dict[str, npt.NDArray[np.int32]]:
    """Experts in order of preference, [token, expert], per MoE layer, for random tokens."""
    lib = llama_cpp.llama_cpp._lib
    lib.ggml_get_name.argtypes, lib.ggml_get_name.restype = [ctypes.c_void_p], ctypes.c_char_p
    lib.ggml_get_data.argtypes, lib.ggml_get_data.restype = [ctypes.c_void_p], ctypes.c_void_p
    lib.ggml_nelements.argtypes, lib.ggml_nelements.restype = [ctypes.c_void_p], ctypes.c_int64
    seen: dict[str, npt.NDArray[np.int32]] = {}

    def observe(tensor: int, ask: bool, _: object) -> bool:
        # The sorted experts, not ffn_moe_topk: that is a view with gaps of its first columns. In
        # grouped routing the same pass sorts groups too, under no such name.
        name = lib.ggml_get_name(tensor).decode()
        if not name.startswith("ffn_moe_argsort-"):
            return not ask
        if not ask:
            data = ctypes.cast(lib.ggml_get_data(tensor), ctypes.POINTER(ctypes.c_int32))
            seen[name] = np.ctypeslib.as_array(data, (lib.ggml_nelements(tensor),)).copy()
        return True

    callback = llama_cpp.ggml_backend_sched_eval_callback(observe)
    model = llama_cpp.llama_model_load_from_file(
        str(path).encode(), llama_cpp.llama_model_default_params()
    )
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 256, 1, 1
    params.cb_eval = callback
    context = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(n_tokens, 0, 1)
    batch.n_tokens = n_tokens
    for i, token in enumerate(np.random.default_rng(1).integers(0, 256, n_tokens)):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(token), i, 1
        batch.seq_id[i][0], batch.logits[i] = 0, True  # an output everywhere: no layer is cropped
    assert llama_cpp.llama_decode(context, batch) == 0
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return {name: flat.reshape(n_tokens, -1) for name, flat in seen.items()}


def expert_bytes(path: Path) -> dict[str, dict[str, int]]:
    """Bytes of one expert, by layer and part, from an independent reader."""
    sizes: dict[str, dict[str, int]] = defaultdict(dict)
    for t in GGUFReader(path).tensors:
        if t.name.endswith("_exps.weight"):
            _, layer, part, _ = t.name.split(".")
            sizes[layer][part] = int(t.n_bytes) // int(t.shape[2])
    return dict(sizes)


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_stock_llama_cpp_runs_it(layout: str, tmp_path: Path) -> None:
    model = load(tiny.write_tiny(layout, tmp_path / "m.gguf"))
    a, b = last_logits(model, "Hello world"), last_logits(model, "The expert of memory")
    assert np.isfinite(a).all() and np.isfinite(b).all()
    assert 0.5 < a.std() < 10
    assert np.corrcoef(a, b)[0, 1] < 0.9
    assert np.array_equal(a, last_logits(model, "Hello world"))


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_greedy_text_is_lively_ascii_of_full_length(layout: str, tmp_path: Path) -> None:
    model = load(tiny.write_tiny(layout, tmp_path / "m.gguf"))
    out = model.create_completion("Hello world", max_tokens=48, temperature=0)
    text = out["choices"][0]["text"]
    assert out["usage"]["completion_tokens"] == 48
    assert text.isascii() and text.isprintable()
    assert len(set(model.tokenize(text.encode(), add_bos=False))) >= 12


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_every_expert_is_routed_to(layout: str, tmp_path: Path) -> None:
    path = tiny.write_tiny(layout, tmp_path / "m.gguf")
    order = routing(path, 200)
    assert len(order) == len(expert_bytes(path)) >= 2
    for name, experts in order.items():
        chosen = experts[:, : TOP_K.get(layout, 4)]
        counts = np.bincount(chosen.ravel(), minlength=N_EXPERTS.get(layout, 16))
        assert (counts > 0).all() and counts.max() < 160, (name, counts)


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_mixed_and_split_files_load(layout: str, tmp_path: Path) -> None:
    path = tiny.write_tiny(layout, tmp_path / "m.gguf", mixed=True, split=True, align=4096)
    assert path.name == "m-00001-of-00003.gguf"
    parts = sorted(tmp_path.iterdir())
    assert len(parts) == 3
    assert sum(bool(expert_bytes(p)) for p in parts) >= 2
    whole = tiny.write_tiny(layout, tmp_path / "whole.gguf", mixed=True)
    sizes = expert_bytes(whole)
    assert len({tuple(s.items()) for s in sizes.values()}) == min(len(sizes), 3)
    a, b = (last_logits(load(p), "Hello world") for p in (path, whole))
    assert np.isfinite(a).all() and np.array_equal(a, b)


def test_same_arguments_same_bytes(tmp_path: Path) -> None:
    a = tiny.write_tiny("qwen3moe", tmp_path / "a.gguf")
    b = tiny.write_tiny("qwen3moe", tmp_path / "b.gguf")
    c = tiny.write_tiny("qwen3moe", tmp_path / "c.gguf", seed=1)
    assert a.read_bytes() == b.read_bytes() != c.read_bytes()


def test_expert_sizes_are_awkward(tmp_path: Path) -> None:
    for layout in tiny.LAYOUTS:
        sizes = expert_bytes(tiny.write_tiny(layout, tmp_path / "m.gguf"))
        some = set(next(iter(sizes.values())).values())
        if layout != "mixtral":
            assert all(s % 4096 for s in some), (layout, some)
        if layout in ("gpt-oss", "deepseek2"):
            assert any(s % 512 for s in some), (layout, some)


@pytest.mark.parametrize("quant", ["F32", "F16", "Q4_0", "Q5_0", "Q8_0", "Q4_K", "Q6_K", "MXFP4"])
def test_random_blocks_have_the_spread_asked_for(quant: str) -> None:
    rng = np.random.default_rng(0)
    data = tiny.random_weights(rng, Quant[quant], (4, 64, 256), 0.1)
    weights = dequantize(data, Quant[quant])
    assert weights.shape == (4, 64, 256)
    assert abs(weights.mean()) < 0.01
    assert 0.06 < weights.std() < 0.16


def test_tokenizer_round_trips_and_chat_works(tmp_path: Path) -> None:
    model = load(tiny.write_tiny("qwen3moe", tmp_path / "m.gguf"))
    text = "Hello the expert, naïve ☃\n".encode()
    tokens = model.tokenize(text, add_bos=False)
    assert model.detokenize(tokens) == text
    assert len(tokens) < len(text)  # merges apply
    assert model.tokenize(text)[0] == model.token_bos()
    turn = model.tokenize(tiny.TURN.encode(), add_bos=False, special=True)
    assert len(turn) == 1
    answer = model.create_chat_completion([{"role": "user", "content": "Hello"}], max_tokens=8)
    assert answer["usage"]["completion_tokens"] == 8
