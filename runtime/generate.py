"""Text from tokens and tokens from text: prompts, chat templates, and the one generation loop.

Works on any llama_cpp.Llama, ours or stock; knows nothing of experts.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import llama_cpp


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
