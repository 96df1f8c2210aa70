"""Typed answers: each kind of wrong value is one sentence that names file, key and mend."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moe_gguf.runtime.errors import UserError
from moe_gguf.runtime.formats.gguf_header import Value
from moe_gguf.runtime.formats.keys import Keys

FILE: dict[str, Value] = {
    "general.name": "tiny",
    "qwen.layers": 3,
    "qwen.heads": (4, 0, 4),
    "qwen.flag": True,
    "qwen.rate": 0.5,
    "qwen.words": ("a", "b"),
    "qwen.none": (),
}
KEYS = Keys("model.gguf", FILE.get, "download it again", "qwen")


def test_what_is_there_is_given() -> None:
    assert KEYS.text("general.name") == "tiny"
    assert KEYS.integer(".layers") == KEYS.integer("qwen.layers", 3, 3) == 3
    assert KEYS.integers(".heads") == KEYS.integers(".heads", 0, 4, 3) == (4, 0, 4)
    assert KEYS.texts(".words") == KEYS.texts(".words", 2) == ("a", "b")
    assert KEYS.value(".rate") == 0.5
    assert KEYS.has(".rate")


def test_a_number_stands_for_as_many_alike() -> None:
    assert KEYS.integers(".layers", count=4) == (3, 3, 3, 3)
    assert KEYS.integers(".layers") == (3,)


def test_what_is_absent_has_its_default() -> None:
    assert KEYS.value(".absent") is None
    assert not KEYS.has(".absent")
    assert KEYS.integer(".absent", default=7) == 7
    assert KEYS.integers(".absent", default=()) == ()
    assert KEYS.text(".absent", "") == ""


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda: KEYS.integer(".absent"), "qwen.absent is missing instead of a number"),
        (lambda: KEYS.integer(".layers", 4, 9), "qwen.layers is 3 instead of a number from 4 to 9"),
        (lambda: KEYS.integer(".layers", 0, 2, 1), "qwen.layers is 3 instead"),
        (lambda: KEYS.integer(".flag"), "qwen.flag is True instead"),
        (lambda: KEYS.integer(".rate", default=1), "qwen.rate is 0.5 instead"),
        (lambda: KEYS.integer(".heads"), "qwen.heads is (4, 0, 4) instead of a number"),
        (lambda: KEYS.integers(".absent"), "qwen.absent is missing instead of numbers"),
        (lambda: KEYS.integers(".heads", 1, 9), "qwen.heads is (4, 0, 4) instead of numbers"),
        (lambda: KEYS.integers(".words"), "qwen.words is ('a', 'b') instead of numbers"),
        (lambda: KEYS.integers(".flag", count=2), "qwen.flag is True instead of numbers"),
        (lambda: KEYS.integers(".heads", count=2), "qwen.heads has 3 items instead of 2"),
        (lambda: KEYS.integers(".none"), "qwen.none has 0 items instead of at least one"),
        (lambda: KEYS.text(".layers"), "qwen.layers is 3 instead of a text"),
        (lambda: KEYS.texts("general.name"), "general.name is 'tiny' instead of a list of texts"),
        (lambda: KEYS.texts(".heads"), "qwen.heads is (4, 0, 4) instead of a list of texts"),
        (lambda: KEYS.texts(".words", 3), "qwen.words has 2 items instead of 3"),
    ],
)
def test_a_wrong_value_is_one_sentence(ask: Callable[[], object], said: str) -> None:
    with pytest.raises(UserError) as caught:
        ask()
    sentence = str(caught.value)
    assert said in sentence
    assert sentence.startswith("model.gguf is damaged (")
    assert sentence.endswith("); download it again")


def test_a_long_value_is_not_told_whole() -> None:
    keys = Keys("model.gguf", {"words": "x" * 10_000}.get, "download it again")
    with pytest.raises(UserError) as caught:
        keys.integer("words")
    assert len(str(caught.value)) < 200
