"""The routers of a loaded model: their weights as llama.cpp holds them, their rules as it applies
them."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from .formats.layout import ModelLayout, PlacedTensor
from .plugin.gates import Floats, Gating, Router, RoutingRule
from .plugin.model import PluginModel

# The norm whose output a layer's router reads, by what architectures call it.
_NORMS = ("ffn_norm", "post_attention_norm", "ffn_pre_norm_2")


def read_routers(layout: ModelLayout, plugin: PluginModel) -> dict[int, Router]:
    """The router of every MoE layer; of none if one has no router that this version knows.

    The arrays are views of the loaded model's memory and must not outlive it.
    """
    tensors = {tensor.name: tensor for tensor in layout.trunk}

    def array(layer: int, *names: str) -> Floats | None:
        found = (tensors.get(f"blk.{layer}.{name}") for name in names)
        tensor = next((tensor for tensor in found if tensor is not None), None)
        return None if tensor is None else _values(tensor, layout, plugin)

    routers: dict[int, Router] = {}
    for layer in layout.layers:
        number = layer.layer
        weight = array(number, "ffn_gate_inp.weight")
        n_embd = layer.tensors[0].ne[0]  # if experts read another width, it is not the router's
        if weight is None or weight.shape != (layout.n_experts, n_embd):
            return {}
        bias = array(number, "exp_probs_b.bias", "exp_probs_b")
        routers[number] = Router(
            weight,
            routing_rule(layout.architecture, layout.metadata.get, bias),
            array(number, "ffn_gate_inp.bias"),
            array(number, *(f"{name}.weight" for name in _NORMS)),
        )
    return routers


def _values(tensor: PlacedTensor, layout: ModelLayout, plugin: PluginModel) -> Floats:
    """A trunk tensor in float32, rows last: of the loaded model, or, where that keeps it otherwise
    (on a device, say), of its file."""
    address = plugin.trunk_data(tensor.name)
    if address is None:
        with layout.files[tensor.file].open("rb") as file:
            file.seek(tensor.offset)
            memory = memoryview(file.read(tensor.n_bytes))
    else:
        memory = memoryview((ctypes.c_char * tensor.n_bytes).from_address(address))
    kind = GGMLQuantizationType(tensor.ggml_type)
    shape = tensor.ne[::-1]
    if kind is GGMLQuantizationType.F32:
        return np.ndarray(shape, np.float32, memory)
    rows = np.ndarray((*shape[:-1], tensor.n_bytes // math.prod(shape[:-1])), np.uint8, memory)
    values: Floats = dequantize(rows, kind)
    return values


# Values of the metadata key {architecture}.expert_gating_func.
GATING_FUNCS: dict[int, Gating] = {
    1: "softmax",
    2: "sigmoid",
    3: "softmax_weight",
    4: "sqrt_softplus",
}

# Architectures whose gating llama.cpp fixes in code, whatever the key says; those that are not
# softmax, or add a selection bias to it. For the other fixed ones softmax is right or the
# order is the same.
_FIXED: dict[str, Gating] = {
    "ernie4_5-moe": "softmax",
    "gpt-oss": "softmax_weight",
    "llama4": "sigmoid",
    "mimo2": "sigmoid",
    "minimax-01": "softmax",
    "nemotron_h": "sigmoid",
    "nemotron_h_moe": "sigmoid",
}

# Architectures with this default when the key is absent.
_DEFAULT: dict[str, Gating] = {
    "deepseek2": "softmax",
    "deepseek2-ocr": "softmax",
    **dict.fromkeys(
        ("afmoe", "cohere2moe", "glm-dsa", "glm4moe", "glm5-next", "hy_v3", "laguna", "step35"),
        "sigmoid",
    ),
}

# Files of GLM 4.7 Lite call themselves deepseek2 and may lack the key: llama.cpp's way to tell.
_GLM_LITE_LAYERS, _GLM_LITE_VOCAB = (47, 48), 154880


def routing_rule(
    architecture: str, get: Callable[[str], Any], bias: Floats | None = None
) -> RoutingRule:
    """The rule of one layer of a GGUF file.

    ``get`` returns the value of a metadata key, None where it is absent; ``bias`` is the tensor
    ``blk.N.exp_probs_b.bias``, if there is one. (A bias of the logits, ``ffn_gate_inp.bias``, is
    the router's, not the rule's.) An architecture this version has not heard of is taken to use
    softmax, or sigmoid if it has a bias. ValueError on a gating function that does not exist.
    """
    n_groups = int(get(f"{architecture}.expert_group_count") or 0)
    n_groups_used = int(get(f"{architecture}.expert_group_used_count") or 0)
    return RoutingRule(_gating(architecture, get, bias), bias, n_groups or 1, n_groups_used or 1)


def _gating(architecture: str, get: Callable[[str], Any], bias: Floats | None) -> Gating:
    if architecture in _FIXED:
        return _FIXED[architecture]
    key = f"{architecture}.expert_gating_func"
    number = int(get(key) or 0)
    if number:
        if number not in GATING_FUNCS:
            raise ValueError(f"{key} is {number}, but there are gating functions 1 to 4 only")
        return GATING_FUNCS[number]
    if architecture == "deepseek2" and get("deepseek2.block_count") in _GLM_LITE_LAYERS:
        n_vocab = get("deepseek2.vocab_size") or len(get("tokenizer.ggml.tokens") or ())
        if n_vocab == _GLM_LITE_VOCAB:
            return "sigmoid"
    return _DEFAULT.get(architecture, "softmax" if bias is None else "sigmoid")
