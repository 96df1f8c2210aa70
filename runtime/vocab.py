"""A loaded model's vocabulary and metadata as llama.cpp tells them: whole texts, checked ids.

llama_cpp's own wrappers take at most 32 bytes of a token, pass any id on to C++, which ends the
process over most, and give no metadata at all where one value of it is not UTF-8. Knows nothing of
experts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import llama_cpp
import numpy as np

from .errors import RequestError

_PIECE_BYTES = 64  # most tokens are shorter


class Vocabulary:
    """The vocabulary of a llama_model, which must outlive it."""

    def __init__(self, vocab: Any) -> None:
        self.vocab = vocab
        self.n_tokens = int(llama_cpp.llama_vocab_n_tokens(vocab))
        self.has_texts = llama_cpp.llama_vocab_type(vocab) != llama_cpp.LLAMA_VOCAB_TYPE_NONE

    def check_texts(self) -> None:
        """RequestError for a model that only computes with numbers."""
        if not self.has_texts:
            raise RequestError("this model has no vocabulary: give it tokens by their numbers")

    def check(self, tokens: Sequence[int] | np.ndarray[Any, Any]) -> None:
        """RequestError for a number that is no token of this model."""
        if len(tokens) == 0:
            return
        low, high = min(tokens), max(tokens)
        wrong = high if low >= 0 else low
        if not 0 <= wrong < self.n_tokens:
            raise RequestError(
                f"token {wrong} is not in this model's vocabulary of {self.n_tokens}: give tokens "
                "of this model"
            )

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Tokens of a text; ``special``: control tokens may be written in it."""
        self.check_texts()
        size = len(text) + 8  # a token is at least a byte, but for those at both ends
        while True:
            tokens = (llama_cpp.llama_token * size)()
            n = int(
                llama_cpp.llama_tokenize(
                    self.vocab, text, len(text), tokens, size, add_bos, special
                )
            )
            if n >= 0:
                return list(tokens[:n])
            size = -n

    def name(self, token: int) -> str:
        """How a token is written in the model's file; nothing for -1."""
        if token < 0:
            return ""
        return str(llama_cpp.llama_vocab_get_text(self.vocab, token).decode("utf-8", "replace"))

    @property
    def bos(self) -> int:
        """-1 if there is none."""
        return int(llama_cpp.llama_vocab_bos(self.vocab))

    @property
    def eos(self) -> int:
        return int(llama_cpp.llama_vocab_eos(self.vocab))

    def piece(self, token: int, special: bool = False) -> bytes:
        """The text of one token, which was checked."""
        size = _PIECE_BYTES
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = int(llama_cpp.llama_token_to_piece(self.vocab, token, buffer, size, 0, special))
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def beginning(self, token: int, special: bool = False) -> bytes:
        """The text of a token with which a text begins: llama.cpp's detokenizer leaves out a space
        that only marks the beginning, in a vocabulary that puts one there."""
        size = len(self.piece(token, special))
        buffer = ctypes.create_string_buffer(max(size, 1))
        one = (llama_cpp.llama_token * 1)(token)
        n = int(llama_cpp.llama_detokenize(self.vocab, one, 1, buffer, size, False, special))
        return buffer.raw[:n]

    def ends(self, token: int) -> bool:
        """Whether the model says with it that it has ended."""
        return bool(llama_cpp.llama_vocab_is_eog(self.vocab, token))

    @cached_property
    def ending_tokens(self) -> list[int]:
        """All of those."""
        return [token for token in range(self.n_tokens) if self.ends(token)]

    def text(self, tokens: Sequence[int], special: bool = False) -> bytes:
        """What tokens stand for. A space that only marks the beginning is left out."""
        self.check_texts()
        self.check(tokens)
        text = b"".join(self.piece(token, special) for token in tokens)
        begins = len(tokens) > 0 and tokens[0] == self.bos
        return text[1:] if begins and text[:1] == b" " else text

    @property
    def adds_bos(self) -> bool:
        """Whether its model wants the start token before a text."""
        return bool(llama_cpp.llama_vocab_get_add_bos(self.vocab))

    @property
    def adds_eos(self) -> bool:
        """Whether its model wants the end token behind a text."""
        return bool(llama_cpp.llama_vocab_get_add_eos(self.vocab))


def guard(model: Any) -> Vocabulary:
    """The vocabulary of llama_cpp's wrapper of a model, whose own three ways to it are replaced."""
    vocabulary, tokenize = Vocabulary(model.vocab), model.tokenize

    def checked(text: bytes, add_bos: bool, special: bool) -> list[int]:
        vocabulary.check_texts()
        return list(tokenize(text, add_bos, special))

    def piece(token: int, special: bool = False) -> bytes:
        vocabulary.check_texts()
        vocabulary.check([token])
        return vocabulary.piece(token, special)

    model.tokenize, model.token_to_piece, model.detokenize = checked, piece, vocabulary.text
    return vocabulary


def metadata(model: Any) -> dict[str, str]:
    """Every key of a llama_model; what is not UTF-8 is shown as such."""
    get_key, get_value = (
        llama_cpp.llama_model_meta_key_by_index,
        llama_cpp.llama_model_meta_val_str_by_index,
    )
    return {
        _asked(get_key, model, i): _asked(get_value, model, i)
        for i in range(llama_cpp.llama_model_meta_count(model))
    }


def _asked(get: Callable[..., int], model: Any, i: int, size: int = 1024) -> str:
    buffer = ctypes.create_string_buffer(size)
    n = int(get(model, i, buffer, size))
    if n >= size:
        return _asked(get, model, i, n + 1)
    return buffer.value.decode("utf-8", "replace")


def check_bias(vocabulary: Vocabulary, bias: Iterable[int | str] | None) -> None:
    """The ids of a logit bias, which JSON writes as text."""
    try:
        ids = [int(token) for token in bias or ()]
    except ValueError as error:
        raise RequestError(f"logit_bias needs tokens by their numbers ({error})") from None
    vocabulary.check(ids)
