"""Tokens from text: plain prompts and conversations in the model's own template.

Needs of a model its vocabulary and its metadata; does not know how long a prompt may be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from .errors import RequestError, UserError, option
from .text import shown
from .vocab import Vocabulary


def encode(vocabulary: Vocabulary, text: str) -> list[int]:
    """Tokens of a plain prompt, with the model's own start token if it has one.

    Control tokens may be written in it, as for llama.cpp's own tools.
    """
    return vocabulary.tokenize(text.encode(), add_bos=True, special=True)


def compiled(**arguments: Any) -> Jinja2ChatFormatter:
    """A model's template, ready for use. RequestError for one that Jinja cannot compile."""
    try:
        return Jinja2ChatFormatter(**arguments)
    except Exception as error:  # the compiler's own, and whatever its parser meets in the text
        raise RequestError(
            f"the model's chat template cannot be used ({shown(error)}): give plain prompts, which "
            "need none"
        ) from error


class LateFormatter:
    """Takes the place of Jinja2ChatFormatter where llama_cpp makes a handler of every template of a
    model: a template is compiled when it is used."""

    def __init__(self, **arguments: Any) -> None:
        self._arguments = arguments
        self._handler: Any = None

    def to_chat_handler(self) -> Callable[..., Any]:
        def handle(**request: Any) -> Any:
            if self._handler is None:
                self._handler = compiled(**self._arguments).to_chat_handler()
            return self._handler(**request)

        return handle


class Template:
    """How a model writes a conversation."""

    def __init__(self, vocabulary: Vocabulary, metadata: Mapping[str, str]) -> None:
        text = metadata.get("tokenizer.chat_template")
        if not text:
            raise UserError(f"this model has no chat template: run it without {option('chat')}")
        self._vocabulary = vocabulary
        self._formatter = compiled(
            template=text,
            eos_token=vocabulary.name(vocabulary.eos),
            bos_token=vocabulary.name(vocabulary.bos),
        )

    def encode(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Tokens of a conversation, up to where the model answers."""
        try:
            prompt = self._formatter(messages=list(messages)).prompt
        except (ValueError, TypeError, jinja2.TemplateError) as error:
            raise RequestError(
                f"the model's chat template refuses this conversation ({error}): "
                f"run it without {option('chat')} or without {option('system')}"
            ) from None
        return self._vocabulary.tokenize(prompt.encode(), add_bos=False, special=True)
