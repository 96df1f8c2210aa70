"""The routers of a loaded model and the native gates that guess with them.

Weights are as llama.cpp holds them, rules as it applies them. Copies nothing that is kept in
float32, as routers usually are.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from moe_gguf.policies.base import Ids, Inputs
from moe_gguf.policies.predict import Gates
from moe_gguf.policies.router import Floats, RoutingRule, routing_rule
from moe_gguf.runtime import plugin as native
from moe_gguf.runtime.layout import ModelLayout, Tensor
from moe_gguf.runtime.plugin import PluginModel, i32

# The norm whose output a layer's router reads, by what architectures call it.
_NORMS = ("ffn_norm", "post_attention_norm", "ffn_pre_norm_2")


@dataclass(eq=False)
class Router:
    """What one MoE layer chooses its experts with: logits = weight x + logit_bias.

    ``weight`` is [n_experts, n_embd] in float32. ``norm`` [n_embd] is the weight of the norm whose
    output the router reads; only the variant ``renorm`` needs it.
    """

    weight: Floats
    rule: RoutingRule
    logit_bias: Floats | None = None
    norm: Floats | None = None


class Prediction(NamedTuple):
    """One guess: an expert of a layer, and the chance that any token asks for it."""

    layer: int
    expert: int
    chance: float


class NativeGates:
    """Owner of one native ``moe_gates``; every method is one call of moe.h.

    ``routers`` holds the MoE layers in model order.
    """

    def __init__(self, routers: Mapping[int, Router], n_used: int, how: Gates) -> None:
        assert routers
        assert how.variant != "renorm" or all(r.norm is not None for r in routers.values())
        self._kept = list(routers.values())  # their memory is used
        self.layers = list(routers)
        structs = (native.Router * len(routers))(*map(_struct, routers.values()))
        layers = (i32 * len(routers))(*routers)
        n_experts = [len(router.weight) for router in routers.values()]
        self._most = how.ahead * max(n_experts)
        config = native.GatesConfig(
            routers=structs,
            layers=layers,
            n_layers=len(routers),
            n_used=n_used,
            width=min(how.widen * n_used, *n_experts),
            variant=native.GATES_VARIANTS[how.variant],
            ahead=how.ahead,
        )
        self._lib = native.load()
        self.handle = int(self._lib.moe_gates_new(ctypes.byref(config)))

    def predict(self, layer: int, x: Inputs) -> list[Prediction]:
        """From a layer's gate input [n_tokens, n_embd]: the nearest layer first, best first."""
        layers, experts = np.empty(self._most, np.int32), np.empty(self._most, np.int32)
        chances = np.empty(self._most, np.float32)
        stride, item = x.strides
        assert item == x.itemsize
        outs = (array.ctypes.data for array in (layers, experts, chances))
        n = self._lib.moe_gates_predict(self.handle, layer, x.ctypes.data, stride, len(x), *outs)
        columns = (array[:n].tolist() for array in (layers, experts, chances))
        return [Prediction(*row) for row in zip(*columns, strict=True)]

    def observe(self, layer: int, ids: Ids) -> None:
        """What was routed, [n_tokens, n_used]: teaches what was predicted."""
        truth = np.ascontiguousarray(ids, np.int32)
        self._lib.moe_gates_observe(self.handle, layer, truth.ctypes.data, *truth.shape)

    def forget(self) -> None:
        self._lib.moe_gates_forget(self.handle)

    @property
    def recall(self) -> dict[int, float]:
        """By layer: the share of the experts a token used that was guessed first, lately."""
        recalls = ((n, self._lib.moe_gates_recall(self.handle, n)) for n in self.layers)
        return {layer: float(recall) for layer, recall in recalls if recall >= 0}

    def close(self) -> None:
        if self.handle:
            self._lib.moe_gates_free(self.handle)
            self.handle = 0


def _struct(router: Router) -> native.Router:
    def address(array: Floats | None) -> int | None:
        assert array is None or array.flags.c_contiguous
        return None if array is None else array.ctypes.data

    rule = router.rule
    return native.Router(
        address(router.weight),
        address(router.logit_bias),
        address(rule.bias),
        address(router.norm),
        *router.weight.shape,
        native.GATINGS[rule.gating],
        rule.n_groups,
        rule.n_groups_used,
    )


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
