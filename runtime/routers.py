"""The routers of a loaded model, for guessing: weights as llama.cpp holds them, rules as it applies
them. Copies nothing that is kept in float32, as routers usually are.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from moe_gguf.policies.predict import Router
from moe_gguf.policies.router import Floats, Ids, routing_rule
from moe_gguf.runtime import plugin as native
from moe_gguf.runtime.layout import ModelLayout, Tensor
from moe_gguf.runtime.plugin import PluginModel

# The norm whose output a layer's router reads, by what architectures call it.
_NORMS = ("ffn_norm", "post_attention_norm", "ffn_pre_norm_2")


@dataclass(eq=False)
class NativeRouter(Router):
    """A router that ranks in the plugin, in a quarter of the time."""

    def __post_init__(self) -> None:
        rule = self.rule
        self._rank = native.load().moe_rank
        self._self = native.Router(
            _address(self.weight),
            None if self.logit_bias is None else _address(self.logit_bias),
            None if rule.bias is None else _address(rule.bias),
            *self.weight.shape,
            native.GATINGS[rule.gating],
            rule.n_groups,
            rule.n_groups_used,
        )
        self._at = ctypes.addressof(self._self)

    def rank(self, x: Floats, width: int, shift: Floats | None = None) -> tuple[Ids, Floats]:
        experts = np.empty((len(x), width), np.int32)
        confidence = np.empty((len(x), width), np.float32)
        stride, item = x.strides
        assert item == x.itemsize
        self._rank(
            self._at,
            _address(x),
            stride,
            len(x),
            None if shift is None else _address(shift),
            width,
            _address(experts),
            _address(confidence),
        )
        return experts, confidence


def read_routers(layout: ModelLayout, plugin: PluginModel) -> dict[int, Router]:
    """The router of every MoE layer; of none if one has no router that this version knows.

    The arrays are views of the loaded model's memory and must not outlive it.
    """
    tensors = {tensor.name: tensor for tensor in layout.trunk}

    def array(layer: int, *names: str) -> Floats | None:
        found = (tensors.get(f"blk.{layer}.{name}") for name in names)
        tensor = next((tensor for tensor in found if tensor is not None), None)
        return None if tensor is None else _values(tensor, plugin)

    routers: dict[int, Router] = {}
    for layer in layout.layers:
        number = layer.layer
        weight = array(number, "ffn_gate_inp.weight")
        if weight is None or weight.shape[0] != layout.n_experts:
            return {}
        bias = array(number, "exp_probs_b.bias", "exp_probs_b")
        routers[number] = NativeRouter(
            weight,
            routing_rule(layout.architecture, layout.metadata.get, bias),
            array(number, "ffn_gate_inp.bias"),
            array(number, *(f"{name}.weight" for name in _NORMS)),
        )
    return routers


def _address(array: NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]  # .ctypes.data takes three times as long
    return address


def _values(tensor: Tensor, plugin: PluginModel) -> Floats | None:
    """A trunk tensor in float32, rows last; None where the loaded model keeps it otherwise."""
    address = plugin.trunk_data(tensor.name)
    if address is None:
        return None
    memory = memoryview((ctypes.c_char * tensor.n_bytes).from_address(address))
    kind = GGMLQuantizationType(tensor.ggml_type)
    shape = tensor.ne[::-1]
    if kind is GGMLQuantizationType.F32:
        return np.ndarray(shape, np.float32, memory)
    rows = np.ndarray((*shape[:-1], tensor.n_bytes // math.prod(shape[:-1])), np.uint8, memory)
    values: Floats = dequantize(rows, kind)
    return values
