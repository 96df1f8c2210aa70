"""Hugging Face checkpoints as bundles: the same bytes as through a GGUF, and sensible defaults."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import hf_gguf
import pytest

from moe_gguf.converters import convert
from moe_gguf.converters.choose import ConvertOptions
from moe_gguf.converters.convert import open_source
from moe_gguf.runtime import kernels
from moe_gguf.runtime.formats.bundle import TRUNK, BlobSet, BundleTable
from moe_gguf.runtime.formats.ggml_types import GGML_TYPES
from moe_gguf.runtime.formats.gguf_header import GgufHeader, read_header
from moe_gguf.runtime.formats.open import read_layout
from moe_gguf.runtime.llama import Llama


def make(path: Path, folder: Path, options: ConvertOptions) -> tuple[GgufHeader, BundleTable]:
    source = open_source(path)
    try:
        convert.convert(source, folder, options, kernels, lambda *_: None, lambda _: None)
    finally:
        source.close()
    read_layout(folder)  # it can be run
    header = read_header(folder / TRUNK)
    return header, BundleTable.parse(header)


def types(blobs: BlobSet) -> set[str]:
    return {GGML_TYPES[t.ggml_type].name for t in blobs.tensors}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v2"])
def test_the_bundle_is_that_of_the_gguf(family: str, hf_root: Path, tmp_path: Path) -> None:
    checkpoint = hf_root / family
    options = ConvertOptions(quant="f16", layout="plain")
    header, direct = make(checkpoint, tmp_path / "direct", options)
    gguf = hf_gguf.write_gguf(open_source(checkpoint), tmp_path / "model.gguf")
    _, through = make(gguf, tmp_path / "through", dataclasses.replace(options, quant=None))
    assert direct.experts.blob_checksum == through.experts.blob_checksum
    assert direct.trunk_checksum == through.trunk_checksum
    assert header.get("general.file_type") == 1  # mostly F16


def test_floats_become_q4_k_by_default(hf_root: Path, tmp_path: Path) -> None:
    header, table = make(hf_root / "olmoe", tmp_path / "b", ConvertOptions(low_quant="q4_0"))
    assert table.quant == "q4_k"
    assert header.get("general.file_type") == 15  # mostly Q4_K, medium
    assert types(table.experts) <= {"Q4_K", "Q5_0"}  # rows of 64 are no whole blocks
    assert table.low is not None
    assert types(table.low) == {"Q4_0"}


def test_mxfp4_stays_as_it_is_and_text_comes_out(hf_root: Path, tmp_path: Path) -> None:
    header, table = make(hf_root / "gpt_oss-mxfp4", tmp_path / "b", ConvertOptions())
    assert table.quant == "mxfp4"
    assert types(table.experts) == {"MXFP4"}
    trunk = {GGML_TYPES[info.ggml_type].name for info in header.tensors if len(info.ne) > 1}
    assert "Q8_0" in trunk
    llama = Llama(tmp_path / "b", memory="1GB", n_ctx=64, n_threads=1, verbose=False)
    try:
        assert llama.create_completion("a", max_tokens=4)["usage"]["completion_tokens"] > 0
    finally:
        llama.close()
