"""The text of an answer comes as whole characters, without any part of a stop text, and joined it
is what the tokens stand for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path

import llama_cpp
import pytest
from conftest import TinyFile
from gguf import GGUFWriter, TokenType
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_gguf.runtime.engine.output import Output
from moe_gguf.runtime.vocab import Vocabulary

SPM = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
SPM += ["▁", "▁Hello", "▁world", "lo", "▁▁▁", "é", "漢", "▁漢字", "<tool>", "\n", "END"]


def write_spm(path: Path) -> Path:
    """A SentencePiece vocabulary and nothing else."""
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    kinds += [TokenType.NORMAL] * (len(SPM) - len(kinds))
    kinds[SPM.index("<tool>")] = TokenType.CONTROL
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(SPM)
    writer.add_token_scores([0.0] * len(SPM))
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def vocabularies(
    tiny_file: TinyFile, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Vocabulary]]:
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    paths = {
        "bpe": tiny_file("qwen3moe"),
        "spm": write_spm(tmp_path_factory.mktemp("spm") / "spm.gguf"),
    }
    models = {
        kind: llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        for kind, path in paths.items()
    }
    yield {k: Vocabulary(llama_cpp.llama_model_get_vocab(m)) for k, m in models.items()}
    for model in models.values():
        llama_cpp.llama_model_free(model)


def detokenize(vocabulary: Vocabulary, tokens: Sequence[int], special: bool) -> str:
    """llama.cpp's own, of all at once."""
    raw = (llama_cpp.llama_token * len(tokens))(*tokens)
    size = sum(len(vocabulary.piece(t, True)) for t in tokens) + 1
    buffer = ctypes.create_string_buffer(size)
    n = llama_cpp.llama_detokenize(vocabulary.vocab, raw, len(tokens), buffer, size, False, special)
    return buffer.raw[:n].decode("utf-8", "replace")


def answer(
    vocabulary: Vocabulary, tokens: Sequence[int], stop: Sequence[str] = (), **more: bool
) -> tuple[list[str], str | None]:
    """The texts that come, and the stop text behind them."""
    output = Output(vocabulary, stop, more.pop("special", False), **more)
    texts: list[str] = []
    for token in tokens:
        text, found = output.push(token)
        texts.append(text)
        if found is not None:
            return texts, found
    return [*texts, output.flush()], None


def spm(*names: str) -> list[int]:
    return [SPM.index(name) for name in names]


def raw(text: str | bytes) -> list[int]:
    """One token for each byte."""
    data = text.encode() if isinstance(text, str) else text
    return [3 + byte for byte in data]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("kind", ["bpe", "spm"])
def test_joined_texts_are_the_whole_text(
    kind: str, vocabularies: dict[str, Vocabulary], data: st.DataObject
) -> None:
    vocabulary = vocabularies[kind]
    tokens = data.draw(st.lists(st.integers(0, vocabulary.n_tokens - 1), min_size=1))
    special = data.draw(st.booleans())
    begins = data.draw(st.booleans())
    stop = data.draw(st.lists(st.text("aH o", min_size=1), max_size=2))
    texts, found = answer(vocabulary, tokens, stop, special=special, begins=begins)
    whole = b"".join(vocabulary.piece(t, special) for t in tokens).decode("utf-8", "replace")
    if begins:
        whole = detokenize(vocabulary, tokens, special)
    joined = "".join(texts) + (found or "")
    assert whole.startswith(joined) and (found is not None or joined == whole)


@settings(max_examples=60, deadline=None)
@given(
    text=st.text("abcé", max_size=30),
    stop=st.lists(st.text("abcé", max_size=4), max_size=4),
    cuts=st.randoms(),
)
def test_the_first_stop_text_ends_it_however_tokens_divide_it(
    text: str, stop: list[str], cuts: object, vocabularies: dict[str, Vocabulary]
) -> None:
    """Against the boring way: look at all of it after each character."""
    expected: tuple[str, str | None] = (text, None)
    for n in range(len(text) + 1):
        ends = [s for s in stop if s and text[:n].endswith(s)]
        if ends:
            longest = max(ends, key=len)
            expected = (text[: n - len(longest)], longest)
            break
    texts, found = answer(vocabularies["spm"], raw(text), stop)
    assert ("".join(texts), found) == expected
    output = Output(vocabularies["spm"], stop, False)  # all in one piece
    sure, found = output._sure(text)
    assert (sure + ("" if found else output.flush()), found) == expected


def test_no_character_comes_in_parts(vocabularies: dict[str, Vocabulary]) -> None:
    texts, _ = answer(vocabularies["spm"], raw("漢é😀"))
    assert texts == ["", "", "漢", "", "é", "", "", "", "😀", ""]


def test_bytes_that_are_no_text_are_replaced(vocabularies: dict[str, Vocabulary]) -> None:
    texts, _ = answer(vocabularies["spm"], [*raw(b"a\xff\xe6\xbc"), *spm("lo"), *raw(b"\xe6")])
    assert texts == ["a", "\ufffd", "", "", "\ufffdlo", "", "\ufffd"]


def test_what_may_become_a_stop_text_is_held_back(vocabularies: dict[str, Vocabulary]) -> None:
    texts, found = answer(vocabularies["spm"], raw("x ENDS"), ["ENDING"])
    assert texts == ["x", " ", "", "", "", "ENDS", ""] and found is None
    texts, found = answer(vocabularies["spm"], raw("x EN"), ["ENDING"])
    assert texts == ["x", " ", "", "", "EN"] and found is None
    texts, found = answer(vocabularies["spm"], raw("aab"), ["ab"])
    assert texts == ["", "a", ""] and found == "ab"


def test_a_stop_text_inside_a_token(vocabularies: dict[str, Vocabulary]) -> None:
    texts, found = answer(vocabularies["spm"], spm("▁Hello", "▁world"), ["o w"])
    assert texts == [" Hell", ""] and found == "o w"
    texts, found = answer(vocabularies["spm"], spm("▁Hello", "▁world"), ["llo", "ell"])
    assert texts == [" H"] and found == "ell"


def test_control_tokens_show_only_if_asked(vocabularies: dict[str, Vocabulary]) -> None:
    tokens = spm("▁Hello", "<tool>", "</s>", "lo")
    assert answer(vocabularies["spm"], tokens)[0] == [" Hello", "", "", "lo", ""]
    assert answer(vocabularies["spm"], tokens, ["<tool>"])[1] is None
    texts, _ = answer(vocabularies["spm"], tokens, special=True)
    assert "".join(texts) == " Hello<tool></s>lo"
    assert answer(vocabularies["spm"], tokens, ["<tool>"], special=True)[1] == "<tool>"


def test_a_space_that_marks_the_beginning_is_left_out(
    vocabularies: dict[str, Vocabulary],
) -> None:
    assert answer(vocabularies["spm"], spm("▁Hello", "▁world"), begins=True)[0][:2] == [
        "Hello",
        " world",
    ]
    assert answer(vocabularies["spm"], spm("▁▁▁"), begins=True)[0][0] == "  "
    assert answer(vocabularies["spm"], spm("▁"), begins=True)[0] == ["", ""]
    bpe = vocabularies["bpe"]
    the = next(t for t in range(bpe.n_tokens) if bpe.piece(t) == b" the")
    assert answer(bpe, [the], begins=True)[0][0] == " the"  # it is a space


def test_empty_stop_texts_stop_nothing(vocabularies: dict[str, Vocabulary]) -> None:
    assert answer(vocabularies["spm"], spm("▁Hello"), [""]) == ([" Hello", ""], None)
