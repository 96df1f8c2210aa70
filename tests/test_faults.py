"""What a model's file, a caller or a fork may bring along, and what must not end the process.

Each test is named for the failure. Files are tiny models with some fields changed.
"""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from conftest import TinyFile
from mutant import Field, Mutant

import moe_gguf
from moe_gguf import UserError
from moe_gguf.runtime.engine.output import Output
from moe_gguf.runtime.errors import RequestError
from moe_gguf.runtime.formats.gguf_header import ValueType

SETTINGS: dict[str, Any] = {"memory": "600MB", "n_ctx": 256, "n_threads": 1}
GREEDY: dict[str, Any] = {"max_tokens": 8, "temperature": 0}
TOKENS, TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"


def opened(path: Path, **settings: Any) -> moe_gguf.Llama:
    return moe_gguf.Llama(path, **(SETTINGS | settings))


def text(llama: llama_cpp.Llama) -> str:
    return str(llama.create_completion("Hello world", **GREEDY)["choices"][0]["text"])


@pytest.fixture
def llama(tiny_file: TinyFile) -> Iterator[moe_gguf.Llama]:
    model = opened(tiny_file("qwen3moe"))
    yield model
    model.close()


@pytest.fixture
def changed(tiny_file: TinyFile, tmp_path: Path) -> Callable[..., Path]:
    """``changed(edit)``: tiny qwen3moe after ``edit`` of its fields."""

    def make(edit: Callable[[dict[str, Field]], object]) -> Path:
        mutant = Mutant.read(tiny_file("qwen3moe"))
        edit(mutant.fields)
        return mutant.write(tmp_path / "changed.gguf")

    return make


def set_items(key: str, items: dict[int, Any]) -> Callable[[dict[str, Field]], None]:
    def edit(fields: dict[str, Field]) -> None:
        values = fields[key].value
        assert isinstance(values, list)
        for i, value in items.items():
            values[i] = value

    return edit


def put_text(key: str, value: str) -> Callable[[dict[str, Field]], None]:
    return lambda fields: fields.update({key: Field(ValueType.STRING, value)})


# --- texts of tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [31, 32, 33, 64, 200])
def test_a_token_of_many_bytes_keeps_its_text(n: int, changed: Callable[..., Path]) -> None:
    llama = opened(changed(set_items(TOKENS, {270: "Ġ" * n, 271: "ĊĉĠ" * n})))
    try:
        assert llama.detokenize([270]) == b" " * n
        assert llama.detokenize([5, 270, 271]) == llama.detokenize([5]) + b" " * n + b"\n\t " * n
        assert llama.tokenizer().decode([270]) == " " * n
        assert llama.tokenize(b" " * n, add_bos=False)
    finally:
        llama.close()


def test_generated_text_has_the_long_tokens(
    changed: Callable[..., Path],
) -> None:
    llama = opened(changed(set_items(TOKENS, {270: "Ġ" * 64})))
    output = Output(llama._vocabulary, (), special=False)
    pieces = [output.push(token)[0] for token in (270, 33, 270, 270)]
    between = llama.detokenize([33]).decode()
    assert "".join(pieces) == " " * 64 + between + " " * 128
    llama.close()


def test_a_model_without_a_vocabulary(changed: Callable[..., Path]) -> None:
    def edit(fields: dict[str, Field]) -> None:
        for key in [key for key in fields if key.startswith("tokenizer.")]:
            del fields[key]
        put_text("tokenizer.ggml.model", "none")(fields)
        fields["qwen3moe.vocab_size"] = Field(ValueType.UINT32, 305)

    path = changed(edit)
    done = command("run", path, "-p", "a", "-n", "2", "--memory", "600MB")
    assert done.returncode == 2
    assert "this model has no vocabulary" in done.stderr
    llama = opened(path)
    try:
        for call in (
            lambda: llama.tokenize(b"a"),
            lambda: llama.detokenize([1]),
            lambda: llama.create_completion("a"),
        ):
            with pytest.raises(RequestError, match="no vocabulary"):
                call()
        llama.eval([1, 2, 3])  # it still computes
        assert llama.n_tokens == 3
    finally:
        llama.close()


def command(*args: str | Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "moe_gguf", *map(str, args)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)


def test_metadata_that_is_no_utf8_does_not_hide_the_rest(
    tiny_file: TinyFile, tmp_path: Path
) -> None:
    raw = tiny_file("qwen3moe").read_bytes()
    name = b"tiny qwen3moe"
    assert raw.count(name) == 1
    path = tmp_path / "name.gguf"
    path.write_bytes(raw.replace(name, b"tiny\xff\x1b[3moe!!"[: len(name)]))
    llama = opened(path)
    try:
        assert "tokenizer.chat_template" in llama.metadata
        assert llama.metadata["general.name"].startswith("tiny\ufffd")
    finally:
        llama.close()


def test_a_name_of_70_kb_costs_nothing(changed: Callable[..., Path]) -> None:
    path = changed(put_text("general.name", "\x1b[31m\n" * 10_000))
    done = command("run", path, "-p", "a", "-n", "2", "--memory", "600MB")
    assert done.returncode == 0, done.stderr
    assert len(done.stderr) < 3000 and "\x1b" not in done.stderr
    shown = command("inspect", path).stdout
    assert len(shown) < 3000 and "\x1b" not in shown


@pytest.mark.parametrize("name", [b"od\xffd\x1b[3m.gguf", "über ß.gguf".encode(), b"a\nb.gguf"])
def test_a_file_name_of_any_bytes(name: bytes, tiny_file: TinyFile, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(name)
    os.link(tiny_file("qwen3moe"), path)
    llama = opened(path)
    expected = text(llama)
    assert "\x1b" not in llama.mode_line and "\n" not in llama.mode_line
    llama.close()
    model = opened(tiny_file("qwen3moe"))
    assert text(model) == expected
    model.close()


# --- ids and control tokens -----------------------------------------------------------------------


@pytest.mark.parametrize("token", [305, -1, -5, 99_999_999, 2**31, -(2**40)])
def test_an_id_outside_the_vocabulary(token: int, llama: moe_gguf.Llama) -> None:
    for call in (
        lambda: llama.detokenize([1, token]),
        lambda: llama.tokenizer().detokenize([token]) if token else None,
        lambda: llama.create_completion([1, token], max_tokens=2),
        lambda: llama.eval([token]),
        lambda: llama.create_completion("a", logit_bias={str(token): 1.0}),
        lambda: llama.create_completion("a", logit_bias={token: 1.0}, stream=True),
        lambda: llama.create_chat_completion(
            [{"role": "user", "content": "a"}], logit_bias={str(token): 1}
        ),
    ):
        with pytest.raises(RequestError, match=f"token {token} is not in this model's"):
            call()
    assert text(llama)


def test_a_bias_of_what_is_no_number(llama: moe_gguf.Llama) -> None:
    with pytest.raises(RequestError, match="logit_bias needs tokens by their numbers"):
        llama.create_completion("a", logit_bias={"the": 1.0})


def test_control_tokens_in_a_prompt_are_control_tokens(llama: moe_gguf.Llama) -> None:
    control = llama._model.token_get_text(llama.token_eos())
    prompt = f"{control}a{control}"
    tokens = llama._vocabulary.tokenize(prompt.encode(), add_bos=True, special=True)
    assert tokens.count(llama.token_eos()) == 2
    out = llama.create_completion(prompt, max_tokens=1)
    assert out["usage"]["prompt_tokens"] == len(tokens)


# --- templates ------------------------------------------------------------------------------------

BAD = "{% do messages.append(1) %}{{ messages|nosuchfilter }}"


@pytest.mark.parametrize("template", [BAD, "{% if %}", "{{ " + "(" * 5000, "{% endfor"])
def test_a_bad_template_does_not_keep_a_model_from_opening(
    template: str, changed: Callable[..., Path]
) -> None:
    llama = opened(changed(put_text("tokenizer.chat_template", template)))
    try:
        assert text(llama)
        with pytest.raises(UserError, match="chat template cannot be used"):
            llama.create_chat_completion([{"role": "user", "content": "a"}], max_tokens=1)
    finally:
        llama.close()
    llama = opened(llama.found.layout.path, chat_format="chatml")
    assert llama.create_chat_completion([{"role": "user", "content": "a"}], max_tokens=1)
    llama.close()


def test_one_bad_named_template_does_not_spoil_the_others(changed: Callable[..., Path]) -> None:
    llama = opened(changed(put_text("tokenizer.chat_template.rag", BAD)))
    try:
        assert llama.create_chat_completion([{"role": "user", "content": "a"}], max_tokens=1)
        assert "chat_template.rag" in "".join(llama._chat_handlers) or llama._chat_handlers
    finally:
        llama.close()


# --- processes ------------------------------------------------------------------------------------


def forked(work: Callable[[], object]) -> int:
    """How a forked child ends after ``work``: its exit status, or minus the signal."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        try:
            work()
        except SystemExit as error:
            os._exit(int(error.code or 0))
        except BaseException:
            os._exit(99)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_use_in_a_forked_child_raises_a_sentence(llama: moe_gguf.Llama) -> None:
    expected = text(llama)

    def use() -> None:
        with pytest.raises(UserError, match="before the process was forked"):
            llama.create_completion("Hello world", **GREEDY)
        with pytest.raises(UserError, match="before the process was forked"):
            llama.eval([1, 2])
        assert llama.tokenize(b"a")
        llama.close()

    assert forked(use) == 0
    llama.reset()
    assert text(llama) == expected


EXIT = """
import os, sys
import moe_gguf
llama = moe_gguf.Llama(sys.argv[1], memory="600MB", n_ctx=256, n_threads=2)
llama.create_completion("a", max_tokens=2)
if os.fork() == 0:
    if sys.argv[2] == "closes":
        llama.close()
    if sys.argv[2] == "drops":
        del llama
    sys.exit(0)
_, status = os.wait()
llama.create_completion("a", max_tokens=2)
print("child", os.waitstatus_to_exitcode(status))
"""


@pytest.mark.parametrize("how", ["exits", "closes", "drops"])
def test_a_forked_child_that_only_exits(how: str, tiny_file: TinyFile) -> None:
    """As a program: exit handlers run, and interpreters are torn down."""
    line = [sys.executable, "-c", EXIT, str(tiny_file("qwen3moe")), how]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "child 0\n"), done.stderr


# --- arguments ------------------------------------------------------------------------------------

# An argument of llama_cpp.Llama, and a value that is not its default.
GIVEN: dict[str, Any] = {
    "n_gpu_layers": -1,
    "split_mode": llama_cpp.LLAMA_SPLIT_MODE_NONE,
    "main_gpu": 0,
    "tensor_split": [1.0],
    "vocab_only": True,
    "use_mmap": True,
    "use_mlock": True,
    "kv_overrides": {"qwen3moe.context_length": 512},
    "seed": 3,
    "n_ctx": 512,
    "n_batch": 64,
    "n_ubatch": 32,
    "n_threads": 2,
    "n_threads_batch": 2,
    "rope_scaling_type": llama_cpp.LLAMA_ROPE_SCALING_TYPE_LINEAR,
    "pooling_type": llama_cpp.LLAMA_POOLING_TYPE_MEAN,
    "attention_type": llama_cpp.LLAMA_ATTENTION_TYPE_CAUSAL,
    "rope_freq_base": 20000.0,
    "rope_freq_scale": 0.5,
    "yarn_ext_factor": 0.5,
    "yarn_attn_factor": 1.1,
    "yarn_beta_fast": 16.0,
    "yarn_beta_slow": 2.0,
    "yarn_orig_ctx": 128,
    "logits_all": True,
    "embedding": False,
    "offload_kqv": False,
    "flash_attn": True,
    "op_offload": False,
    "swa_full": True,
    "no_perf": True,
    "last_n_tokens_size": 32,
    "lora_base": "nothing",
    "lora_scale": 0.5,
    "lora_path": "/no/such/adapter.gguf",
    "numa": False,
    "chat_format": "chatml",
    "chat_handler": lambda **_: {},
    "draft_model": None,
    "tokenizer": None,
    "type_k": llama_cpp.GGML_TYPE_Q8_0,
    "type_v": llama_cpp.GGML_TYPE_F16,
    "spm_infill": True,
    "verbose": False,
}
REFUSED = {"vocab_only": "vocab_only", "lora_path": "adapter.gguf"}


def test_every_argument_of_the_base_class_is_tried() -> None:
    names = set(inspect.signature(llama_cpp.Llama.__init__).parameters)
    assert names - {"self", "model_path", "kwargs"} == GIVEN.keys()


@pytest.mark.parametrize("name", GIVEN)
def test_every_argument_is_used_or_refused_by_name(name: str, tiny_file: TinyFile) -> None:
    if name in REFUSED:
        with pytest.raises(UserError, match=REFUSED[name]):
            opened(tiny_file("qwen3moe"), **{name: GIVEN[name]})
        return
    llama = opened(tiny_file("qwen3moe"), **{name: GIVEN[name]})
    try:
        assert text(llama)
    finally:
        llama.close()


@pytest.mark.parametrize(
    "again",
    [lambda llama: pickle.loads(pickle.dumps(llama)), copy.copy, copy.deepcopy],
    ids=["pickle", "copy", "deepcopy"],
)
def test_a_copy_is_opened_as_the_first_was(
    again: Callable[[moe_gguf.Llama], moe_gguf.Llama], tiny_file: TinyFile
) -> None:
    ours = {"policy": "lru", "reads": "buffered", "lanes": 3, "experts_used": 3}
    first = opened(tiny_file("qwen3moe"), **ours, use_mmap=True, seed=7, n_batch=64)
    other = again(first)
    try:
        assert other.found.options == first.found.options
        assert (other.n_batch, other.n_ctx(), other._seed) == (64, 256, 7)
        assert text(other) == text(first)
        assert "LOSSY" in other.mode_line
    finally:
        other.close()
        first.close()


def test_an_override_of_experts_used_is_what_experts_used_is(tiny_file: TinyFile) -> None:
    path = tiny_file("qwen3moe")
    one = opened(path, experts_used=8)
    two = opened(path, kv_overrides={"qwen3moe.expert_used_count": 8})
    try:
        assert text(one) == text(two)
        for llama in (one, two):
            assert "top-8" in llama.mode_line and "LOSSY: 8 experts" in llama.mode_line
        assert one.found.working_set == two.found.working_set == 24
        assert one.arena.budget.needs.compute == two.arena.budget.needs.compute
    finally:
        one.close()
        two.close()


def test_overrides_that_contradict_or_do_not_fit(tiny_file: TinyFile) -> None:
    path = tiny_file("qwen3moe")
    with pytest.raises(UserError, match="kv_overrides ask for different numbers"):
        opened(path, experts_used=3, kv_overrides={"qwen3moe.expert_used_count": 8})
    with pytest.raises(UserError, match="out of range"):
        opened(path, kv_overrides={"qwen3moe.expert_used_count": 17})
    llama = opened(path, kv_overrides={"mixtral.expert_used_count": 8, "x": "y"})
    assert "top-4" in llama.mode_line
    llama.close()


def write_lora(path: Path, *names: str) -> Path:
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    rng = np.random.default_rng(0)
    for name, n_in, n_out, n in ((*name.split(":"), 1)[:4] for name in names):
        shape = (int(n),) if int(n) > 1 else ()
        for part, rows, cols in (("a", 4, int(n_in)), ("b", int(n_out), 4)):
            values = rng.standard_normal((*shape, rows, cols)).astype(np.float32)
            writer.add_tensor(f"{name}.lora_{part}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_adapter_of_experts_is_refused_at_opening(tiny_file: TinyFile, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "l.gguf", "blk.1.ffn_up_exps.weight:256:96:16")
    with pytest.raises(UserError, match=r"changes routed experts \(blk.1.ffn_up_exps.weight"):
        opened(tiny_file("qwen3moe"), lora_path=str(lora))


def test_an_adapter_of_other_tensors_is_used(tiny_file: TinyFile, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / os.fsdecode(b"l\xff.gguf"), "output.weight:256:305")
    path = tiny_file("qwen3moe")
    plain, ours = opened(path), opened(path, lora_path=str(lora))
    try:
        assert text(ours) != text(plain)
    finally:
        plain.close()
        ours.close()


def test_an_adapter_that_is_no_gguf(tiny_file: TinyFile, tmp_path: Path) -> None:
    (tmp_path / "l.gguf").write_bytes(b"no")
    with pytest.raises(UserError, match=r"l\.gguf"):
        opened(tiny_file("qwen3moe"), lora_path=tmp_path / "l.gguf")
