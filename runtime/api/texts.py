"""What translating a body needs of an open model: tokens of texts, and texts of tokens.

The one seam between OpenAI's bodies and a model: how a conversation becomes a prompt is decided
behind ``conversation``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from .refusal import Refusal

if TYPE_CHECKING:
    from ..engine.engine import Engine

# A prompt of so many characters is short enough to be cut into tokens, whatever its tokens are.
_SHORT = 1 << 16


class Texts(Protocol):
    n_ctx: int  # the longest a sequence may get
    n_vocab: int

    def encode(self, text: str) -> list[int]:
        """Tokens of a plain prompt. Refusal, RequestError."""

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
        self._check_size("prompt", [text])
        return self._engine.tokenize(text)

    def _check_size(self, param: str, texts: Sequence[str]) -> None:
        """Cutting up megabytes takes seconds, and what is that long cannot be computed anyway."""
        if (n := sum(map(len, texts))) <= _SHORT:
            return
        if sum(len(text.encode()) for text in texts) > self.n_ctx * self._longest:
            raise too_long(param, f"{n} characters", self.n_ctx)

    @cached_property
    def _longest(self) -> int:
        """Bytes of the longest token."""
        return max(len(self.piece(token)) for token in range(self.n_vocab))

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        self._check_size("messages", [message["content"] for message in messages])
        return self._engine.template.encode(messages)

    def piece(self, token: int, special: bool = True) -> bytes:
        return self._vocabulary.piece(token, special)

    def text(self, tokens: Sequence[int]) -> str:
        return self._engine.detokenize(tokens, special=True)


def check_length(param: str, tokens: Sequence[int], max_tokens: int | None, texts: Texts) -> None:
    """Refusal of a prompt that the model's context cannot hold."""
    if not tokens:
        raise Refusal(f"{param} is empty: give some text", param)
    if len(tokens) > texts.n_ctx or (len(tokens) == texts.n_ctx and max_tokens != 0):
        raise too_long(param, f"{len(tokens)} tokens", texts.n_ctx)


def too_long(param: str, length: str, n_ctx: int) -> Refusal:
    """With the code that clients know it by."""
    return Refusal(
        f"the prompt has {length}, more than the {n_ctx} tokens that the context holds: shorten it",
        param,
        code="context_length_exceeded",
    )
