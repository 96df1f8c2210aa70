"""Which layers and weights of a model are a device's, and which the processor's.

The same division llama.cpp makes: the last layers and the output go to the device, what tokens are
looked up in stays. Knows names and numbers; no llama.cpp and no sizes in use.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .formats.layout import ModelLayout, MoeLayer, PlacedTensor
from .plugin.devices import Device

# What llama.cpp always keeps in the processor's memory: only rows of it are looked up.
_INPUT = re.compile(r"(token_embd|position_embd|token_types|per_layer_token_embd)\.weight")
_LAYER = re.compile(r"blk\.(\d+)\.")
_OF_EXPERTS = "_exps."  # biases and scales of experts, which are used where these are computed


@dataclass(frozen=True)
class Placement:
    """Layers from ``first`` on are the device's, their experts too, unless the processor computes
    all of these."""

    device: Device
    first: int
    has_experts: bool = True

    def has(self, layer: int) -> bool:
        return layer >= self.first

    def has_tensor(self, name: str) -> bool:
        """Whether a trunk tensor is in the device's memory."""
        if _INPUT.fullmatch(name) or (_OF_EXPERTS in name and not self.has_experts):
            return False
        match = _LAYER.match(name)
        return match is None or self.has(int(match[1]))

    def layers(self, layout: ModelLayout) -> list[MoeLayer]:
        """The MoE layers whose experts the device computes."""
        return [layer for layer in layout.layers if self.has_experts and self.has(layer.layer)]

    def trunk(self, layout: ModelLayout) -> list[PlacedTensor]:
        return [t for t in layout.trunk if self.has_tensor(t.name)]

    def expert_trunk(self, layout: ModelLayout) -> list[PlacedTensor]:
        """Of its trunk what belongs to experts, which the processor needs too to compute one."""
        return [t for t in self.trunk(layout) if _OF_EXPERTS in t.name]

    def share(self, layout: ModelLayout) -> float:
        """Of the model's layers."""
        return max(0, layout.n_layers - self.first) / layout.n_layers


def place(
    layout: ModelLayout, device: Device | None, gpu_layers: int | None, has_experts: bool = True
) -> Placement | None:
    """The last ``gpu_layers`` layers on a device, the output counting as one; None: all of them.
    Without their experts, if it has none.

    None for a model that the processor computes alone.
    """
    if device is None or gpu_layers == 0:
        return None
    n_layers = layout.n_layers
    first = 0 if gpu_layers is None else max(0, n_layers + 1 - gpu_layers)
    return Placement(device, first, has_experts)


def expert_bytes(layer: MoeLayer) -> int:
    """One expert in the device's memory."""
    return sum(tensor.expert_bytes for tensor in layer.tensors)
