"""The parameters a context is asked for with, the same for whoever only plans and whoever runs.

``llama_cpp.Llama`` fills its own struct from its arguments; a test holds ours against it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import llama_cpp

from .formats.ggml_types import pad_up
from .formats.layout import ModelLayout
from .system import physical_cores

DEFAULT_CTX = 4096
DEFAULT_BATCH = 512  # llama_cpp.Llama's


def n_ctx_of(layout: ModelLayout, asked: int | None) -> int:
    """The context length that a model gets: None, its own up to DEFAULT_CTX; 0, its own.

    A length llama.cpp takes as it is: llama_cpp.Llama sizes its arrays by what it is told.
    """
    trained = layout.n_ctx_train
    return pad_up(asked or min(trained, DEFAULT_CTX if asked is None else trained), 256)


@dataclass(frozen=True)
class ContextShape:
    """What decides the memory of a context, in tokens, rows and sequences."""

    n_ctx: int
    n_batch: int = DEFAULT_BATCH
    n_outputs: int = 1  # rows whose logits are kept; llama.cpp reserves graph memory for them
    n_threads: int | None = None  # None: the physical cores
    n_seq_max: int = 1
    kv_unified: bool = False
    flash_attn: bool = False
    swa_full: bool = True  # a sliding window's cache holds whole sequences

    def params(self) -> llama_cpp.llama_context_params:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = self.n_ctx
        params.n_batch = params.n_ubatch = min(self.n_ctx, self.n_batch)
        params.n_outputs_max = self.n_outputs
        params.n_threads = params.n_threads_batch = self.n_threads or physical_cores()
        params.n_seq_max = self.n_seq_max
        params.kv_unified = self.kv_unified
        params.swa_full = self.swa_full
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO
            if self.flash_attn
            else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        return params


class ModelParams:
    """llama.cpp's default parameters for a model, with whole numbers of its metadata overridden.

    Keeps the memory they point to; must outlive the load.
    """

    def __init__(self, overrides: Mapping[str, int] | None = None) -> None:
        self.params = llama_cpp.llama_model_default_params()
        if overrides:
            n = len(overrides)
            self._kept: Any = (llama_cpp.llama_model_kv_override * (n + 1))()
            for entry, (key, value) in zip(self._kept, overrides.items(), strict=False):
                entry.key = key.encode()
                entry.tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT
                entry.value.val_i64 = value
            self.params.kv_overrides = ctypes.cast(
                self._kept, ctypes.POINTER(llama_cpp.llama_model_kv_override)
            )
