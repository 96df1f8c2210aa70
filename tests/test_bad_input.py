"""Bad files cannot crash the process: one sentence each, before llama.cpp sees them.

1. Files that are no usable model are refused in a sentence.
2. Each fault in DEADLY kills stock llama.cpp, and is refused after a trial. What stock survives is
   left to it: it is refused nowhere, or in llama.cpp's words.
3. Whatever fuzzing makes of a valid file, what is accepted does not kill stock llama.cpp;
   ``make mutants`` tries 10 000, and opens them with moe_gguf.Llama too.
4. Every layout of tests/tiny.py is accepted, so that refusing everything is no way to pass; that
   the zoo is, test_zoo.py shows.
"""

from __future__ import annotations

import copy
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import zoo
from conftest import ZooFile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutant import Field, Helper, Mutant, Weight, llama_keys, mutate
from tiny import LAYOUTS, write_tiny

from moe_gguf.runtime import trial
from moe_gguf.runtime.errors import UserError
from moe_gguf.runtime.formats.ggml_types import GGML_TYPES
from moe_gguf.runtime.formats.gguf_header import Scalar, ValueType
from moe_gguf.runtime.formats.open import read_layout

Edit = Callable[[Mutant], None]
TYPE = {t.name: number for number, t in GGML_TYPES.items()}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Mutant]:
    folder = tmp_path_factory.mktemp("tiny")
    return {name: Mutant.read(write_tiny(name, folder / f"{name}.gguf")) for name in LAYOUTS}


def fresh(original: Mutant) -> Mutant:
    """A copy whose fields and shapes may be changed; the data is shared."""
    weights = {n: Weight(list(w.ne), w.ggml_type, w.data) for n, w in original.weights.items()}
    return Mutant(copy.deepcopy(original.fields), weights, original.alignment)


def look(path: Path) -> None:
    """What happens to a file before llama.cpp sees it."""
    trial.check(read_layout(path))


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        look(path)
    assert is_sentence(str(caught.value))
    return str(caught.value)


def accepted(path: Path) -> bool:
    try:
        look(path)
    except UserError as error:
        return not is_sentence(str(error))
    return True


def is_sentence(text: str) -> bool:
    assert text
    assert "\n" not in text
    return True


# --- edits --------------------------------------------------------------------------------------


def put(key: str, value: Scalar | list[Scalar], kind: ValueType = ValueType.UINT32) -> Edit:
    """Set a key; one that starts with a dot is the architecture's."""

    def edit(mutant: Mutant) -> None:
        mutant.fields[full(mutant, key)] = Field(kind, value)

    return edit


def drop(key: str) -> Edit:
    def edit(mutant: Mutant) -> None:
        del mutant.fields[full(mutant, key)]

    return edit


def full(mutant: Mutant, key: str) -> str:
    return f"{mutant.fields['general.architecture'].value}{key}" if key.startswith(".") else key


def lose(name: str) -> Edit:
    def edit(mutant: Mutant) -> None:
        del mutant.weights[name]

    return edit


def retype(name: str, kind: str) -> Edit:
    def edit(mutant: Mutant) -> None:
        mutant.weights[name].ggml_type = TYPE[kind]

    return edit


def reshape(shapes: dict[str, list[int]]) -> Edit:
    def edit(mutant: Mutant) -> None:
        for name, ne in shapes.items():
            mutant.weights[name].ne = ne

    return edit


def become(architecture: str) -> Edit:
    def edit(mutant: Mutant) -> None:
        old = f"{mutant.fields['general.architecture'].value}."
        fields = mutant.fields.items()
        mutant.fields = {
            architecture + "." + k.removeprefix(old) if k.startswith(old) else k: v
            for k, v in fields
        }
        mutant.fields["general.architecture"] = Field(ValueType.STRING, architecture)

    return edit


def repeat_token(mutant: Mutant) -> None:
    tokens = mutant.fields["tokenizer.ggml.tokens"].value
    assert isinstance(tokens, list)
    tokens[9] = tokens[8]


def hide_token(mutant: Mutant) -> None:
    tokens = mutant.fields["tokenizer.ggml.tokens"].value
    assert isinstance(tokens, list)
    tokens[9] = f"{tokens[8]}\0and more"


def all_of(*edits: Edit) -> Edit:
    def edit(mutant: Mutant) -> None:
        for each in edits:
            each(mutant)

    return edit


# --- 1. no usable model -------------------------------------------------------------------------


def test_dense_model(originals: dict[str, Mutant], tmp_path: Path) -> None:
    mutant = fresh(originals["qwen3moe"])
    mutant.weights = {n: w for n, w in mutant.weights.items() if "_exps" not in n}
    del mutant.fields["qwen3moe.expert_count"]
    said = refusal(mutant.write(tmp_path / "m.gguf"))
    assert said.endswith("is a dense model: nothing to offload, use llama.cpp")


def test_experts_that_are_not_as_many_as_claimed(
    originals: dict[str, Mutant], tmp_path: Path
) -> None:
    mutant = fresh(originals["qwen3moe"])
    put(".expert_count", 15)(mutant)
    assert "does not have qwen3moe.expert_count experts" in refusal(mutant.write(tmp_path / "m"))


def test_each_expert_in_a_tensor_of_its_own(originals: dict[str, Mutant], tmp_path: Path) -> None:
    mutant = fresh(originals["mixtral"])
    mutant.weights = {
        n.replace("_exps.weight", ".0.weight"): Weight(w.ne[:2], w.ggml_type, w.data)
        for n, w in mutant.weights.items()
    }
    assert "a form llama.cpp dropped" in refusal(mutant.write(tmp_path / "m.gguf"))


def test_vocabulary_only(originals: dict[str, Mutant], tmp_path: Path) -> None:
    mutant = fresh(originals["qwen3moe"])
    mutant.weights = {}
    assert "holds no tensors" in refusal(mutant.write(tmp_path / "m.gguf"))


def test_no_architecture(originals: dict[str, Mutant], tmp_path: Path) -> None:
    mutant = fresh(originals["qwen3moe"])
    del mutant.fields["general.architecture"]
    assert "general.architecture" in refusal(mutant.write(tmp_path / "m.gguf"))


@pytest.mark.parametrize(
    ("layout", "edit", "said"),
    [
        ("qwen3moe", put(".block_count", 0), "block_count is 0"),
        ("qwen3moe", put(".block_count", 513), "block_count is 513"),
        ("qwen3moe", put(".block_count", "three", ValueType.STRING), "block_count is 'three'"),
        ("qwen3moe", put(".block_count", 2), "experts of layer 2 but claims 2 layers"),
        ("qwen3moe", put(".expert_used_count", 0), "expert_used_count is 0"),
        ("llama4", put(".expert_used_count", 17), "expert_used_count is 17 instead"),
        ("updown", drop(".expert_used_count"), "expert_used_count is missing"),
        ("qwen3moe", retype("blk.0.ffn_up_exps.weight", "F64"), "ffn_up_exps.weight is F64"),
        ("qwen3moe", retype("blk.0.ffn_up_exps.weight", "Q8_K"), "ffn_up_exps.weight is Q8_K"),
    ],
)
def test_counts_and_types_that_memory_depends_on(
    layout: str, edit: Edit, said: str, originals: dict[str, Mutant], tmp_path: Path
) -> None:
    mutant = fresh(originals[layout])
    edit(mutant)
    with pytest.raises(UserError, match=said):
        read_layout(mutant.write(tmp_path / "m.gguf"))


@pytest.mark.parametrize("expert", [-1, zoo.N_EXPERTS, 1 << 30])
def test_a_table_that_names_an_expert_there_is_not(
    expert: int, zoo_file: ZooFile, helper: Helper, tmp_path: Path
) -> None:
    """A trial cannot see this: it is in the weights, of which a trial has none."""
    mutant = Mutant.read(zoo_file("deepseek4"))
    table = mutant.weights[zoo.EXPERT_TABLE]
    row = 4 * zoo.N_USED  # token 1's
    table.data = table.data[:row] + struct.pack("<i", expert) + table.data[row + 4 :]
    path = mutant.write(tmp_path / "m.gguf")
    assert "names experts that do not exist" in refusal(path)
    assert helper.open(path).signal


# --- 2. faults that kill llama.cpp --------------------------------------------------------------

# name: (layout, what is wrong). Each was found by fuzzing or by reading llama.cpp's source.
DEADLY: dict[str, tuple[str, Edit]] = {
    "more draft layers than layers": ("qwen3moe", put(".nextn_predict_layers", 4)),
    "as many groups as experts": ("deepseek2", put(".expert_group_count", 16)),
    "groups that do not divide the experts": ("deepseek2", put(".expert_group_count", 3)),
    "uses no groups": ("deepseek2", put(".expert_group_used_count", 0)),
    "uses all groups": ("deepseek2", put(".expert_group_used_count", 4)),
    "unknown gating": ("deepseek2", put(".expert_gating_func", 5)),
    "no gating": ("mixtral", become("smallthinker")),
    "unknown rope scaling": ("qwen3moe", put(".rope.scaling.type", "none such", ValueType.STRING)),
    "rotates part of a head": ("qwen3moe", put(".rope.dimension_count", 32)),
    "rotates more than a head": ("gemma4", put(".rope.dimension_count", 66)),
    "rotates an odd part": ("gemma4", put(".rope.dimension_count", 31)),
    "key length that is not the tensors'": ("gpt-oss", put(".attention.key_length", 16)),
    "keys and values of other sizes": (
        "mixtral",
        all_of(
            put(".attention.value_length", 32),
            reshape({f"blk.{i}.attn_v.weight": [256, 64] for i in range(3)}),
        ),
    ),
    "cached row of another size": ("deepseek2", put(".attention.key_length", 64)),
    "no cached row size": ("deepseek2", drop(".attention.key_length")),
    "rotated part is the whole latent head": ("deepseek2", put(".attention.key_length_mla", 32)),
    "latent attention with many key heads": ("deepseek2", drop(".attention.head_count_kv")),
    "no attention heads": ("gpt-oss", all_of(become("phimoe"), drop(".attention.head_count"))),
    "absurd sliding window": ("gpt-oss", put(".attention.sliding_window", (1 << 31) - 1)),
    "no sliding layer": (
        "gemma4",
        put(".attention.sliding_window_pattern", [False] * 3, ValueType.BOOL),
    ),
    "sliding layers one in one": ("gpt-oss", put(".attention.sliding_window_pattern", 1)),
    "chunked layers one in one": ("llama4", put(".attention.sliding_window_pattern", 1)),
    "all layers share keys and values": ("gemma4", put(".attention.shared_kv_layers", 2)),
    "convolution without its bias": ("updown", lose("blk.0.ssm_conv1d.bias")),
    "state of another size": ("updown", become("granitehybrid")),
    "token twice": ("qwen3moe", repeat_token),
    "token twice as C sees it": ("qwen3moe", hide_token),
    "sentencepiece without bytes": (
        "mixtral",
        put("tokenizer.ggml.model", "llama", ValueType.STRING),
    ),
    "quantised norm": ("gemma4", retype("output_norm.weight", "Q4_0")),
    "half-precision norm": ("qwen3moe", retype("blk.1.attn_norm.weight", "F16")),
    "quantised expert bias": ("gpt-oss", retype("blk.0.ffn_up_exps.bias", "Q8_0")),
    "double weight": ("qwen3moe", retype("blk.0.attn_q.weight", "F64")),
    "integer weight": ("qwen3moe", retype("blk.0.ffn_gate_inp.weight", "I32")),
    "intermediate type as weight": ("qwen3moe", retype("output.weight", "Q8_K")),
    "epsilon below zero": (
        "mixtral",
        put(".attention.layer_norm_rms_epsilon", -1.0, ValueType.FLOAT32),
    ),
}

# What looks wrong and kills nobody: accepted here, to run or to be refused in llama.cpp's words.
HARMLESS: dict[str, tuple[str, Edit]] = {
    "another width of the embedding": ("qwen3moe", put(".embedding_length", 128)),
    "heads of two of three layers": ("qwen3moe", put(".attention.head_count", [4, 4])),
    "heads that share unevenly": ("qwen3moe", put(".attention.head_count_kv", 3)),
    "no context length to speak of": ("qwen3moe", put(".context_length", 0)),
    "not a number": ("mixtral", put(".rope.freq_base", float("nan"), ValueType.FLOAT32)),
    "no state groups": ("updown", put(".ssm.group_count", 0)),
    "no state heads": ("updown", put(".ssm.time_step_rank", 0)),
    "state heads that do not divide": ("updown", put(".ssm.time_step_rank", 3)),
    "no embedding": ("qwen3moe", lose("token_embd.weight")),
    "keys of another architecture": ("qwen3moe", become("ernie4_5-moe")),
    "keys as llama.cpp saves them": ("qwen3moe", put(".ssm.inner_size", 0)),
}


@pytest.mark.parametrize("name", DEADLY)
def test_deadly_fault_is_refused(
    name: str, originals: dict[str, Mutant], helper: Helper, tmp_path: Path
) -> None:
    layout, edit = DEADLY[name]
    mutant = fresh(originals[layout])
    edit(mutant)
    path = mutant.write(tmp_path / "m.gguf")
    assert "llama.cpp does not survive it: " in refusal(path)
    assert helper.open(path).signal, "llama.cpp survives this: the test is not what it was"


@pytest.mark.parametrize("name", HARMLESS)
def test_what_llama_cpp_survives_is_left_to_it(
    name: str, originals: dict[str, Mutant], helper: Helper, tmp_path: Path
) -> None:
    layout, edit = HARMLESS[name]
    mutant = fresh(originals[layout])
    edit(mutant)
    path = mutant.write(tmp_path / "m.gguf")
    assert accepted(path)
    assert not helper.open(path).signal
    assert not helper.open_ours(path).signal


# --- 3. fuzzing ---------------------------------------------------------------------------------


FEW = 150
N_MUTANTS = int(os.environ.get("MUTANTS", FEW))


@pytest.fixture(scope="module")
def fuzzed(originals: dict[str, Mutant], zoo_file: ZooFile) -> dict[str, Mutant]:
    zoo_files = {f"zoo {name}": Mutant.read(zoo_file(name)) for name in zoo.MADE}
    return originals | zoo_files


@settings(
    max_examples=N_MUTANTS,
    deadline=None,
    derandomize=N_MUTANTS <= FEW,  # a long run looks elsewhere each time
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_what_is_accepted_does_not_kill(
    data: st.DataObject, fuzzed: dict[str, Mutant], helper: Helper, tmp_path: Path
) -> None:
    mutant = fresh(fuzzed[data.draw(st.sampled_from(list(fuzzed)))])
    keys = llama_keys()

    def choose(n: int) -> int:
        return data.draw(st.integers(0, n - 1))

    changes = [mutate(mutant, choose, keys) for _ in range(data.draw(st.integers(1, 2)))]
    path = mutant.write(tmp_path / "m.gguf")
    flips = data.draw(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=2))
    head = len(mutant.head())
    with path.open("r+b") as file:
        for where, byte in flips:
            file.seek(int(where * (head - 1)))
            file.write(bytes((byte,)))
    if not accepted(path):
        return
    for open_it in (helper.open, helper.open_ours) if N_MUTANTS > FEW else (helper.open,):
        death = open_it(path)
        assert not death.signal, f"{changes} {flips}: signal {death.signal}, {death.said}"


# --- 4. good files ------------------------------------------------------------------------------


def test_draft_layers_may_be_left_out(originals: dict[str, Mutant], tmp_path: Path) -> None:
    mutant = fresh(originals["qwen3moe"])
    put(".block_count", 4)(mutant)
    put(".nextn_predict_layers", 1)(mutant)
    assert read_layout(mutant.write(tmp_path / "m.gguf")).n_layers == 4


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("split", [False, True])
def test_good_files_are_accepted_and_live(
    name: str, split: bool, helper: Helper, tmp_path: Path
) -> None:
    path = write_tiny(name, tmp_path / "m.gguf", mixed=True, split=split)
    assert accepted(path)
    assert read_layout(path).layers
    death = helper.open(path)
    assert not death.signal, death.said


def test_fuzzing_knows_the_keys() -> None:
    assert {".expert_count", "tokenizer.ggml.tokens"} < set(llama_keys())
    assert len(llama_keys()) > 150
