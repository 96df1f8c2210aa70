"""What translating a body needs of an open model: tokens of texts, and texts of tokens.

The one seam between clients' bodies and a model: how a conversation becomes a prompt, which parts
of messages its model understands, and what its answer means is decided behind ``conversation`` and
``reader``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from ..chat.parser import Delta, Message
from ..chat.templates import Prompt
from ..engine.request import GBNF, Schema
from .refusal import Refusal

if TYPE_CHECKING:
    from ..engine.engine import Engine

# A prompt of so many characters is short enough to be cut into tokens, whatever its tokens are.
_SHORT = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A conversation that a model is to go on with, in OpenAI's terms, whichever protocol it came
    by; nothing of it is checked."""

    messages: object
    tools: object = None
    tool_choice: object = None
    parallel_tool_calls: bool | None = None
    held_to: GBNF | Schema | None = None
    thinking: bool | None = None
    reasoning_effort: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    split_reasoning: bool = True
    continue_final: bool = False
    add_generation_prompt: bool = True


class Reader(Protocol):
    """What an answer means while it grows; ``message`` is the sum of what was told."""

    message: Message

    def push(self, text: str) -> Delta: ...

    def finish(self, text: str = "", cut: bool = False) -> Delta: ...


class Texts(Protocol):
    n_ctx: int  # the longest a sequence may get
    n_vocab: int

    def encode(self, text: str) -> list[int]:
        """Tokens of a plain prompt. Refusal, RequestError."""

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """Tokens of any text: with what belongs to the beginning of one, and control tokens that
        are written in it."""

    def conversation(self, asked: Conversation) -> Prompt:
        """What the model is to continue. RequestError with the field that it is about."""

    def reader(self, prompt: Prompt) -> Reader:
        """A reader of the answer to one prompt."""

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

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        return self._engine.tokenize(text, add_bos=add_special, special=parse_special)

    def _check_size(self, param: str, texts: Sequence[str]) -> None:
        """Cutting up megabytes takes seconds, and what is that long cannot be computed anyway."""
        if (n := sum(map(len, texts))) <= _SHORT:
            return
        if sum(len(text.encode(errors="replace")) for text in texts) > self.n_ctx * self._longest:
            raise too_long(param, f"{n} characters", self.n_ctx)

    @cached_property
    def _longest(self) -> int:
        """Bytes of the longest token."""
        return max(len(self.piece(token)) for token in range(self.n_vocab))

    def conversation(self, asked: Conversation) -> Prompt:
        self._check_size("messages", list(_strings(asked.messages)))
        return self._engine.templates.apply(
            asked.messages,
            tools=asked.tools,
            tool_choice=asked.tool_choice,
            parallel_tool_calls=asked.parallel_tool_calls,
            held_to=asked.held_to,
            thinking=asked.thinking,
            reasoning_effort=asked.reasoning_effort,
            template_kwargs=asked.template_kwargs,
            split_reasoning=asked.split_reasoning,
            continue_final=asked.continue_final,
            add_generation_prompt=asked.add_generation_prompt,
        )

    def reader(self, prompt: Prompt) -> Reader:
        return self._engine.templates.parser(prompt)

    def piece(self, token: int, special: bool = True) -> bytes:
        return self._vocabulary.piece(token, special)

    def text(self, tokens: Sequence[int]) -> str:
        return self._engine.detokenize(tokens, special=True)


def _strings(value: object) -> Iterator[str]:
    """The texts of messages, of whatever form the JSON is."""
    for one in value if isinstance(value, list) else ():
        content = one.get("content") if isinstance(one, dict) else None
        for part in content if isinstance(content, list) else [{"text": content}]:
            text = part.get("text") if isinstance(part, dict) else None
            if isinstance(text, str):
                yield text


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
