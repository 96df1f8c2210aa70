"""Bad files cannot crash the process: one sentence each, before llama.cpp sees them.

1. Files that are no usable model are refused in a sentence.
2. Each fault in DEADLY kills stock llama.cpp, and is refused here: the rule works, and the pinned
   release still needs it.
3. Whatever fuzzing makes of a valid file, what is accepted does not kill stock llama.cpp.
4. Every layout of tests/tiny.py is accepted, so that refusing everything is no way to pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutant import Autopsy, Field, Mutant, Weight, llama_keys, mutate
from tiny import LAYOUTS, write_tiny

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


@pytest.fixture(scope="module")
def autopsy() -> Iterator[Autopsy]:
    with Autopsy() as helper:
        yield helper


def fresh(original: Mutant) -> Mutant:
    """A copy whose fields and shapes may be changed; the data is shared."""
    weights = {n: Weight(list(w.ne), w.ggml_type, w.data) for n, w in original.weights.items()}
    return Mutant(copy.deepcopy(original.fields), weights, original.alignment)


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_layout(path)
    assert is_sentence(str(caught.value))
    return str(caught.value)


def accepted(path: Path) -> bool:
    try:
        read_layout(path)
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


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.1."])
def test_missing_tensors(name: str, originals: dict[str, Mutant], tmp_path: Path) -> None:
    mutant = fresh(originals["qwen3moe"])
    mutant.weights = {n: w for n, w in mutant.weights.items() if not n.startswith(name)}
    said = refusal(mutant.write(tmp_path / "m.gguf"))
    assert "token_embd.weight is missing" in said or "layer 1 of 3 has no tensors" in said


@pytest.mark.parametrize(
    ("layout", "edit", "said"),
    [
        ("qwen3moe", put(".block_count", 2), "tensors of layer 2 but claims 2"),
        ("qwen3moe", put(".block_count", "three", ValueType.STRING), "block_count is 'three'"),
        ("qwen3moe", put(".embedding_length", 128), "token_embd.weight has shape"),
        ("qwen3moe", put(".attention.head_count", [4, 4]), "has 2 items instead of 3"),
        ("qwen3moe", put(".attention.head_count_kv", 3), "do not share 3 key-value heads"),
        ("qwen3moe", put(".context_length", 0), "context_length is 0"),
        ("mixtral", put(".rope.freq_base", float("nan"), ValueType.FLOAT32), "not a number"),
        (
            "mixtral",
            put(".attention.layer_norm_rms_epsilon", -1.0, ValueType.FLOAT32),
            "epsilon is -1.0",
        ),
        ("updown", put(".ssm.group_count", 0), "group_count is 0"),
        ("updown", put(".ssm.time_step_rank", 0), "time_step_rank is 0"),
        ("updown", put(".ssm.time_step_rank", 3), "do not divide"),
        ("qwen3moe", become("ernie4_5-moe"), "interleave_moe_layer_step is missing"),
        ("qwen3moe", become("grovemoe"), "experts_per_group is missing"),
    ],
)
def test_numbers_that_make_no_sense(
    layout: str, edit: Edit, said: str, originals: dict[str, Mutant], tmp_path: Path
) -> None:
    mutant = fresh(originals[layout])
    edit(mutant)
    assert said in refusal(mutant.write(tmp_path / "m.gguf"))


# --- 2. faults that kill llama.cpp --------------------------------------------------------------

# name: (layout, what is wrong, what we say). Each was found by fuzzing or by reading its source.
DEADLY: dict[str, tuple[str, Edit, str]] = {
    "no layers": ("qwen3moe", put(".block_count", 0), "block_count is 0"),
    "too many layers": ("qwen3moe", put(".block_count", 513), "block_count is 513"),
    "more draft layers than layers": (
        "qwen3moe",
        put(".nextn_predict_layers", 4),
        "nextn_predict_layers is 4",
    ),
    "uses no experts": ("qwen3moe", put(".expert_used_count", 0), "not given or zero"),
    "does not say how many experts it uses": (
        "updown",
        drop(".expert_used_count"),
        "not given or zero",
    ),
    "uses more experts than it has": (
        "llama4",
        put(".expert_used_count", 17),
        "expert_used_count is 17",
    ),
    "as many groups as experts": ("deepseek2", put(".expert_group_count", 16), "group_count is 16"),
    "groups that do not divide the experts": (
        "deepseek2",
        put(".expert_group_count", 3),
        "do not divide",
    ),
    "uses no groups": ("deepseek2", put(".expert_group_used_count", 0), "group_used_count is 0"),
    "uses all groups": ("deepseek2", put(".expert_group_used_count", 4), "group_used_count is 4"),
    "unknown gating": ("deepseek2", put(".expert_gating_func", 5), "gating_func is 5"),
    "no gating": ("mixtral", become("smallthinker"), "gating_func is missing"),
    "unknown rope scaling": (
        "qwen3moe",
        put(".rope.scaling.type", "none such", ValueType.STRING),
        "scaling.type is 'none such'",
    ),
    "rotates part of a head": ("qwen3moe", put(".rope.dimension_count", 32), "needs all"),
    "rotates more than a head": ("gemma4", put(".rope.dimension_count", 66), "not an even part"),
    "rotates an odd part": ("gemma4", put(".rope.dimension_count", 31), "not an even part"),
    "key length that is not the tensors'": (
        "gpt-oss",
        put(".attention.key_length", 16),
        "does not allow",
    ),
    "keys and values of other sizes": (
        "mixtral",
        all_of(
            put(".attention.value_length", 32),
            reshape({f"blk.{i}.attn_v.weight": [256, 64] for i in range(3)}),
        ),
        "does not allow",
    ),
    "cached row of another size": ("deepseek2", put(".attention.key_length", 64), "cached row"),
    "no cached row size": ("deepseek2", drop(".attention.key_length"), "cached row"),
    "rotated part is the whole latent head": (
        "deepseek2",
        put(".attention.key_length_mla", 32),
        "key_length_mla is 32",
    ),
    "latent attention with many key heads": (
        "deepseek2",
        drop(".attention.head_count_kv"),
        "head_count_kv is not 1",
    ),
    "no attention heads": (
        "gpt-oss",
        all_of(become("phimoe"), drop(".attention.head_count")),
        "head_count is not given",
    ),
    "absurd sliding window": (
        "gpt-oss",
        put(".attention.sliding_window", (1 << 31) - 1),
        "sliding_window",
    ),
    "no sliding layer": (
        "gemma4",
        put(".attention.sliding_window_pattern", [False] * 3, ValueType.BOOL),
        "no layer has a sliding window",
    ),
    "sliding layers one in one": (
        "gpt-oss",
        put(".attention.sliding_window_pattern", 1),
        "no layer has a sliding window",
    ),
    "chunked layers one in one": (
        "llama4",
        put(".attention.sliding_window_pattern", 1),
        "no layer has a sliding window",
    ),
    "all layers share keys and values": (
        "gemma4",
        put(".attention.shared_kv_layers", 2),
        "shared_kv_layers is 2",
    ),
    "convolution without its bias": (
        "updown",
        lose("blk.0.ssm_conv1d.bias"),
        "blk.0.ssm_conv1d.bias is missing",
    ),
    "state of another size": ("updown", become("granitehybrid"), "twice the embedding"),
    "token twice": ("qwen3moe", repeat_token, "holds a token twice"),
    "token twice as C sees it": ("qwen3moe", hide_token, "holds a token twice"),
    "sentencepiece without bytes": (
        "mixtral",
        put("tokenizer.ggml.model", "llama", ValueType.STRING),
        "no token for byte",
    ),
    "quantised norm": ("gemma4", retype("output_norm.weight", "Q4_0"), "must be F32"),
    "half-precision norm": ("qwen3moe", retype("blk.1.attn_norm.weight", "F16"), "must be F32"),
    "quantised expert bias": ("gpt-oss", retype("blk.0.ffn_up_exps.bias", "Q8_0"), "must be F32"),
    "double weight": ("qwen3moe", retype("blk.0.attn_q.weight", "F64"), "is F64"),
    "double expert": ("qwen3moe", retype("blk.0.ffn_up_exps.weight", "F64"), "is F64"),
    "integer weight": ("qwen3moe", retype("blk.0.ffn_gate_inp.weight", "I32"), "is I32"),
    "intermediate type as weight": ("qwen3moe", retype("output.weight", "Q8_K"), "is Q8_K"),
}

# These do not die, but run without end.
ENDLESS: dict[str, tuple[str, Edit, str]] = {
    "rotates nothing": ("gemma4", put(".rope.dimension_count", 0), "not an even part"),
}


@pytest.mark.parametrize("name", DEADLY)
def test_deadly_fault_is_refused(
    name: str, originals: dict[str, Mutant], autopsy: Autopsy, tmp_path: Path
) -> None:
    layout, edit, said = DEADLY[name]
    mutant = fresh(originals[layout])
    edit(mutant)
    path = mutant.write(tmp_path / "m.gguf")
    assert said in refusal(path)
    assert autopsy.open(path).signal, "llama.cpp survives this: is the rule still needed?"


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_fault_is_refused(name: str, originals: dict[str, Mutant], tmp_path: Path) -> None:
    layout, edit, said = ENDLESS[name]
    mutant = fresh(originals[layout])
    edit(mutant)
    assert said in refusal(mutant.write(tmp_path / "m.gguf"))


# --- 3. fuzzing ---------------------------------------------------------------------------------


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_what_is_accepted_does_not_kill(
    data: st.DataObject, originals: dict[str, Mutant], autopsy: Autopsy, tmp_path: Path
) -> None:
    mutant = fresh(originals[data.draw(st.sampled_from(LAYOUTS))])
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
    death = autopsy.open(path)
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
    name: str, split: bool, autopsy: Autopsy, tmp_path: Path
) -> None:
    path = write_tiny(name, tmp_path / "m.gguf", mixed=True, split=split)
    assert read_layout(path).layers
    death = autopsy.open(path)
    assert not death.signal, death.said


def test_fuzzing_knows_the_keys() -> None:
    assert {".expert_count", "tokenizer.ggml.tokens"} < set(llama_keys())
    assert len(llama_keys()) > 150
