"""moe-gguf: Mixture-of-Experts GGUF models larger than memory, on stock llama.cpp."""

from __future__ import annotations

from pathlib import Path
from pkgutil import extend_path
from typing import TYPE_CHECKING, Any

# Python started in a checkout finds this folder first, and the rest of an installed moe-gguf (its
# built plugin too) only where it was installed.
if not Path(__file__).with_name("runtime").is_dir():
    __path__ = extend_path(__path__, __name__)

from .runtime.errors import ExpertReadError, UserError

if TYPE_CHECKING:
    from .runtime.engine.engine import Engine
    from .runtime.llama import Llama

__all__ = ["Engine", "ExpertReadError", "Llama", "UserError"]


def __getattr__(name: str) -> Any:
    # llama_cpp takes a quarter of a second to import; `moe-gguf --help` should not wait for it.
    if name == "Llama":
        from .runtime.llama import Llama

        return Llama
    if name == "Engine":
        from .runtime.engine.engine import Engine

        return Engine
    raise AttributeError(f"module 'moe_gguf' has no attribute {name!r}")
