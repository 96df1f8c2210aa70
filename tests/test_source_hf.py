"""Hugging Face checkpoints as a `Source`, against transformers and stock llama.cpp.

1. Every family: logits and greedy tokens of a GGUF made from the source are transformers' own.
2. The bytes: types, slices and shards change nothing; MXFP4 blocks keep every bit.
3. Whatever is wrong with a folder is one sentence, and the folder stays as it was.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import hf_files
import llama_cpp
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from harness import Logits, rows, stock
from hf_files import Raw, load, save
from hf_gguf import write_gguf

from moe_gguf.converters.hf import source as hf_source
from moe_gguf.converters.hf.source import HfSource, open_hf
from moe_gguf.runtime.errors import UserError


def compute(gguf: Path) -> tuple[Logits, list[int]]:
    """Stock llama.cpp's logits over the prompt, and how it goes on greedily."""
    f32, ids = llama_cpp.GGML_TYPE_F32, hf_files.prompt()
    greedy: list[int] = []
    with stock(gguf) as llm:
        context = llm.context(n_ctx=128, type_k=f32, type_v=f32)
        logits = last = context.decode(rows(ids))
        while len(greedy) < hf_files.N_GREEDY:
            greedy.append(int(last[-1].argmax()))
            last = context.decode(rows(greedy[-1:], len(ids) + len(greedy) - 1))
    return logits, greedy


# --- 1. same model --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in hf_files.CHECKPOINTS if n != "gpt_oss-mxfp4"])
def test_logits_are_those_of_transformers(name: str, hf_root: Path, tmp_path: Path) -> None:
    truth = np.load(hf_root / f"{name}.npz")
    with closing(open_hf(hf_root / name)) as source:
        logits, greedy = compute(write_gguf(source, tmp_path / "m.gguf"))
    # llama.cpp rounds a row to 8 bits before it meets a bfloat16 weight; ties may fall otherwise.
    exact = not name.endswith("bfloat16")
    error = np.linalg.norm(logits - truth["logits"]) / np.linalg.norm(truth["logits"])
    assert error <= (1e-3 if exact else 1e-2)
    if exact:
        np.testing.assert_array_equal(logits.argmax(1), truth["logits"].argmax(1))
        assert greedy == truth["greedy"].tolist()


def test_mxfp4_experts_are_kept_as_they_are(hf_root: Path, tmp_path: Path) -> None:
    truth = np.load(hf_root / "gpt_oss-mxfp4.npz")
    with closing(open_hf(hf_root / "gpt_oss-mxfp4")) as source:
        assert source.metadata["general.file_type"].value == 38  # MOSTLY_MXFP4_MOE
        for stack in source.experts:
            assert stack.ggml_type == GGMLQuantizationType.MXFP4
            part = "down_proj" if stack.role == "down" else "gate_up_proj"
            both = truth[f"model.layers.{stack.layer}.mlp.experts.{part}"]
            want = {"gate": both[..., ::2], "up": both[..., 1::2], "down": both}[stack.role]
            for expert in range(source.n_experts):
                ours = dequantize(stack.read(expert, 0, stack.ne[1]), GGMLQuantizationType.MXFP4)
                np.testing.assert_array_equal(ours.reshape(want[expert].T.shape), want[expert].T)
        logits, _ = compute(write_gguf(source, tmp_path / "m.gguf"))
    # llama.cpp rounds a row to 8 bits before it meets a 4-bit weight.
    error = np.linalg.norm(logits - truth["logits"], axis=1)
    assert np.median(error / np.linalg.norm(truth["logits"], axis=1)) < 0.05


# --- 2. same bytes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [("bfloat16", GGMLQuantizationType.BF16), ("float16", GGMLQuantizationType.F16)],
)
def test_stored_types_are_kept(dtype: str, kind: GGMLQuantizationType, hf_root: Path) -> None:
    folder = hf_root / f"qwen3_moe-{dtype}"
    stored = load(folder / "model.safetensors")
    with closing(open_hf(folder)) as source:
        stack = source.experts[4]  # up of the second layer
        assert (stack.layer, stack.role, stack.ggml_type) == (1, "up", kind)
        assert stack.read(5, 0, stack.ne[1]).tobytes() == stored[EXPERT].data
        trunk = {tensor.name: tensor for tensor in source.trunk}
        embeddings, raw = trunk["token_embd.weight"], stored["model.embed_tokens.weight"]
        assert embeddings.ggml_type == kind
        row = raw.shape[1] * raw.width
        assert embeddings.read(7, 1).tobytes() == raw.data[7 * row : 8 * row]
        for name in ("blk.1.attn_q_norm.weight", "blk.1.ffn_gate_inp.weight"):
            assert trunk[name].ggml_type == GGMLQuantizationType.F32
        router = np.frombuffer(stored["model.layers.1.mlp.gate.weight"].data, np.uint16)
        if dtype == "bfloat16":
            values = (router.astype(np.uint32) << 16).view(np.float32)
        else:
            values = router.view(np.float16).astype(np.float32)
        assert trunk["blk.1.ffn_gate_inp.weight"].read(0, 8).tobytes() == values.tobytes()


@pytest.mark.parametrize(
    "name", ["mixtral", "mixtral-fused", "deepseek_v2_full", "gpt_oss", "gpt_oss-mxfp4"]
)
def test_any_slice_is_part_of_the_whole(
    name: str, hf_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_source, "BLOCK_ROWS", 7)
    rng = np.random.default_rng(0)
    with closing(open_hf(hf_root / name)) as source:
        for tensor in source.trunk:
            n_rows = math.prod(tensor.ne[1:])
            whole = tensor.read(0, n_rows).reshape(n_rows, -1)
            for _ in range(5):
                first = int(rng.integers(n_rows))
                last = int(rng.integers(first, n_rows)) + 1
                part = tensor.read(first, last - first)
                assert part.tobytes() == whole[first:last].tobytes(), tensor.name
        for stack in source.experts:
            rows = stack.ne[1]
            expert = int(rng.integers(source.n_experts))
            whole = stack.read(expert, 0, rows).reshape(rows, -1)
            first = int(rng.integers(rows))
            n = int(rng.integers(rows - first)) + 1
            part = stack.read(expert, first, n)
            assert part.tobytes() == whole[first : first + n].tobytes(), stack.name


def contents(source: HfSource) -> Iterator[bytes]:
    for tensor in source.trunk:
        yield tensor.read(0, math.prod(tensor.ne[1:])).tobytes()
    for stack in source.experts:
        for expert in range(source.n_experts):
            yield stack.read(expert, 0, stack.ne[1]).tobytes()


def test_shards_and_links_change_nothing(hf_root: Path, tmp_path: Path) -> None:
    single, sharded = hf_root / "qwen3_moe", hf_root / "qwen3_moe-sharded"
    assert len(list(sharded.glob("model-*.safetensors"))) > 3
    cache = tmp_path / "models--me--Tiny-1B" / "snapshots" / "0123abc"
    cache.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for i, file in enumerate(sorted(sharded.iterdir())):
        blob = shutil.copy(file, tmp_path / "blobs" / str(i))
        (cache / file.name).symlink_to(os.path.relpath(blob, cache))
    with (
        closing(open_hf(single)) as one,
        closing(open_hf(sharded)) as many,
        closing(open_hf(cache)) as linked,
    ):
        assert list(contents(one)) == list(contents(many)) == list(contents(linked))
        assert linked.name == "Tiny-1B"
        assert linked.metadata["general.name"].value == "Tiny 1B"
        assert many.sha256 == linked.sha256 != one.sha256
        assert (
            many.n_bytes == linked.n_bytes == sum(file.stat().st_size for file in sharded.iterdir())
        )


def test_identity_follows_the_configuration(hf_root: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(hf_root / "qwen3_moe", tmp_path / "copy")
    with closing(open_hf(folder)) as source:
        before = source.sha256
    edit_json(folder / "config.json", rms_norm_eps=2e-5)
    with closing(open_hf(folder)) as source:
        assert source.sha256 != before


def test_the_runtime_starts_without_converter_packages() -> None:
    code = (
        "import sys, moe_gguf.runtime.cli.main; "
        "print([m for m in ('torch', 'transformers', 'huggingface_hub', 'sentencepiece') "
        "if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# --- 3. one sentence ------------------------------------------------------------------------------


NULL = object()


def edit_json(path: Path, **values: Any) -> None:
    """Set top-level values of a JSON file; None removes, NULL is one."""
    document = json.loads(path.read_text()) | values
    kept = {k: v for k, v in document.items() if v is not None}
    path.write_text(json.dumps({k: None if v is NULL else v for k, v in kept.items()}))


def edit_config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **values)


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


Change = Callable[[Raw], Raw | None]


def edit_tensor(name: str, change: Change) -> Callable[[Path], None]:
    """Change one tensor, or (None) remove it and its index entry."""

    def edit(folder: Path) -> None:
        shard = shard_of(folder, name)
        tensors = load(shard)
        value = change(tensors.pop(name))
        index = json.loads((folder / INDEX).read_text())
        del index["weight_map"][name]
        if value is not None:
            tensors[name] = value
            index["weight_map"][name] = shard.name
        save(tensors, shard)
        (folder / INDEX).write_text(json.dumps(index))

    return edit


def narrow(dtype: str, width: int) -> Change:
    """Another stored type, whatever its values."""
    return lambda raw: Raw(dtype, raw.shape, raw.data[: math.prod(raw.shape) * width])


def flat(raw: Raw) -> Raw:
    """The same data in one row."""
    return raw._replace(shape=(1, math.prod(raw.shape)))


def poison(item: bytes) -> Change:
    """One item in the middle becomes this."""

    def change(raw: Raw) -> Raw:
        at = len(raw.data) // len(item) // 2 * len(item)
        return raw._replace(data=raw.data[:at] + item + raw.data[at + len(item) :])

    return change


NAN = {"F32": b"\0\0\xc0\x7f", "BF16": b"\xc0\x7f", "F16": b"\0\x7e"}
MINUS_INF = b"\0\0\x80\xff"
ONES = Raw("F32", (4,), np.ones(4, "<f4").tobytes())


def unknown_tensor(folder: Path) -> None:
    save({"model.extra.weight": ONES}, folder / "extra.safetensors")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.extra.weight"] = "extra.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def cut_shard(folder: Path) -> None:
    shard = shard_of(folder, EXPERT)
    os.truncate(shard, shard.stat().st_size - 100)


def replace_by_folder(folder: Path) -> None:
    shard = shard_of(folder, EXPERT)
    shard.unlink()
    shard.mkdir()


def lie(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][EXPERT] = next(
        shard for shard in index["weight_map"].values() if shard != index["weight_map"][EXPERT]
    )
    (folder / INDEX).write_text(json.dumps(index))


def rename_shard_in_index(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][EXPERT] = "model-00099-of-00099.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def header(text: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        shard_of(folder, EXPERT).write_bytes(struct.pack("<Q", len(text)) + text)

    return write


def write_file(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def remove(*names: str) -> Callable[[Path], None]:
    def unlink(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return unlink


def other_rule(folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    document["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] += "|x"
    (folder / "tokenizer.json").write_text(json.dumps(document))


def no_merges(folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(document))


INDEX = "model.safetensors.index.json"
EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"
QUERY = "model.layers.2.self_attn.q_proj.weight"
FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated shard": (cut_shard, "cut short"),
    "missing shard": (lambda f: shard_of(f, EXPERT).unlink(), "no such file"),
    "a folder for a shard": (replace_by_folder, "is a directory"),
    "index lies about a tensor": (lie, "does not hold it"),
    "index lies about a shard": (rename_shard_in_index, "model-00099-of-00099.safetensors"),
    "index leads outside": (
        lambda f: edit_json(f / INDEX, weight_map={EXPERT: "../x.safetensors"}),
        "no file name",
    ),
    "index is no JSON": (write_file(INDEX, b"{"), "is not JSON"),
    "index without a map": (write_file(INDEX, b"{}"), "no weight_map"),
    "no weights": (remove(INDEX), "holds neither"),
    "not safetensors": (header(b"x"), "not a whole safetensors file"),
    "damaged header": (header(b"[]"), "damaged header"),
    "header without offsets": (header(b'{"a": {"dtype": "F32", "shape": [1]}}'), "damaged header"),
    "header with bad offsets": (
        header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 3]}}'),
        "damaged header",
    ),
    "no config": (remove("config.json"), "has no config.json"),
    "malformed config": (write_file("config.json", b'{"model_type": '), "is not JSON"),
    "config is a list": (write_file("config.json", b"[]"), "JSON object"),
    "config lacks a size": (edit_config(hidden_size=None), "implies [512, 2048]"),
    "config has a wrong size": (edit_config(hidden_size="64"), "hidden_size should be"),
    "too many layers": (edit_config(num_hidden_layers=10**9), "at most"),
    "config is of another model": (edit_config(hidden_size=128, head_dim=32), "has shape"),
    "too few experts": (edit_config(num_local_experts=4), "mlp.gate.weight has shape"),
    "too many experts": (edit_config(num_local_experts=9), "mlp.gate.weight has shape"),
    "more used than there are": (edit_config(num_experts_per_tok=9), "uses 9 of 8"),
    "another family": (edit_config(model_type="llama"), "convert_hf_to_gguf.py"),
    "another routing": (edit_config(norm_topk_prob=False), "norm_topk_prob is False"),
    "another routing by default": (edit_config(norm_topk_prob=None), "norm_topk_prob is False"),
    "another rope": (edit_config(rope_parameters={"rope_type": "dynamic"}), "rope type 'dynamic'"),
    "rope is no object": (edit_config(rope_parameters="yarn"), "rope parameters"),
    "yarn without factor": (edit_config(rope_parameters={"rope_type": "yarn"}), "rope factor"),
    "already quantized": (edit_config(quantization_config={"quant_method": "gptq"}), "gptq"),
    "8-bit floats": (edit_tensor(QUERY, narrow("F8_E4M3", 1)), "F8_E4M3"),
    "bytes": (edit_tensor(QUERY, narrow("U8", 1)), "U8"),
    "mixed types": (edit_tensor(EXPERT, narrow("F16", 2)), "different types"),
    "missing tensor": (edit_tensor(QUERY, lambda raw: None), f"lacks the tensor {QUERY}"),
    "missing expert": (edit_tensor(EXPERT, lambda raw: None), f"lacks the tensor {EXPERT}"),
    "unknown tensor": (unknown_tensor, "model.extra.weight has no place"),
    "wrong shape": (edit_tensor(QUERY, flat), "has shape"),
    "no tokenizer": (remove("tokenizer.json"), "neither tokenizer.json nor tokenizer.model"),
    "damaged tokenizer": (write_file("tokenizer.json", b"{}"), "cannot be understood"),
    "tokenizer is no JSON": (write_file("tokenizer.json", b"{"), "is not JSON"),
    "no merges": (no_merges, "no merges"),
    "more tokens than the model": (edit_config(vocab_size=300), "has shape"),
    "unknown rule of cutting": (other_rule, "cuts text by a rule"),
    "NaN in the trunk": (edit_tensor(QUERY, poison(NAN["F32"])), f"{QUERY} holds NaN"),
    "Inf in an expert": (edit_tensor(EXPERT, poison(MINUS_INF)), f"{EXPERT} holds NaN"),
}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_sentence(fault: str, hf_root: Path, tmp_path: Path) -> None:
    harm, says = FAULTS[fault]
    folder = shutil.copytree(hf_root / "qwen3_moe-sharded", tmp_path / "model")
    harm(folder)
    before = snapshot(folder)
    with pytest.raises(UserError) as caught, closing(open_hf(folder)) as source:
        list(contents(source))
    sentence = str(caught.value)
    assert says in sentence and "\n" not in sentence
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("scales", poison(b"\xff"), "holds NaN scales"),
        ("scales", lambda raw: Raw("F32", raw.shape, raw.data * 4), "not as MXFP4's bytes"),
        ("blocks", flat, "has shape"),
        ("scales", lambda raw: None, "lacks the tensor"),
    ],
)
def test_mxfp4_faults(part: str, change: Change, says: str, hf_root: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(hf_root / "gpt_oss-mxfp4", tmp_path / "model")
    tensors = load(folder / "model.safetensors")
    name = f"model.layers.1.mlp.experts.down_proj_{part}"
    value = change(tensors.pop(name))
    save(tensors | ({name: value} if value else {}), folder / "model.safetensors")
    with pytest.raises(UserError, match=says), closing(open_hf(folder)) as source:
        list(contents(source))


def test_mxfp4_of_odd_sizes(hf_root: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(hf_root / "gpt_oss-mxfp4", tmp_path / "model")
    edit_json(folder / "config.json", intermediate_size=100)
    tensors = load(folder / "model.safetensors")
    for layer in range(3):  # the biases come first, and would not fit
        name = f"model.layers.{layer}.mlp.experts.gate_up_proj_bias"
        tensors[name] = Raw("F32", (8, 200), bytes(8 * 200 * 4))
    save(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="multiples of 32"):
        open_hf(folder)


def test_tensors_of_no_computation_are_left_out(hf_root: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(hf_root / "qwen3_moe_tied", tmp_path / "model")
    with closing(open_hf(folder)) as source:
        names = [tensor.name for tensor in source.trunk]
    assert "output.weight" not in names
    extra = (
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.3.eh_proj.weight",
        "lm_head.weight",
    )
    tensors = load(folder / "model.safetensors") | dict.fromkeys(extra, ONES)
    save(tensors, folder / "model.safetensors")
    with closing(open_hf(folder)) as source:
        assert [tensor.name for tensor in source.trunk] == names


@pytest.mark.parametrize(("how", "dtype"), [("bfloat16", "BF16"), ("float16", "F16")])
def test_nan_is_found_in_every_type(how: str, dtype: str, hf_root: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(hf_root / f"qwen3_moe-{how}", tmp_path / "model")
    tensors = load(folder / "model.safetensors")
    poisoned = poison(NAN[dtype])(tensors[EXPERT])
    assert poisoned is not None
    save(tensors | {EXPERT: poisoned}, folder / "model.safetensors")
    with closing(open_hf(folder)) as source, pytest.raises(UserError, match=r"experts\.5\.up_proj"):
        list(contents(source))


def test_a_shard_that_shrinks_while_open(hf_root: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(hf_root / "qwen3_moe", tmp_path / "model")
    with closing(open_hf(folder)) as source:
        os.truncate(folder / "model.safetensors", 5000)
        with pytest.raises(UserError, match="ends inside"):
            list(contents(source))


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="not a folder"):
        open_hf(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("family", "change", "says"),
    [
        ("deepseek_v2_full", {"q_lora_rank": NULL}, "uncompressed queries"),
        ("olmoe", {"num_key_value_heads": 2}, "num_key_value_heads is 2"),
        ("gpt_oss", {"layer_types": ["full_attention"] * 3}, "layer_types"),
        ("deepseek", {"first_k_dense_replace": 3}, "first_k_dense_replace"),
        ("mixtral", {"attention_bias": True}, "attention_bias is True"),
        ("qwen2_moe", {"mlp_only_layers": [1]}, "mlp_only_layers"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(
    family: str, change: dict[str, Any], says: str, hf_root: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(hf_root / family, tmp_path / "model")
    edit_json(folder / "config.json", **change)
    with pytest.raises(UserError, match=says):
        open_hf(folder)
