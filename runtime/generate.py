"""Text from tokens and tokens from text: prompts, chat templates, and the one generation loop.

Works on any llama_cpp.Llama, ours or stock; knows nothing of experts.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jinja2
import llama_cpp
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from moe_gguf.runtime.errors import UserError


class Sampling(NamedTuple):
    """Sampler settings; the defaults are llama.cpp's. ``temp`` 0 is greedy."""

    temp: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int | None = None


class Piece(NamedTuple):
    """One generated token and the text it completes (may be empty inside a character)."""

    token: int
    text: str


def encode(llama: llama_cpp.Llama, text: str) -> list[int]:
    """Tokens of a plain prompt, with the model's own start token if it has one."""
    return check_length(llama, llama.tokenize(text.encode(), add_bos=True, special=False))


class Chat:
    """A conversation in the model's own template."""

    def __init__(self, llama: llama_cpp.Llama, system: str | None = None) -> None:
        template = llama.metadata.get("tokenizer.chat_template")
        if not template:
            raise UserError("this model has no chat template: run it without --chat")
        self._llama = llama

        def special(token: int) -> str:
            return llama._model.token_get_text(token) if token >= 0 else ""

        self._formatter = Jinja2ChatFormatter(
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
                "run it without --chat or without --system"
            ) from None
        tokens = self._llama.tokenize(prompt.encode(), add_bos=False, special=True)
        return check_length(self._llama, tokens)

    def answer(self, text: str) -> None:
        """Record what the model said."""
        self.messages.append({"role": "assistant", "content": text})


def check_length(llama: llama_cpp.Llama, tokens: list[int]) -> list[int]:
    if not tokens:
        raise UserError("the prompt is empty: give some text with -p, -f or on standard input")
    if len(tokens) >= llama.n_ctx():
        raise UserError(
            f"the prompt has {len(tokens)} tokens but the context holds {llama.n_ctx()}: "
            "shorten it or raise --ctx"
        )
    return tokens


def generate(
    llama: llama_cpp.Llama, prompt: Sequence[int], n_predict: int, sampling: Sampling
) -> Iterator[Piece]:
    """Stream up to ``n_predict`` tokens (negative: until the context is full) after ``prompt``.

    Ends at any end-of-generation token, which is not yielded. The text of all pieces joined is
    valid Unicode: bytes of a character that spans tokens are held back until it is complete.
    """
    room = llama.n_ctx() - len(prompt)
    left = room if n_predict < 0 else min(n_predict, room)
    if sampling.seed is not None:
        llama.set_seed(sampling.seed)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    vocab: Any = llama._model.vocab
    previous = list(prompt)
    if left <= 0:
        return
    for token in llama.generate(
        prompt,
        temp=sampling.temp,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repeat_penalty=sampling.repeat_penalty,
    ):
        if llama_cpp.llama_vocab_is_eog(vocab, token):
            break
        left -= 1
        text = decoder.decode(llama.detokenize([token], prev_tokens=previous[-8:]), final=left == 0)
        previous.append(token)
        yield Piece(token, text)
        if left == 0:
            return
    tail = decoder.decode(b"", final=True)
    if tail:
        yield Piece(previous[-1], tail)
