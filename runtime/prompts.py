"""Tokens from text: plain prompts and conversations in the model's own template."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jinja2
import llama_cpp
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from .errors import RequestError, UserError, option
from .text import shown


def encode(llama: llama_cpp.Llama, text: str) -> list[int]:
    """Tokens of a plain prompt, with the model's own start token if it has one.

    Control tokens may be written in it, as for llama.cpp's own tools.
    """
    return check_length(llama, llama.tokenize(text.encode(), add_bos=True, special=True))


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


class Chat:
    """A conversation in the model's own template."""

    def __init__(self, llama: llama_cpp.Llama, system: str | None = None) -> None:
        template = llama.metadata.get("tokenizer.chat_template")
        if not template:
            raise UserError(f"this model has no chat template: run it without {option('chat')}")
        self._llama = llama

        def special(token: int) -> str:
            return llama._model.token_get_text(token) if token >= 0 else ""

        self._formatter = compiled(
            template=template,
            eos_token=special(llama.token_eos()),
            bos_token=special(llama.token_bos()),
        )
        self.messages: list[dict[str, str]] = []
        if system:
            self.messages.append({"role": "system", "content": system})

    def ask(self, text: str) -> list[int]:
        """Tokens of the conversation with one more user turn."""
        self.messages.append({"role": "user", "content": text})
        try:
            prompt = self._formatter(messages=self.messages).prompt
        except (ValueError, TypeError, jinja2.TemplateError) as error:
            raise UserError(
                f"the model's chat template refuses this conversation ({error}): "
                f"run it without {option('chat')} or without {option('system')}"
            ) from None
        tokens = self._llama.tokenize(prompt.encode(), add_bos=False, special=True)
        return check_length(self._llama, tokens)

    def answer(self, text: str) -> None:
        """Record what the model said."""
        self.messages.append({"role": "assistant", "content": text})


def check_length(llama: llama_cpp.Llama, tokens: list[int]) -> list[int]:
    if not tokens:
        raise UserError("the prompt is empty: give some text")
    if len(tokens) >= llama.n_ctx():
        raise UserError(
            f"the prompt has {len(tokens)} tokens but the context holds {llama.n_ctx()}: "
            f"shorten it or raise {option('n_ctx')}"
        )
    return tokens
