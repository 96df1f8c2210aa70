"""Bundles as they run. Gates, and what a pass proves:

1. *Plain.* The logits of a bundle are stock's on the GGUF it came from, with all experts resident,
   with few slots and with slots used in turns; one read brings one expert.
2. *Repacked.* The logits of a bundle in this machine's kernel layout are those of stock llama.cpp
   with weight repacking on, and so are repacked trunk tensors, a tied output matrix included.
3. *Foreign.* A kernel layout that this machine does not have is undone after each read: the logits
   are stock's without repacking.
4. *Repacked as it is read.* The logits of a GGUF whose weights are so are those of a repacked
   bundle; left to itself a model is held so where nearly all of its experts stay in memory.
5. *Damage.* A bundle that cannot be right is refused in one sentence before llama.cpp sees it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from conftest import MakeBundle, TinyFile
from gguf import GGMLQuantizationType as Quant
from harness import Context, Logits, Model, ours, random_tokens, rows, same, stock

from moe_gguf.runtime.cli.inspect import describe, describe_text
from moe_gguf.runtime.errors import UserError
from moe_gguf.runtime.formats.bundle import PLAIN, TRUNK
from moe_gguf.runtime.formats.layout import EMBEDDING, OUTPUT
from moe_gguf.runtime.formats.open import read_layout
from moe_gguf.runtime.kernels import LAYOUT_REPACKED, Transforms

N_STEPS = 6
# Types that kernels of ggml-cpu want repacked, beside others.
FLAGS = {"mixed": True, "trunk": Quant.Q4_0}


def prefill_and_decode(context: Context) -> Logits:
    logits = [context.decode(rows(random_tokens(40)))]
    for i in range(N_STEPS):
        logits.append(context.decode(rows([int(logits[-1][-1].argmax())], 40 + i)))
    return np.concatenate(logits)


def generation(model: Model) -> Logits:
    return prefill_and_decode(model.context())


# --- 1 and 2 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
@pytest.mark.parametrize("n_slots", [None, 13, 3])
def test_a_plain_bundle_computes_what_its_source_does(
    layout: str, n_slots: int | None, tiny_file: TinyFile, bundle: MakeBundle
) -> None:
    path = tiny_file(layout, **FLAGS)
    with stock(path) as model:
        expected = generation(model)
    with ours(bundle(path), n_slots, lanes=1) as model:
        same(generation(model), expected)
        stats = model.stats()
        assert stats.read_bytes > 0
        if n_slots == 13:  # without slots used in turns, every miss is one read
            assert stats.reads >= model.misses
            assert stats.bounced == 0


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
@pytest.mark.parametrize("n_slots", [None, 13, 3])
def test_a_repacked_bundle_computes_what_stock_s_fastest_kernels_do(
    layout: str, n_slots: int | None, tiny_file: TinyFile, bundle: MakeBundle
) -> None:
    path = tiny_file(layout, **FLAGS)
    folder = bundle(path, "repacked")
    with stock(path, repack=True) as model:
        expected = generation(model)
    with stock(path) as model:
        plainly = generation(model)
    with ours(folder, n_slots) as model:
        same(generation(model), expected)
        assert not model.found.kernels.foreign
        assert model.found.kernels.trunk
    if layout != "updown":  # there both kinds of kernels give the same bits
        assert not np.array_equal(plainly, expected), "repacking changed nothing"


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
@pytest.mark.parametrize("n_slots", [None, 13, 3])
def test_what_is_repacked_as_it_is_read_computes_what_stock_s_fastest_kernels_do(
    layout: str, n_slots: int | None, tiny_file: TinyFile
) -> None:
    path = tiny_file(layout, **FLAGS)
    with stock(path, repack=True) as model:
        expected = generation(model)
    with ours(path, n_slots, repack="on") as model:
        assert model.found.kernels.at_reads
        same(generation(model), expected)


@pytest.mark.parametrize("layout", ["qwen3moe", "gemma4", "deepseek2"])
def test_a_tied_output_matrix_is_repacked_as_stock_does(
    layout: str, tiny_file: TinyFile, bundle: MakeBundle
) -> None:
    path = tiny_file(layout, tied=True, vocab=16, **FLAGS)
    for repack, form in ((True, "repacked"), (False, "plain")):
        with stock(path, repack=repack) as model:
            expected = generation(model)
        folder = bundle(path, form)
        with ours(folder, 13) as model:
            same(generation(model), expected)
            assert (OUTPUT in model.found.kernels.trunk) is repack
            held = {tensor.name: tensor.n_bytes for tensor in read_layout(folder).trunk}
            copy = held[EMBEDDING] if repack else 0
            assert model.found.layout.trunk_bytes == sum(held.values()) + copy


# What opening adds to a process that has not held and freed such memory before.
GROWTH = """
import sys
from pathlib import Path
import psutil
from harness import ours
before = psutil.Process().memory_info().rss
with ours(Path(sys.argv[1])) as model:
    print(psutil.Process().memory_info().rss - before, model.found.layout.trunk_bytes)
"""


def test_a_tied_output_matrix_takes_no_memory_where_it_stays_plain(tiny_file: TinyFile) -> None:
    """gemma4 asks for its output matrix before its embedding: llama.cpp then makes two tensors."""
    path = tiny_file("gemma4", tied=True, vocab=1 << 16)  # large: from the system, not the heap
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(path)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    grown, trunk_bytes = map(int, done.stdout.split())
    embedding = (1 << 16) * tiny.N_EMBD * 2
    assert trunk_bytes - 2**20 < grown < trunk_bytes + embedding - 2**20


def test_layouts_are_those_of_this_machine(tiny_file: TinyFile, bundle: MakeBundle) -> None:
    layout = read_layout(bundle(tiny_file("qwen3moe", **FLAGS), "repacked"))
    transforms = Transforms(layout.metadata)
    codes = {
        transforms.code(name, kind, tensor.ne[:2])[0]
        for layer in layout.layers
        for copy in layer.copies
        for tensor, name, kind in zip(layer.tensors, copy.layouts, copy.types, strict=True)
        if name != PLAIN
    }
    assert codes == {LAYOUT_REPACKED}


# --- 3 -------------------------------------------------------------------------------------------


def of_another_machine(folder: Path, target: Path) -> Path:
    """A copy of a repacked bundle whose layouts have names that no machine's kernels have."""
    shutil.copytree(folder, target)
    trunk = target / TRUNK
    layout = read_layout(folder)
    names = {name for layer in layout.layers for copy in layer.copies for name in copy.layouts}
    raw = trunk.read_bytes()
    for name in names - {PLAIN}:
        raw = raw.replace(name.encode(), name[:-8].encode() + b"00000000")
    trunk.write_bytes(raw)
    return target


@pytest.mark.parametrize("layout", ["qwen3moe", "gpt-oss", "deepseek2"])
@pytest.mark.parametrize("n_slots", [None, 13, 3])
def test_a_foreign_layout_is_undone(
    layout: str, n_slots: int | None, tiny_file: TinyFile, bundle: MakeBundle, tmp_path: Path
) -> None:
    path = tiny_file(layout, **FLAGS)
    folder = of_another_machine(bundle(path, "repacked"), tmp_path / "foreign")
    with stock(path) as model:
        expected = generation(model)
    with ours(folder, n_slots) as model:
        assert model.found.kernels.foreign
        assert not model.found.kernels.trunk
        same(generation(model), expected)


def test_a_foreign_layout_without_its_rule_is_refused(
    tiny_file: TinyFile, bundle: MakeBundle, tmp_path: Path
) -> None:
    folder = bundle(tiny_file("qwen3moe", **FLAGS), "repacked")
    target = of_another_machine(folder, tmp_path / "foreign")
    trunk = target / TRUNK
    raw = trunk.read_bytes()
    trunk.write_bytes(raw.replace(b"moe_gguf.layout.", b"moe_gguf.lay0ut."))
    transforms = Transforms(read_layout(target).metadata)
    layer = read_layout(target).layers[0]
    i = next(i for i, name in enumerate(layer.copies[0].layouts) if name != PLAIN)
    with pytest.raises(UserError, match=r"moe_gguf\.layout\.q4_0-\S+\.rows is missing"):
        transforms.code(
            layer.copies[0].layouts[i], layer.copies[0].types[i], layer.tensors[i].ne[:2]
        )


# --- 4 -------------------------------------------------------------------------------------------


@pytest.fixture
def broken(tiny_file: TinyFile, bundle: MakeBundle, tmp_path: Path) -> Path:
    return shutil.copytree(bundle(tiny_file("qwen3moe")), tmp_path / "broken")


def test_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"folder without trunk\.gguf"):
        read_layout(tmp_path)


def test_an_expert_file_is_missing_or_cut(broken: Path) -> None:
    (file,) = broken.glob("experts-0*.gguf")
    raw = file.read_bytes()
    file.write_bytes(raw[:-1])
    with pytest.raises(UserError, match=f"has {len(raw) - 1} bytes instead of {len(raw)}"):
        read_layout(broken)
    file.unlink()
    with pytest.raises(UserError, match="no such file"):
        read_layout(broken)


def test_a_table_that_lies(broken: Path) -> None:
    """Any word of the table may be wrong: a sentence, or a model that only has other weights."""
    trunk = broken / TRUNK
    raw = trunk.read_bytes()
    start = raw.index(b"moe_gguf.layers")
    end = raw.index(b"moe_gguf.trunk.checksum")
    rng = np.random.default_rng(0)
    refused = 0
    for at in rng.integers(start, end, 300).tolist():
        wrong = bytearray(raw)
        wrong[at] ^= int(rng.integers(1, 256))
        trunk.write_bytes(wrong)
        try:
            layout = read_layout(broken)
        except UserError:
            refused += 1
            continue
        for layer in layout.layers:
            for piece in layer.copies[0].pieces:
                for file, offset in zip(piece.file, piece.offset, strict=True):
                    size = layout.files[file].stat().st_size
                    assert 0 <= offset <= size - piece.n_bytes
    assert refused > 100


def test_a_file_outside_the_folder_is_not_opened(broken: Path) -> None:
    trunk = broken / TRUNK
    raw = trunk.read_bytes()
    name = b"experts-00001-of-00001.gguf"
    trunk.write_bytes(raw.replace(name, b"../" + name[3:]))
    with pytest.raises(UserError, match="outside the bundle"):
        read_layout(broken)


# --- what is said --------------------------------------------------------------------------------


def test_inspect_tells_a_bundle_from_a_file(tiny_file: TinyFile, bundle: MakeBundle) -> None:
    path = tiny_file("qwen3moe", **FLAGS)
    assert describe(path)["bundle"] is None
    document = describe(bundle(path, "repacked", low_quant="q4_0"))
    assert document["bundle"]["source"] == path.name
    assert document["bundle"]["quant"] == "copy"
    assert document["bundle"]["layouts"]
    assert document["bundle"]["low_types"] == ["Q4_0"]
    text = describe_text(document)
    assert "kernel-ready: q4_0-" in text
    assert "low copy" in text


def test_the_mode_line_tells_which_kernels_run(
    tiny_file: TinyFile, bundle: MakeBundle, tmp_path: Path
) -> None:
    folder = bundle(tiny_file("qwen3moe", **FLAGS), "repacked")
    with ours(folder) as model:
        assert "repacked kernels" in model.arena.mode_line()
    with ours(of_another_machine(folder, tmp_path / "foreign")) as model:
        line = model.arena.mode_line()
        assert "laid out for another processor" in line
        assert "moe-gguf convert qwen3moe" in line
    path = tiny_file("qwen3moe", **FLAGS)
    for name, said in (("on", "repacked kernels (as it is read)"), ("off", "device cpu")):
        with ours(path, repack=name) as model:
            assert model.arena.mode_line().endswith(said)
    with ours(bundle(path, "repacked"), repack="on") as model:
        assert model.arena.mode_line().endswith("repacked kernels")
