"""A trial: a child meets a model before this process does. What a pass proves:

1. A real child loads, tokenizes and computes a good model; of a deadly one this process learns
   llama.cpp's last words in a sentence, and lives.
2. A verdict is remembered by what the child saw, not by the path, and forgotten with anything that
   could change it. Where nothing can be remembered, or no child can be started, models open.
3. A child has limits, and what ends it from outside is not held against the model.
4. Its weights take no memory, whatever their size.

Everything else that trials decide is in test_bad_input.py and test_zoo.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
import zoo
from conftest import TinyFile, ZooFile
from gguf import GGMLQuantizationType as Quant
from mutant import Field, Helper, Mutant

from moe_gguf.runtime import trial
from moe_gguf.runtime.errors import UserError
from moe_gguf.runtime.formats.ggml_types import pad_up
from moe_gguf.runtime.formats.gguf_header import TensorInfo, ValueType
from moe_gguf.runtime.formats.gguf_writer import encode_header
from moe_gguf.runtime.formats.layout import ModelLayout
from moe_gguf.runtime.formats.open import read_layout
from moe_gguf.runtime.formats.stream import stream_of

REAL_SEND = trial.send  # conftest.py replaces it for everybody else


@pytest.fixture
def good(tiny_file: TinyFile) -> ModelLayout:
    return read_layout(tiny_file("qwen3moe"))


@pytest.fixture
def deadly(tiny_file: TinyFile, tmp_path: Path) -> ModelLayout:
    """A norm in half precision, which a kernel asserts on when it is computed."""
    mutant = Mutant.read(tiny_file("qwen3moe"))
    weight = mutant.weights["blk.1.attn_norm.weight"]
    weight.ggml_type = int(Quant.Q8_0)
    return read_layout(mutant.write(tmp_path / "deadly.gguf"))


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Sizes of the streams that were sent to a child, with nothing remembered at first."""
    seen: list[int] = []
    send = trial.send

    def counting(header: bytes, stream_bytes: int) -> trial.Verdict:
        seen.append(stream_bytes)
        return send(header, stream_bytes)

    monkeypatch.setattr(trial, "send", counting)
    monkeypatch.setattr(trial, "folder", lambda: tmp_path / "verdicts")
    return seen


# --- 1. a real child ----------------------------------------------------------------------------


def test_a_real_child_survives_a_good_model(good: ModelLayout) -> None:
    assert REAL_SEND(*stream_of(good)) == trial.LIVED


def test_a_real_child_dies_and_this_process_says_why(
    deadly: ModelLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "send", REAL_SEND)
    with pytest.raises(UserError, match=r"deadly\.gguf: llama\.cpp does not survive it: \S+") as it:
        trial.check(deadly)
    assert "\n" not in str(it.value)
    assert "/" not in str(it.value).split("survive it: ")[1], "where llama.cpp was compiled"


def test_a_child_computes(good: ModelLayout, helper: Helper) -> None:
    helper.send(*stream_of(good))
    assert helper.has_computed


def test_an_objection_of_llama_cpp_is_left_to_it(tiny_file: TinyFile, tmp_path: Path) -> None:
    mutant = Mutant.read(tiny_file("qwen3moe"))
    del mutant.weights["blk.1.attn_q.weight"]
    layout = read_layout(mutant.write(tmp_path / "m.gguf"))
    assert REAL_SEND(*stream_of(layout)) == trial.LIVED


def test_an_assertion_behind_a_want_of_memory_is_found(
    zoo_file: ZooFile, tmp_path: Path, helper: Helper
) -> None:
    """Stock stops at a cache that is too big to be allocated; opening, which simulates it first,
    went on to an assertion."""
    mutant = Mutant.read(zoo_file("exaone-moe"))
    mutant.fields["exaone-moe.attention.value_length_swa"].value = 0xF10020
    path = mutant.write(tmp_path / "m.gguf")
    assert not helper.open(path).signal
    with pytest.raises(UserError, match="n_embd_head_v"):
        trial.check(read_layout(path))


def test_a_file_without_a_vocabulary_is_no_reason_to_die(
    tiny_file: TinyFile, tmp_path: Path, helper: Helper
) -> None:
    """llama.cpp asserts when such a model is asked to tokenize; it computes all the same."""
    mutant = Mutant.read(tiny_file("qwen3moe"))
    n_vocab = mutant.weights["token_embd.weight"].ne[1]
    mutant.fields = {k: v for k, v in mutant.fields.items() if not k.startswith("tokenizer.")}
    mutant.fields["tokenizer.ggml.model"] = Field(ValueType.STRING, "none")
    mutant.fields["qwen3moe.vocab_size"] = Field(ValueType.UINT32, n_vocab)
    layout = read_layout(mutant.write(tmp_path / "m.gguf"))
    assert helper.send(*stream_of(layout)) == trial.LIVED
    assert helper.has_computed


def test_a_child_reads_nothing_of_ours(good: ModelLayout, tmp_path: Path) -> None:
    """Its standard input is the header; a module in the folder we stand in is not imported."""
    (tmp_path / "numpy.py").write_text("raise SystemExit(9)")
    (tmp_path / "json.py").write_text("raise SystemExit(9)")
    code = (
        "import sys; from pathlib import Path; from moe_gguf.runtime import trial;"
        "from moe_gguf.runtime.formats.open import read_layout;"
        "from moe_gguf.runtime.formats.stream import stream_of;"
        "stream = stream_of(read_layout(Path(sys.argv[1])));"
        "import os; os.chdir(sys.argv[2]); sys.path.insert(0, '');"
        "print(trial.send(*stream))"
    )
    command = [sys.executable, "-c", code, str(good.path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, input="never read", check=True)
    assert done.stdout.strip() == str(trial.LIVED)


# --- 2. what is remembered ----------------------------------------------------------------------


def test_a_verdict_costs_nothing_the_second_time(
    good: ModelLayout, deadly: ModelLayout, sent: list[int], tmp_path: Path
) -> None:
    for _ in range(3):
        trial.check(good)
        with pytest.raises(UserError, match="does not survive it: "):
            trial.check(deadly)
    assert len(sent) == 2
    trial.check(read_layout(Path(shutil.copy(good.path, tmp_path / "elsewhere.gguf"))))
    assert len(sent) == 2, "the path counts"


def test_a_changed_number_is_another_model(
    good: ModelLayout, sent: list[int], tmp_path: Path
) -> None:
    trial.check(good)
    mutant = Mutant.read(good.path)
    mutant.fields["qwen3moe.context_length"].value = 511
    trial.check(read_layout(mutant.write(tmp_path / "m.gguf")))
    assert len(sent) == 2


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (llama_cpp, "__version__", "0.0.1"),
        (llama_cpp, "llama_print_system_info", lambda: b"another processor"),
        (trial, "PROTOCOL", 0),
    ],
)
def test_a_verdict_of_others_does_not_count(
    module: Any,
    name: str,
    value: object,
    good: ModelLayout,
    sent: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trial.check(good)
    monkeypatch.setattr(module, name, value)
    trial.check(good)
    assert len(sent) == 2


@pytest.mark.parametrize("text", ["", "{", "7", '["6", null]', "[0]", "null"])
def test_a_damaged_verdict_is_none(text: str, good: ModelLayout, sent: list[int]) -> None:
    trial.check(good)
    (file,) = trial.folder().iterdir()
    file.write_text(text)
    trial.check(good)
    assert len(sent) == 2
    assert json.loads(file.read_text()) == [0, ""]


def test_a_folder_that_cannot_be_written_costs_a_trial_each_time(
    good: ModelLayout, sent: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(trial, "folder", lambda: tmp_path / "file" / "verdicts")
    trial.check(good)
    trial.check(good)
    assert len(sent) == 2


def test_a_user_without_a_home_opens_models(
    good: ModelLayout, sent: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(trial, "folder", homeless)
    trial.check(good)
    assert len(sent) == 1


def test_verdicts_lie_where_the_command_line_is_told(good: ModelLayout, tmp_path: Path) -> None:
    """In MOE_GGUF_CACHE, beside all else that is made for the user."""
    command = [sys.executable, "-m", "moe_gguf", "plan", str(good.path)]
    env = os.environ | {"MOE_GGUF_CACHE": str(tmp_path)}
    subprocess.run(command, env=env, check=True, capture_output=True, cwd=sys.prefix)
    (file,) = (tmp_path / "trials").iterdir()
    assert json.loads(file.read_text()) == [0, ""]


# --- 3. limits ----------------------------------------------------------------------------------


def test_a_model_without_end_is_refused(
    tiny_file: TinyFile, tmp_path: Path, helper: Helper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotating no part of a head loops for ever."""
    mutant = Mutant.read(tiny_file("gemma4"))
    mutant.fields["gemma4.rope.dimension_count"] = Field(ValueType.UINT32, 0)
    layout = read_layout(mutant.write(tmp_path / "m.gguf"))
    monkeypatch.setattr(trial, "send", lambda *given: helper.send(*given, cpu_s=1))
    with pytest.raises(UserError, match="does not come to an end"):
        trial.check(layout)


def test_a_child_that_sleeps_for_ever_is_not_waited_for(
    good: ModelLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "WALL_S_PER_CPU_S", 0.01)
    verdict = REAL_SEND(stream_of(good).header, 0, cpu_s=1)
    assert verdict.signal == signal.SIGXCPU


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_that_others_end_says_nothing(
    number: int, good: ModelLayout, sent: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "send", lambda *_: trial.Verdict(number, ""))
    trial.check(good)
    assert not trial.folder().exists()


@pytest.mark.parametrize("executable", ["/nowhere/python", "/bin/false", ""])
def test_where_no_child_can_be_started_models_open(
    executable: str, good: ModelLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    assert REAL_SEND(*stream_of(good)) == trial.LIVED


# --- 4. weights of zeros ------------------------------------------------------------------------


def large(path: Path) -> tuple[bytes, int]:
    """The header and size of a qwen3moe whose experts are widened to 10 GB."""
    mutant, wide = Mutant.read(path), 1 << 20
    mutant.fields["qwen3moe.expert_feed_forward_length"].value = wide
    infos, offset = [], 0
    for name, weight in mutant.weights.items():
        if name.endswith("_exps.weight"):
            weight.ne = [
                wide if n == zoo.N_FF and i == ("down" not in name) else n
                for i, n in enumerate(weight.ne)
            ]
        infos.append(TensorInfo(name, tuple(weight.ne), weight.ggml_type, offset))
        offset += pad_up(infos[-1].n_bytes, mutant.alignment)
    keys = [(key.encode(), field.write()) for key, field in mutant.fields.items()]
    pairs = [struct.pack("<Q", len(key)) + key + value for key, value in keys]
    header = encode_header(pairs, infos, mutant.alignment)
    assert offset > 9 * 10**9
    return header, len(header) + offset


def test_a_token_of_a_large_model_is_cut_short(zoo_file: ZooFile, helper: Helper) -> None:
    """A token on zeros takes 0.1 s of CPU per GB of the weights it uses."""
    verdict = helper.send(*large(zoo_file("qwen3moe")))
    assert verdict == trial.LIVED
    assert helper.has_computed
    late = "failed to decode, ret = 2"
    assert late in helper.log.read_text()
    assert helper.send(*stream_of(read_layout(zoo_file("qwen3moe")))) == trial.LIVED
    assert helper.has_computed
    assert late not in helper.log.read_text(), "a small one is computed to the end"


def test_weights_of_a_trial_take_no_memory(zoo_file: ZooFile, tmp_path: Path) -> None:
    """A model of 10 GB, of which only a header exists, in a child of 150 MB."""
    header, n_bytes = large(zoo_file("qwen3moe"))
    (tmp_path / "header").write_bytes(header)
    code = (
        "import resource, sys; from pathlib import Path; from moe_gguf.runtime import trial;"
        "verdict = trial.send(Path(sys.argv[1]).read_bytes(), int(sys.argv[2]));"
        "print(verdict.signal, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "header"), str(n_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    number, peak_kib = map(int, done.stdout.split())
    assert number == 0
    assert peak_kib < 150 * 1024
