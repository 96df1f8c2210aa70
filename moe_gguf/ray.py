"""``moe_gguf.ray.Engine``, an actor class for Ray Data; needs the extra ``ray``."""

from .runtime.ray import Engine

__all__ = ["Engine"]
