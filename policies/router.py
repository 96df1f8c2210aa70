"""The routing rule: from a router's logits to the experts llama.cpp will choose.

Knows how each architecture gates, as of llama.cpp's ``build_moe_ffn`` and its models' defaults; not
where logits come from. What happens to the weights of the chosen experts is not a matter here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Gating = Literal["softmax", "sigmoid", "softmax_weight", "sqrt_softplus"]

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
