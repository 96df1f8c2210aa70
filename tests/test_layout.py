"""Where the bytes lie: against the gguf package, single against split, and inside a slot."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from mutant import Field, Mutant
from tiny import LAYOUTS, write_tiny

from moe_gguf.runtime.errors import UserError
from moe_gguf.runtime.formats.gguf_header import ValueType, read_header
from moe_gguf.runtime.formats.layout import ROLES, ModelLayout
from moe_gguf.runtime.formats.open import read_layout
from moe_gguf.runtime.formats.slots import PAGE, slot_layout
from moe_gguf.runtime.formats.stream import MAP_ALIGNMENT, stream_of

EXPERTS = {layout: 8 if layout == "mixtral" else 16 for layout in LAYOUTS}
USED = {"mixtral": 2, "llama4": 1}
MOE_LAYERS = {"deepseek2": [1, 2, 3], "llama4": [1, 3], "updown": [1, 3, 4]}


def joined(layout: ModelLayout) -> bytes:
    """The GGUF that the stream's header describes, filled from the model's files."""
    files = [path.read_bytes() for path in layout.files]
    align = max(layout.metadata.alignment, MAP_ALIGNMENT)
    stream = stream_of(layout)
    out = bytearray(stream.header)
    for tensor in layout.tensors:
        out += bytes(-len(out) % align)
        out += files[tensor.file][tensor.offset : tensor.offset + tensor.n_bytes]
    out += bytes(-len(out) % align)
    assert len(out) == stream.n_bytes
    return bytes(out)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("split", [False, True])
def test_experts_are_found_where_they_are(name: str, split: bool, tmp_path: Path) -> None:
    path = write_tiny(name, tmp_path / "m.gguf", mixed=True, split=split)
    layout = read_layout(path)
    assert layout.n_experts == EXPERTS[name]
    assert layout.n_experts_used == USED.get(name, 4)
    assert [layer.layer for layer in layout.layers] == MOE_LAYERS.get(name, [0, 1, 2])
    assert (layout.n_ctx_train, layout.n_vocab) == (512, 305)
    readers = [gguf.GGUFReader(file) for file in layout.files]
    theirs = {(i, t.name): t for i, reader in enumerate(readers) for t in reader.tensors}
    for layer in layout.layers:
        roles = [t.role for t in layer.tensors]
        assert roles == sorted(roles, key=ROLES.index)
        assert layer.blob_bytes == sum(t.expert_bytes for t in layer.tensors)
        (copy,) = layer.copies
        assert copy.types == tuple(t.ggml_type for t in layer.tensors)
        for tensor, piece in zip(layer.tensors, copy.pieces, strict=True):
            other = theirs[piece.file[0], tensor.name]
            assert piece.offset[0] == other.data_offset
            assert (np.diff(piece.offset) == tensor.expert_bytes).all()
            assert list(tensor.ne) == other.shape.tolist()
            assert tensor.expert_bytes * layout.n_experts == other.n_bytes
            assert tensor.ggml_type == int(other.tensor_type)
    assert layout.expert_bytes + layout.trunk_bytes == sum(t.n_bytes for t in theirs.values())
    assert layout.expert_bytes == sum(t.n_bytes for (_, n), t in theirs.items() if is_expert(n, t))


def is_expert(name: str, tensor: gguf.ReaderTensor) -> bool:
    return "_exps." in name and len(tensor.shape) == 3


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("align", [32, 4096])
@pytest.mark.parametrize("split", [False, True])
def test_stream_is_the_single_file(name: str, align: int, split: bool, tmp_path: Path) -> None:
    """Keys in the same bytes, but for the alignment's place; tensors in the same bytes."""
    single = write_tiny(name, tmp_path / "single.gguf", align=align)
    path = write_tiny(name, tmp_path / "set.gguf", align=align, split=True) if split else single
    layout = read_layout(path)
    assert len(layout.files) == (3 if split else 1)
    (tmp_path / "joined.gguf").write_bytes(joined(layout))
    ours, theirs = gguf.GGUFReader(tmp_path / "joined.gguf"), gguf.GGUFReader(single)
    keys = [key for key in theirs.fields if not key.startswith("GGUF.")]
    assert sorted(keys) == sorted(key for key in ours.fields if not key.startswith("GGUF."))
    for key in keys:
        parts = [part.tobytes() for part in ours.fields[key].parts]
        assert parts == [part.tobytes() for part in theirs.fields[key].parts], key
    for a, b in zip(ours.tensors, theirs.tensors, strict=True):
        assert (a.name, a.shape.tolist()) == (b.name, b.shape.tolist())
        assert a.tensor_type == b.tensor_type
        assert a.data.tobytes() == b.data.tobytes()


def test_stream_of_a_file_aligned_too_little_to_be_mapped(tmp_path: Path) -> None:
    layout = read_layout(write_tiny("gemma4", tmp_path / "m.gguf", align=8))
    (tmp_path / "joined.gguf").write_bytes(joined(layout))
    header = read_header(tmp_path / "joined.gguf")
    assert header.alignment == MAP_ALIGNMENT
    assert [(t.name, t.n_bytes) for t in header.tensors] == [
        (t.name, t.n_bytes) for t in layout.tensors
    ]


def test_last_tensor_without_padding_is_whole(tmp_path: Path) -> None:
    path = write_tiny("gemma4", tmp_path / "m.gguf")  # it ends in a tensor of one item
    last = read_layout(path).tensors[-1]
    path.write_bytes(path.read_bytes()[: last.offset + last.n_bytes])
    assert read_layout(path).tensors[-1] == last


# --- split sets ---------------------------------------------------------------------------------


@pytest.fixture
def split_set(tmp_path: Path) -> list[Path]:
    write_tiny("qwen3moe", tmp_path / "m.gguf", split=True)
    return [tmp_path / f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_layout(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_split_set_without_a_file(split_set: list[Path]) -> None:
    split_set[1].unlink()
    assert f"{split_set[1]} is missing" in refusal(split_set[0])


def test_split_set_opened_in_the_middle(split_set: list[Path]) -> None:
    assert f"open {split_set[0]}" in refusal(split_set[2])


def test_split_file_renamed(split_set: list[Path]) -> None:
    other = split_set[0].rename(split_set[0].with_name("model.gguf"))
    assert "give it its name back" in refusal(other)


def test_split_file_in_the_place_of_another(split_set: list[Path]) -> None:
    split_set[2].write_bytes(split_set[1].read_bytes())
    assert "is not file 3" in refusal(split_set[0])


def test_split_set_with_a_truncated_file(split_set: list[Path]) -> None:
    split_set[2].write_bytes(split_set[2].read_bytes()[:-5000])
    said = refusal(split_set[0])
    assert str(split_set[2]) in said
    assert "bytes are missing" in said


def test_split_set_with_a_tensor_twice(split_set: list[Path]) -> None:
    second, third = Mutant.read(split_set[1]), Mutant.read(split_set[2])
    name = next(iter(second.weights))
    third.weights[name] = second.weights[name]
    third.write(split_set[2])
    assert f"both hold tensor {name}" in refusal(split_set[0])


def test_split_set_with_too_few_tensors(split_set: list[Path]) -> None:
    third = Mutant.read(split_set[2])
    third.weights.popitem()
    third.write(split_set[2])
    assert "split set holds" in refusal(split_set[0])


@pytest.mark.parametrize("value", [1 << 40, "three"])
def test_split_count_that_is_no_count(value: int | str, split_set: list[Path]) -> None:
    first = Mutant.read(split_set[0])
    kind = ValueType.STRING if isinstance(value, str) else ValueType.UINT64
    first.fields["split.count"] = Field(kind, value)
    first.write(split_set[0])
    assert "split.count" in refusal(split_set[0])


def test_name_like_a_split_file_but_whole(tmp_path: Path) -> None:
    path = write_tiny("qwen3moe", tmp_path / "m-00002-of-00005.gguf")
    assert len(read_layout(path).files) == 1


# --- metadata -----------------------------------------------------------------------------------


def test_what_a_model_says_of_itself(tmp_path: Path) -> None:
    layout = read_layout(write_tiny("updown", tmp_path / "m.gguf"))
    assert layout.architecture == "nemotron_h_moe"
    assert layout.name == "tiny nemotron_h_moe"
    assert layout.keys.integer("nemotron_h_moe.context_length") == layout.n_ctx_train == 512
    assert layout.keys.integer(".context_length") == 512  # the architecture's own
    assert layout.n_experts_used == 4  # the greatest, of a list with zeros
    assert layout.keys.text("tokenizer.ggml.model") == "gpt2"


# --- slots --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("align", [1, 32, 512, 4096, 8192])
def test_slot_regions_keep_their_distance(name: str, align: int, tmp_path: Path) -> None:
    layout = read_layout(write_tiny(name, tmp_path / "m.gguf", mixed=True))
    slots = slot_layout(layout, align)
    assert slots.slot_bytes % max(PAGE, align) == 0
    for layer in layout.layers:
        end = 0
        for i, piece in enumerate(layer.copies[0].pieces):
            at = slots.offsets[layer.layer, 0][i]
            assert at == slots.matrix(layer, 0, i)
            assert at % align == piece.offset[0] % align
            assert at - end >= align
            end = at + piece.n_bytes
        assert end + align <= slots.slot_bytes
    widest = max(layer.blob_bytes + 2 * align * len(layer.tensors) for layer in layout.layers)
    assert slots.slot_bytes < widest + align + max(PAGE, align)


def test_direct_read_lands_in_place_and_harms_no_neighbour(tmp_path: Path) -> None:
    """Reads a whole layer of one expert the way direct reads do, in any order."""
    align = 64
    layout = read_layout(write_tiny("mixtral", tmp_path / "m.gguf", align=32))
    slots = slot_layout(layout, align)
    raw = layout.path.read_bytes()
    layer = layout.layers[0]
    pieces = list(zip(layer.copies[0].pieces, slots.offsets[layer.layer, 0], strict=True))
    for order in (pieces, pieces[::-1]):
        slot = bytearray(slots.slot_bytes)
        for piece, place in order:
            offset = int(piece.offset[0])
            start = offset // align * align
            end = -(-(offset + piece.n_bytes) // align) * align
            at = place - (offset - start)
            assert at % align == 0
            slot[at : at + end - start] = raw[start:end]
        assert len(slot) == slots.slot_bytes
        for piece, place in pieces:
            blob = raw[piece.offset[0] :][: piece.n_bytes]
            assert slot[place : place + piece.n_bytes] == blob
