"""What is said of an open model, under llama-server's names."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..chat.templates import KEY

if TYPE_CHECKING:
    from ..engine.engine import Engine


def facts_of(engine: Engine, caps: Mapping[str, bool]) -> dict[str, Any]:
    """``caps`` are what its chat template can write."""
    layout, vocabulary = engine.found.layout, engine.vocabulary
    counts = [int(np.prod(tensor.ne)) for tensor in layout.tensors]
    return {
        "architecture": layout.architecture,
        "n_ctx_train": layout.n_ctx_train,
        "n_params": sum(counts),
        "size": sum(tensor.n_bytes for tensor in layout.tensors),
        "n_experts": layout.n_experts,
        "chat_template": engine.metadata.get(KEY, ""),
        "chat_template_caps": dict(caps),
        "bos_token": vocabulary.name(vocabulary.bos) if vocabulary.bos >= 0 else "",
        "eos_token": vocabulary.name(vocabulary.eos) if vocabulary.eos >= 0 else "",
        "build_info": f"moe-gguf {importlib.metadata.version('moe-gguf')}",
        "mode": engine.mode_line,
    }
