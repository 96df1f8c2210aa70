"""moe-gguf: Mixture-of-Experts GGUF models larger than memory, on stock llama.cpp."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .runtime.errors import ExpertReadError, UserError

if TYPE_CHECKING:
    from .runtime.llama import Llama

__all__ = ["ExpertReadError", "Llama", "UserError"]


def __getattr__(name: str) -> Any:
    # llama_cpp takes a quarter of a second to import; `moe-gguf --help` should not wait for it.
    if name == "Llama":
        from .runtime.llama import Llama

        return Llama
    raise AttributeError(f"module 'moe_gguf' has no attribute {name!r}")
