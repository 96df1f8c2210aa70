"""Quantization against llama.cpp's own: `convert --quant` writes what llama-quantize writes.

The gate: for every type, trunk tensors have the types and the bytes of stock's mix, and experts
those of stock's `--pure`, because experts get the type that was asked for.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from conftest import TinyFile
from gguf import GGMLQuantizationType as Quant

from moe_gguf.converters.choose import ConvertOptions
from moe_gguf.converters.convert import convert, open_source
from moe_gguf.converters.imatrix import read_imatrix
from moe_gguf.converters.mix import FILE_TYPES, FLOATS, NEEDS_IMATRIX, NUMBERS, fitting_type
from moe_gguf.converters.quantize import Quantizer, requires_imatrix
from moe_gguf.runtime import kernels
from moe_gguf.runtime.errors import UserError
from moe_gguf.runtime.formats.bundle import TRUNK
from moe_gguf.runtime.formats.ggml_types import GGML_TYPES
from moe_gguf.runtime.formats.gguf_header import read_header

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Tensors = dict[str, tuple[int, bytes]]  # type and data by name


def tensors(path: Path) -> Tensors:
    header = read_header(path)
    data = np.fromfile(path, np.uint8, offset=header.data_start)
    return {
        info.name: (info.ggml_type, data[info.offset : info.offset + info.n_bytes].tobytes())
        for info in header.tensors
    }


def ours(source: Path, folder: Path, quant: str, imatrix: Path | None = None) -> Tensors:
    """The bundle as stock has it: experts stacked again."""
    opened = open_source(source)
    options = ConvertOptions(quant=quant, imatrix=imatrix, layout="plain", threads=2)
    convert(opened, folder, options, kernels, lambda done, total: None, lambda text: None)
    out = tensors(folder / TRUNK)
    experts = tensors(folder / "experts-00001-of-00001.gguf")
    for stack in opened.experts:
        name = f"blk.{stack.layer}.exp.{{}}.{stack.role}.weight"
        parts = [experts[name.format(expert)] for expert in range(opened.n_experts)]
        out[stack.name] = parts[0][0], b"".join(data for _, data in parts)
    opened.close()
    return out


def stock(
    source: Path, target: Path, quant: str, imatrix: dict[str, Floats] | None = None, **flags: bool
) -> Tensors:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[quant]
    params.nthread = 2
    params.allow_requantize = True
    for name, value in flags.items():
        setattr(params, name, value)
    if imatrix is not None:
        kind = llama_cpp.llama_cpp.llama_model_imatrix_data
        entries = (kind * (len(imatrix) + 1))()
        for entry, (name, values) in zip(entries, imatrix.items(), strict=False):
            entry.name = name.encode()
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.size = len(values)
        params.imatrix = entries
    code = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(params)
    )
    assert code == 0
    return tensors(target)


def is_expert(name: str) -> bool:
    return "_exps.weight" in name


def assert_equal(found: Tensors, expected: Tensors, wanted: Callable[[str], bool]) -> None:
    names = [name for name in expected if wanted(name)]
    assert names
    types = {name: Quant(found[name][0]).name for name in names}
    assert types == {name: Quant(expected[name][0]).name for name in names}
    assert [name for name in names if found[name][1] != expected[name][1]] == []


# iq* types take seconds each even here: one of them stands for all.
@pytest.mark.parametrize(
    ("layout", "quant"),
    [
        *(("qwen3moe", quant) for quant in ("q4_k", "q8_0", "q6_k", "q5_k", "q3_k", "q2_k")),
        *(("qwen3moe", quant) for quant in ("q4_0", "q5_1", "tq2_0", "f16", "bf16")),
        *(("mixtral", quant) for quant in ("q4_k", "q8_0", "q3_k")),
        ("deepseek2", "q4_k"),
        ("gemma4", "q5_k"),
        ("llama4", "iq4_xs"),
    ],
)
def test_bytes_are_those_of_llama_quantize(
    layout: str, quant: str, tiny_file: TinyFile, tmp_path: Path
) -> None:
    source = tiny_file(layout, experts=Quant.F16)
    found = ours(source, tmp_path / "bundle", quant)
    mixed = stock(source, tmp_path / "mixed.gguf", quant)
    assert_equal(found, mixed, lambda name: not is_expert(name))
    pure = stock(source, tmp_path / "pure.gguf", quant, pure=True)
    assert_equal(found, pure, is_expert)


def test_quantized_sources_are_decoded_by_ggml(tiny_file: TinyFile, tmp_path: Path) -> None:
    source = tiny_file("deepseek2")  # Q6_K and Q5_0
    found = ours(source, tmp_path / "bundle", "q4_0")
    pure = stock(source, tmp_path / "pure.gguf", "q4_0", pure=True)
    assert_equal(found, pure, is_expert)


@pytest.mark.parametrize("source_type", ["f32", "f16", "bf16"])
def test_floats_of_any_kind(source_type: str) -> None:
    values = np.random.default_rng(0).standard_normal((300, 96), np.float32)
    data = gguf.quantize(values, Quant(NUMBERS[source_type])).view(np.uint8).reshape(-1)
    rounded = gguf.dequantize(
        data.view({"f32": np.float32, "f16": np.float16, "bf16": np.uint8}[source_type]).reshape(
            300, -1
        ),
        Quant(NUMBERS[source_type]),
    )
    with Quantizer(3) as quantizer:
        job = quantizer.submit("x", data, NUMBERS[source_type], NUMBERS["q8_0"], 96)
        assert job.result().tobytes() == gguf.quantize(rounded, Quant.Q8_0).tobytes()


# --- importance matrices ------------------------------------------------------------------------


def random_imatrix(source: Path) -> dict[str, Floats]:
    """Weights for every matrix, each expert's different."""
    rng = np.random.default_rng(7)
    return {
        info.name: rng.uniform(0.01, 100.0, info.ne[0] * (*info.ne, 1)[2]).astype(np.float32)
        for info in read_header(source).tensors
        if len(info.ne) > 1
    }


def write_dat(path: Path, imatrix: dict[str, Floats], calls: int = 3) -> Path:
    out = struct.pack("<i", len(imatrix))
    for name, values in imatrix.items():
        out += struct.pack("<i", len(name)) + name.encode()
        out += struct.pack("<ii", calls, len(values)) + (values * np.float32(calls)).tobytes()
    path.write_bytes(out + struct.pack("<ii", 100, 4) + b"wiki")
    return path


def write_gguf(path: Path, imatrix: dict[str, Floats], n_experts: int) -> Path:
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    for name, values in imatrix.items():
        n = n_experts if is_expert(name) else 1
        counts = np.full((n, 1), 4, np.float32)  # dividing by it is exact
        writer.add_tensor(name + ".in_sum2", values.reshape(n, -1) * np.float32(4))
        writer.add_tensor(name + ".counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("quant", ["q4_k", "q4_0"])
def test_imatrix_weighs_each_expert_as_in_llama_quantize(
    quant: str, tiny_file: TinyFile, tmp_path: Path
) -> None:
    source = tiny_file("qwen3moe", experts=Quant.F16)
    imatrix = random_imatrix(source)
    file = write_gguf(tmp_path / "imatrix.gguf", imatrix, n_experts=16)
    found = ours(source, tmp_path / "bundle", quant, file)
    mixed = stock(source, tmp_path / "mixed.gguf", quant, imatrix)
    assert_equal(found, mixed, lambda name: not is_expert(name))
    pure = stock(source, tmp_path / "pure.gguf", quant, imatrix, pure=True)
    assert_equal(found, pure, is_expert)
    if quant == "q4_k":
        plain = ours(source, tmp_path / "plain", quant)
        assert plain["blk.0.ffn_up_exps.weight"] != found["blk.0.ffn_up_exps.weight"]


def test_both_formats_of_an_imatrix_say_the_same(tiny_file: TinyFile, tmp_path: Path) -> None:
    imatrix = random_imatrix(tiny_file("qwen3moe"))
    new = read_imatrix(write_gguf(tmp_path / "i.gguf", imatrix, n_experts=16))
    old = read_imatrix(write_dat(tmp_path / "i.dat", imatrix))
    assert new.keys() == old.keys() == imatrix.keys()
    for name, values in imatrix.items():
        np.testing.assert_array_equal(new[name].read(0, len(values)), values)
        np.testing.assert_allclose(old[name].read(0, len(values)), values, rtol=1e-6)
        np.testing.assert_array_equal(new[name].read(200, 50), values[200:250])


def test_experts_that_no_token_reached_weigh_all_columns_alike(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "i.gguf", "")
    writer.add_tensor("x.in_sum2", np.array([[2, 4], [0, 0]], np.float32))
    writer.add_tensor("x.counts", np.array([[2], [0]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_imatrix(tmp_path / "i.gguf")["x"].read(0, 4).tolist() == [1, 2, 1, 1]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def _garbage(path: Path) -> None:
    path.write_bytes(b"\xff" * 100)


@pytest.mark.parametrize("damage", [_cut, _garbage, Path.unlink])
def test_damaged_imatrix(
    damage: Callable[[Path], Any], tiny_file: TinyFile, tmp_path: Path
) -> None:
    path = write_dat(tmp_path / "i.dat", random_imatrix(tiny_file("qwen3moe")))
    damage(path)
    with pytest.raises(UserError, match="importance matrix"):
        read_imatrix(path)


def test_imatrix_of_another_model(tiny_file: TinyFile, tmp_path: Path) -> None:
    source = tiny_file("qwen3moe", experts=Quant.F16)
    imatrix = random_imatrix(source)
    imatrix["blk.1.ffn_up_exps.weight"] = np.ones(256, np.float32)
    file = write_dat(tmp_path / "i.dat", imatrix)
    with pytest.raises(UserError, match=r"256 values for blk\.1\.ffn_up_exps\.weight .* 4096"):
        ours(source, tmp_path / "bundle", "q4_k", file)


def test_types_that_need_an_imatrix_say_so(tiny_file: TinyFile, tmp_path: Path) -> None:
    source = tiny_file("mixtral", experts=Quant.F16)
    with pytest.raises(UserError, match=r"iq2_xs is useless without .* with imatrix"):
        ours(source, tmp_path / "bundle", "iq2_xs")
    needed_by_ggml = {name for name in FILE_TYPES if requires_imatrix(NUMBERS[name])}
    assert needed_by_ggml <= NEEDS_IMATRIX


# --- choices and faults -------------------------------------------------------------------------


def test_every_type_has_a_fallback_that_fits() -> None:
    for name in FILE_TYPES:
        for row in (32, 96, 128, 288, 100, 33):
            fitting = fitting_type(NUMBERS[name], row)
            assert row % GGML_TYPES[fitting].block == 0
    assert fitting_type(NUMBERS["q4_k"], 512) == NUMBERS["q4_k"]
    assert fitting_type(NUMBERS["q4_k"], 96) == NUMBERS["q5_0"]
    assert fitting_type(NUMBERS["q4_k"], 33) in FLOATS


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_no_numbers(bad: float) -> None:
    values = np.ones((64, 256), np.float32)
    values[40, 200] = bad
    with Quantizer(2) as quantizer:
        job = quantizer.submit(
            "blk.0.x", values.view(np.uint8).reshape(-1), NUMBERS["f32"], NUMBERS["q4_k"], 256
        )
        with pytest.raises(UserError, match=r"blk\.0\.x holds NaN or infinity"):
            job.result()


def test_weights_too_large_for_the_type() -> None:
    values = np.full((8, 256), 3e38, np.float32)
    with Quantizer(1) as quantizer:
        job = quantizer.submit(
            "x", values.view(np.uint8).reshape(-1), NUMBERS["f32"], NUMBERS["f16"], 256
        )
        with pytest.raises(UserError, match="too large for F16"):
            job.result()


def test_threads_and_slices_change_nothing() -> None:
    values = np.random.default_rng(3).standard_normal((1000, 512), np.float32)
    data = values.view(np.uint8).reshape(-1)
    weights = np.random.default_rng(4).uniform(0, 9, 4 * 512).astype(np.float32)
    kinds = (NUMBERS["f32"], NUMBERS["q4_k"], 512)
    with Quantizer(1) as quantizer:
        whole = quantizer.submit("x", data, *kinds, weights, matrix_rows=250).result()
    with Quantizer(5) as quantizer:
        half = len(data) // 2 + 100 * 4 * 512
        parts = [
            quantizer.submit("x", data[:half], *kinds, weights, matrix_rows=250),
            quantizer.submit("x", data[half:], *kinds, weights, first_row=600, matrix_rows=250),
        ]
        assert b"".join(p.result().tobytes() for p in parts) == whole.tobytes()
