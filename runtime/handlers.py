"""What llama_cpp's own class makes of a model's chat templates, for ``moe_gguf.Llama`` alone.

Everything else writes conversations with ``chat``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from .errors import RequestError
from .text import shown


class LateFormatter:
    """Takes the place of Jinja2ChatFormatter where llama_cpp makes a handler of every template of a
    model: a template is compiled when it is used. RequestError then, where Jinja cannot."""

    def __init__(self, **arguments: Any) -> None:
        self._arguments = arguments
        self._handler: Any = None

    def to_chat_handler(self) -> Callable[..., Any]:
        def handle(**request: Any) -> Any:
            if self._handler is None:
                self._handler = self._compiled().to_chat_handler()
            return self._handler(**request)

        return handle

    def _compiled(self) -> Jinja2ChatFormatter:
        try:
            return Jinja2ChatFormatter(**self._arguments)
        except Exception as error:  # the compiler's own, and whatever its parser meets in the text
            raise RequestError(
                f"the model's chat template cannot be used ({shown(error)}): give plain prompts, "
                "which need none"
            ) from error
