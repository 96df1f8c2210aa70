"""Hugging Face checkpoints as a `Source`, against transformers and stock llama.cpp.

1. Every family: logits and greedy tokens of a GGUF made from the source are transformers' own.
2. The bytes: types, slices and shards change nothing; MXFP4 blocks keep every bit.
3. Whatever is wrong with a folder is one sentence, and the folder stays as it was.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import hf_models
import llama_cpp
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from harness import rows, stock
from hf_gguf import write_gguf
from safetensors.torch import load_file, save_file

from moe_gguf.converters.source_hf import HfSource, open_hf
from moe_gguf.runtime.errors import UserError

N_POSITIONS, N_GREEDY = 50, 12
Write = Callable[..., tuple[Path, Any]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """``checkpoint(family, **how)``: (folder, model), the same for the same call."""
    root = tmp_path_factory.mktemp("hf")
    made: dict[Any, tuple[Path, Any]] = {}

    def get(family: str, **how: Any) -> tuple[Path, Any]:
        key = (family, *sorted(how.items()))
        if key not in made:
            folder = root / "-".join(map(str, (family, *how.values())))
            made[key] = folder, hf_models.write(family, folder, **how)
        return made[key]

    return get


def tokens(n: int = N_POSITIONS) -> list[int]:
    return [int(token) for token in np.random.default_rng(3).integers(4, 300, n)]


def true_logits(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()


def assert_same_model(gguf: Path, model: Any) -> None:
    """Logits over a prompt and their top, and what follows greedily."""
    ids = tokens()
    f32 = llama_cpp.GGML_TYPE_F32
    with stock(gguf) as llm:
        context = llm.context(n_ctx=128, type_k=f32, type_v=f32)
        ours = context.decode(rows(ids))
        for _ in range(N_GREEDY):
            ids.append(int(ours[-1].argmax()))
            ours = np.concatenate([ours, context.decode(rows(ids[-1:], len(ids) - 1))])
    truth = true_logits(model, ids)
    assert np.linalg.norm(ours - truth) <= 1e-3 * np.linalg.norm(truth)
    # Also says that transformers would have continued with the same tokens.
    np.testing.assert_array_equal(ours.argmax(1), truth.argmax(1))


# --- 1. same model --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "fused"),
    [(family, False) for family in hf_models.FAMILIES]
    + [
        (family, True)
        for family in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2_full")
    ],
)
def test_logits_are_those_of_transformers(
    family: str, fused: bool, checkpoint: Write, tmp_path: Path
) -> None:
    folder, model = checkpoint(family, fused=fused)
    with closing(open_hf(folder)) as source:
        assert_same_model(write_gguf(source, tmp_path / "m.gguf"), model)


def test_mxfp4_experts_are_kept_as_they_are(checkpoint: Write, tmp_path: Path) -> None:
    folder, model = checkpoint("gpt_oss")
    folder = shutil.copytree(folder, tmp_path / "mxfp4")
    state = hf_models.pack_mxfp4(folder)
    with closing(open_hf(folder)) as source:
        assert source.metadata["general.file_type"].value == 38  # MOSTLY_MXFP4_MOE
        for stack in source.experts:
            assert stack.ggml_type == GGMLQuantizationType.MXFP4
            part = "down_proj" if stack.role == "down" else "gate_up_proj"
            both = state[f"model.layers.{stack.layer}.mlp.experts.{part}"]
            want = {"gate": both[..., ::2], "up": both[..., 1::2], "down": both}[stack.role]
            for expert in range(source.n_experts):
                ours = dequantize(stack.read(expert), GGMLQuantizationType.MXFP4)
                theirs = want[expert].T.numpy()
                np.testing.assert_array_equal(ours.reshape(theirs.shape), theirs)
        gguf = write_gguf(source, tmp_path / "m.gguf")
    model.load_state_dict(state, strict=False)
    # llama.cpp rounds a row to 8 bits before it meets a 4-bit weight.
    with stock(gguf) as llm:
        ours = llm.context(n_ctx=128).decode(rows(tokens()))
    truth = true_logits(model, tokens())
    assert np.median(np.linalg.norm(ours - truth, axis=1) / np.linalg.norm(truth, axis=1)) < 0.05


# --- 2. same bytes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [("bfloat16", GGMLQuantizationType.BF16), ("float16", GGMLQuantizationType.F16)],
)
def test_stored_types_are_kept(dtype: str, kind: GGMLQuantizationType, checkpoint: Write) -> None:
    folder, model = checkpoint("qwen3_moe", dtype=dtype)
    state = model.state_dict()
    with closing(open_hf(folder)) as source:
        stack = source.experts[1]  # up of the first layer
        both = state["model.layers.0.mlp.experts.gate_up_proj"][5]
        up = both[len(both) // 2 :].contiguous().view(torch.uint8).numpy()
        assert stack.role == "up" and stack.ggml_type == kind
        assert stack.read(5).tobytes() == up.tobytes()
        trunk = {tensor.name: tensor for tensor in source.trunk}
        embeddings = trunk["token_embd.weight"]
        assert embeddings.ggml_type == kind
        row = state["model.embed_tokens.weight"][7].view(torch.uint8).numpy()
        assert embeddings.read(7, 1).tobytes() == row.tobytes()
        for name in ("blk.1.attn_q_norm.weight", "blk.1.ffn_gate_inp.weight"):
            assert trunk[name].ggml_type == GGMLQuantizationType.F32
        router = state["model.layers.1.mlp.gate.weight"].float().numpy()
        read = trunk["blk.1.ffn_gate_inp.weight"].read(0, len(router))
        assert read.tobytes() == router.tobytes()


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2_full", "gpt_oss"])
def test_any_slice_is_part_of_the_whole(family: str, checkpoint: Write) -> None:
    rng = np.random.default_rng(0)
    with closing(open_hf(checkpoint(family)[0])) as source:
        for tensor in source.trunk:
            n_rows = int(np.prod(tensor.ne[1:]))
            whole = tensor.read(0, n_rows).reshape(n_rows, -1)
            for _ in range(5):
                first = int(rng.integers(n_rows))
                last = int(rng.integers(first, n_rows)) + 1
                part = tensor.read(first, last - first)
                assert part.tobytes() == whole[first:last].tobytes(), tensor.name


def contents(source: HfSource) -> Iterator[bytes]:
    for tensor in source.trunk:
        yield tensor.read(0, int(np.prod(tensor.ne[1:]))).tobytes()
    for stack in source.experts:
        for expert in range(source.n_experts):
            yield stack.read(expert).tobytes()


def test_shards_and_links_change_nothing(checkpoint: Write, tmp_path: Path) -> None:
    single, _ = checkpoint("qwen3_moe")
    sharded, _ = checkpoint("qwen3_moe", shard="200KB")
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


def test_identity_follows_the_configuration(checkpoint: Write, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint("qwen3_moe")[0], tmp_path / "copy")
    with closing(open_hf(folder)) as source:
        before = source.sha256
    edit_json(folder / "config.json", rms_norm_eps=2e-5)
    with closing(open_hf(folder)) as source:
        assert source.sha256 != before


def test_the_runtime_starts_without_converter_packages() -> None:
    code = (
        "import sys, moe_gguf.runtime.cli; "
        "print([m for m in ('torch', 'transformers', 'huggingface_hub', 'sentencepiece') "
        "if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# --- 3. one sentence ------------------------------------------------------------------------------


def edit_json(path: Path, **values: Any) -> None:
    """Set top-level values of a JSON file; None removes."""
    document = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in document.items() if v is not None}))


def edit_config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **values)


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def edit_tensor(
    name: str, change: Callable[[torch.Tensor], torch.Tensor | None]
) -> Callable[[Path], None]:
    """Change one tensor, or (None) remove it and its index entry."""

    def edit(folder: Path) -> None:
        shard = shard_of(folder, name)
        tensors = load_file(shard)
        value = change(tensors.pop(name))
        index = json.loads((folder / INDEX).read_text())
        del index["weight_map"][name]
        if value is not None:
            tensors[name] = value
            index["weight_map"][name] = shard.name
        save_file(tensors, shard)
        (folder / INDEX).write_text(json.dumps(index))

    return edit


def poison(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[3] = value
        return tensor

    return change


def unknown_tensor(folder: Path) -> None:
    save_file({"model.extra.weight": torch.ones(3)}, folder / "extra.safetensors")
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


INDEX = "model.safetensors.index.json"
EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"
QUERY = "model.layers.2.self_attn.q_proj.weight"
FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated shard": (cut_shard, "cut short"),
    "missing shard": (lambda f: shard_of(f, EXPERT).unlink(), "No such file"),
    "a folder for a shard": (replace_by_folder, "Is a directory"),
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
    "config lacks a size": (edit_config(hidden_size=None), "hidden_size should be"),
    "config has a wrong size": (edit_config(hidden_size="64"), "hidden_size should be"),
    "config is of another model": (edit_config(hidden_size=128, head_dim=32), "has shape"),
    "too few experts": (edit_config(num_local_experts=4), "mlp.gate.weight has shape"),
    "too many experts": (edit_config(num_local_experts=9), "mlp.gate.weight has shape"),
    "more used than there are": (edit_config(num_experts_per_tok=9), "uses 9 of 8"),
    "another family": (edit_config(model_type="llama"), "convert_hf_to_gguf.py"),
    "another routing": (edit_config(norm_topk_prob=False), "norm_topk_prob is False"),
    "another rope": (edit_config(rope_parameters={"rope_type": "dynamic"}), "rope type 'dynamic'"),
    "rope is no object": (edit_config(rope_parameters="yarn"), "rope parameters"),
    "yarn without factor": (edit_config(rope_parameters={"rope_type": "yarn"}), "rope factor"),
    "already quantized": (edit_config(quantization_config={"quant_method": "gptq"}), "gptq"),
    "8-bit floats": (edit_tensor(QUERY, lambda t: t.to(torch.float8_e4m3fn)), "F8_E4M3"),
    "bytes": (edit_tensor(QUERY, lambda t: t.to(torch.uint8)), "U8"),
    "mixed types": (edit_tensor(EXPERT, lambda t: t.half()), "different types"),
    "missing tensor": (edit_tensor(QUERY, lambda t: None), f"lacks the tensor {QUERY}"),
    "missing expert": (edit_tensor(EXPERT, lambda t: None), f"lacks the tensor {EXPERT}"),
    "unknown tensor": (unknown_tensor, "model.extra.weight has no place"),
    "wrong shape": (edit_tensor(QUERY, lambda t: t[:-1].contiguous()), "has shape"),
    "no tokenizer": (remove("tokenizer.json"), "neither tokenizer.json nor tokenizer.model"),
    "damaged tokenizer": (write_file("tokenizer.json", b"{}"), "cannot be understood"),
    "tokenizer is no JSON": (write_file("tokenizer.json", b"{"), "is not JSON"),
    "damaged tokenizer.model": (write_file("tokenizer.model", b"x"), "tokenizer.model is damaged"),
    "damaged tokenizer settings": (write_file("tokenizer_config.json", b"["), "tokenizer"),
    "more tokens than the model": (edit_config(vocab_size=300), "has shape"),
    "unknown rule of cutting": (other_rule, "cuts text by a rule"),
    "damaged model card": (write_file("README.md", b"---\n: [\n---\n"), "README.md"),
    "NaN in the trunk": (edit_tensor(QUERY, poison(float("nan"))), f"{QUERY} holds NaN"),
    "Inf in an expert": (edit_tensor(EXPERT, poison(float("-inf"))), f"{EXPERT} holds NaN"),
}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_sentence(fault: str, checkpoint: Write, tmp_path: Path) -> None:
    harm, says = FAULTS[fault]
    folder = shutil.copytree(checkpoint("qwen3_moe", shard="200KB")[0], tmp_path / "model")
    harm(folder)
    before = snapshot(folder)
    with pytest.raises(UserError) as caught, closing(open_hf(folder)) as source:
        list(contents(source))
    sentence = str(caught.value)
    assert says in sentence and "\n" not in sentence
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"scales": lambda t: poison(255)(t)}, "holds NaN scales"),
        ({"scales": lambda t: t.to(torch.float32)}, "not as MXFP4's bytes"),
        ({"blocks": lambda t: t[..., :8].contiguous()}, "has shape"),
        ({"scales": lambda t: None}, "lacks the tensor"),
    ],
)
def test_mxfp4_faults(
    change: dict[str, Callable[[torch.Tensor], torch.Tensor | None]],
    says: str,
    checkpoint: Write,
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(checkpoint("gpt_oss")[0], tmp_path / "model")
    hf_models.pack_mxfp4(folder)
    tensors = load_file(folder / "model.safetensors")
    for part, harm in change.items():
        name = f"model.layers.1.mlp.experts.down_proj_{part}"
        value = harm(tensors.pop(name))
        tensors |= {} if value is None else {name: value}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=says), closing(open_hf(folder)) as source:
        list(contents(source))


def test_tensors_of_no_computation_are_left_out(checkpoint: Write, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint("qwen3_moe_tied")[0], tmp_path / "model")
    with closing(open_hf(folder)) as source:
        names = [tensor.name for tensor in source.trunk]
        assert "output.weight" not in names
    extra = (
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.3.eh_proj.weight",
        "lm_head.weight",
    )
    tensors = load_file(folder / "model.safetensors") | {name: torch.ones(4) for name in extra}
    save_file(tensors, folder / "model.safetensors")
    with closing(open_hf(folder)) as source:
        assert [tensor.name for tensor in source.trunk] == names


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_nan_is_found_in_every_type(dtype: str, checkpoint: Write, tmp_path: Path) -> None:
    folder = checkpoint("qwen3_moe", dtype=dtype)[0]
    folder = shutil.copytree(folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors[EXPERT] = poison(float("nan"))(tensors[EXPERT])
    save_file(tensors, folder / "model.safetensors")
    with closing(open_hf(folder)) as source, pytest.raises(UserError, match=r"experts\.5\.up_proj"):
        list(contents(source))


def test_a_shard_that_shrinks_while_open(checkpoint: Write, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint("qwen3_moe")[0], tmp_path / "model")
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
        ("deepseek_v2_full", {"q_lora_rank": None}, "uncompressed queries"),
        ("olmoe", {"num_key_value_heads": 2}, "num_key_value_heads is 2"),
        ("gpt_oss", {"layer_types": ["full_attention"] * 3}, "layer_types"),
        ("deepseek", {"first_k_dense_replace": 3}, "first_k_dense_replace"),
        ("mixtral", {"attention_bias": True}, "attention_bias is True"),
        ("qwen2_moe", {"mlp_only_layers": [1]}, "mlp_only_layers"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(
    family: str, change: dict[str, Any], says: str, checkpoint: Write, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint(family)[0], tmp_path / "model")
    edit_json(folder / "config.json", **change)
    with pytest.raises(UserError, match=says):
        open_hf(folder)
