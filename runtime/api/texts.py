"""What translating a body needs of an open model: tokens of texts, and texts of tokens.

The one seam between OpenAI's bodies and a model: how a conversation becomes a prompt is decided
behind ``conversation``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import RequestError, option
from .refusal import Refusal

if TYPE_CHECKING:
    from ..engine.engine import Engine

# A prompt of so many characters is short enough to be cut into tokens, whatever its tokens are.
_SHORT = 1 << 16


class Texts(Protocol):
    n_ctx: int  # the longest a sequence may get
    n_vocab: int

    def encode(self, text: str) -> list[int]:
        """Tokens of a plain prompt. RequestError for one that is too long to be worth it."""

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Tokens of a conversation, up to where the model answers. Refusal, RequestError."""

    def piece(self, token: int, special: bool = True) -> bytes:
        """The text of a token, control tokens' too if ``special``."""

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens, control tokens' too."""


class EngineTexts:
    """The texts of an engine's model."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._vocabulary = engine.vocabulary
        self.n_ctx = engine.n_ctx
        self.n_vocab = engine.vocabulary.n_tokens

    def encode(self, text: str) -> list[int]:
        # Cutting up megabytes takes seconds, and a prompt that long cannot be computed anyway.
        if len(text) > _SHORT and len(text.encode(errors="replace")) > self.n_ctx * self._longest:
            raise RequestError(
                f"the prompt has {len(text)} characters, more than the {self.n_ctx} tokens of the "
                f"context can stand for: shorten it or raise {option('n_ctx')}"
            )
        return self._engine.tokenize(text)

    @cached_property
    def _longest(self) -> int:
        """Bytes of the longest token."""
        return max(len(self.piece(token)) for token in range(self.n_vocab))

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return self._engine.template.encode(messages)

    def piece(self, token: int, special: bool = True) -> bytes:
        return self._vocabulary.piece(token, special)

    def text(self, tokens: Sequence[int]) -> str:
        return self._engine.detokenize(tokens, special=True)


def check_length(param: str, tokens: Sequence[int], max_tokens: int | None, texts: Texts) -> None:
    """Refusal of a prompt that the model's context cannot hold, with the code that clients know."""
    if not tokens:
        raise Refusal(f"{param} is empty: give some text", param)
    if len(tokens) > texts.n_ctx or (len(tokens) == texts.n_ctx and max_tokens != 0):
        raise Refusal(
            f"the prompt has {len(tokens)} tokens but the context holds {texts.n_ctx}: shorten it",
            param,
            code="context_length_exceeded",
        )
