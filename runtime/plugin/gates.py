"""The owner of native gates, what they are told of routers, and the predictor they make."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ...policies.base import Guess, Ids, Inputs, RouteEvent
from ...policies.predict import Gates
from . import abi as native
from . import library
from .abi import i32
from .model import PluginModel


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
        self.n_experts = max(n_experts)
        self._most = how.ahead * self.n_experts
        config = native.GatesConfig(
            routers=structs,
            layers=layers,
            n_layers=len(routers),
            n_used=n_used,
            width=min(how.widen * n_used, *n_experts),
            variant=native.GATES_VARIANTS[how.variant],
            ahead=how.ahead,
        )
        self._lib = library.load()
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


class PluginGates:
    """The predictor of a model: native gates, and from the second guess on inside the plugin.

    The plugin then observes and predicts before it calls back, and not at all where everything
    predicted is loaded; what is left to do here is to read its answer. That begins with the first
    guess and not earlier, so that a policy may be given another predictor before.
    """

    def __init__(self, gates: NativeGates, plugin: PluginModel) -> None:
        self._gates = gates
        self._plugin = plugin
        self._call = plugin.call
        n = 2 * gates.n_experts
        self._keys: Any = (i32 * n).from_address(self._call.predicted_keys)
        self._chances: Any = (ctypes.c_float * n).from_address(self._call.predicted_chances)
        self._is_inside = False

    @property
    def recall(self) -> Mapping[int, float]:
        return self._gates.recall

    def observe(self, event: RouteEvent, ids: Callable[[], Ids]) -> None:
        if not self._is_inside:
            self._gates.observe(event.layer, ids())

    def guess(self, event: RouteEvent, x: Callable[[], Inputs]) -> Sequence[Guess]:
        if self._is_inside:
            n = self._call.n_predicted
            return list(map(_guess, zip(self._keys[:n], self._chances[:n], strict=True)))
        self._plugin.guess_with(self._gates.handle)
        self._is_inside = True
        predicted = self._gates.predict(event.layer, x())
        return [Guess(p.layer * self._gates.n_experts + p.expert, p.chance) for p in predicted]


# Guess itself takes its fields one by one, in twice the time: 16 of them are made per layer.
_guess: Callable[[tuple[int, float]], Guess] = partial(tuple.__new__, Guess)


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


Floats = npt.NDArray[np.float32]
Gating = Literal["softmax", "sigmoid", "softmax_weight", "sqrt_softplus"]


@dataclass(frozen=True, eq=False)
class RoutingRule:
    """How one layer chooses experts from its logits; native/gates.cpp applies it.

    Every gating grows with the logit, so without bias and groups the logits decide. ``bias`` is
    added to the gated scores for the choice alone (DeepSeek-V3). With ``n_groups`` > 1 only the
    experts of the best ``n_groups_used`` groups may be chosen; a group is as good as the sum of its
    two best biased scores.
    """

    gating: Gating = "softmax"
    bias: Floats | None = None
    n_groups: int = 1
    n_groups_used: int = 1
