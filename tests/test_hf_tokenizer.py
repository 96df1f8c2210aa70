"""Tokenizers of Hugging Face folders in llama.cpp: the tokens their own libraries give."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import hf_models
import llama_cpp
import pytest
from gguf import GGUFWriter, TokenType
from hf_gguf import write_gguf
from hf_models import CORPUS, ODD_TEXTS

from moe_gguf.converters.hf_plan import Config
from moe_gguf.converters.hf_tokenizer import add_tokenizer
from moe_gguf.converters.source_hf import open_hf
from moe_gguf.runtime.errors import UserError

TEXTS = CORPUS + ODD_TEXTS
COMBINING = ODD_TEXTS[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint whose tokenizer the test writes anew."""
    hf_models.write("qwen3_moe", tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def vocab(folder: Path) -> Iterator[Callable[[], llama_cpp.Llama]]:
    """Opens what llama.cpp makes of the folder's tokenizer."""
    opened: list[llama_cpp.Llama] = []

    def get() -> llama_cpp.Llama:
        with closing(open_hf(folder)) as source:
            path = write_gguf(source, folder.parent / "vocab.gguf")
        opened.append(llama_cpp.Llama(str(path), vocab_only=True, verbose=False))
        return opened[-1]

    yield get
    for one in opened:
        one.close()


def encode(llm: llama_cpp.Llama, text: str) -> list[int]:
    return list(llm.tokenize(text.encode(), add_bos=False, special=True))


def decode(llm: llama_cpp.Llama, tokens: list[int]) -> str:
    return bytes(llm.detokenize(tokens, special=True)).decode()


def metadata(folder: Path) -> dict[str, Any]:
    with closing(open_hf(folder)) as source:
        return {key: pair.value for key, pair in source.metadata.items()}


@pytest.mark.parametrize("cut", hf_models.CUTS)
def test_byte_level(cut: str, folder: Path, vocab: Callable[[], llama_cpp.Llama]) -> None:
    theirs = hf_models.write_byte_level(folder, cut)
    llm = vocab()
    assert llm.metadata["tokenizer.ggml.pre"] == hf_models.CUTS[cut][1]
    for text in TEXTS:
        tokens = encode(llm, text)
        assert decode(llm, tokens) == text
        # llama.cpp's gpt-4o rule does not take marks for letters, as the original does.
        if (cut, text) != ("gpt-4o", COMBINING):
            assert tokens == theirs.encode(text, add_special_tokens=False), text


def test_normalized_text(folder: Path, vocab: Callable[[], llama_cpp.Llama]) -> None:
    """llama.cpp does not normalize: a tokenizer that does agrees on text that is normal already."""
    theirs = hf_models.write_byte_level(folder, nfc=True)
    llm = vocab()
    for text in TEXTS:
        text = unicodedata.normalize("NFC", text)
        assert encode(llm, text) == theirs.encode(text, add_special_tokens=False), text


def test_byte_fallback(folder: Path, vocab: Callable[[], llama_cpp.Llama]) -> None:
    theirs = hf_models.write_byte_fallback(folder)
    llm = vocab()
    for text in TEXTS:
        tokens = encode(llm, text)
        assert tokens == theirs.encode(text, add_special_tokens=False), text
        assert decode(llm, tokens).removeprefix(" ") == text


def test_sentencepiece(folder: Path, vocab: Callable[[], llama_cpp.Llama]) -> None:
    theirs = hf_models.write_sentencepiece(folder)
    llm = vocab()
    for text in TEXTS:
        tokens = encode(llm, text)
        assert tokens == theirs.encode(text), text
        assert decode(llm, tokens).removeprefix(" ") == text


def test_token_types_specials_and_template(folder: Path) -> None:
    hf_models.write_byte_level(folder)
    keys = metadata(folder)
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    kind = dict(zip(tokens, types, strict=True))
    assert len(tokens) == hf_models.VOCAB == len(types)
    assert [kind[token] for token in hf_models.SPECIAL] == [TokenType.CONTROL] * 4
    assert kind["<tool>"] == TokenType.USER_DEFINED
    assert kind["a"] == TokenType.NORMAL
    assert kind[f"[PAD{hf_models.VOCAB - 1}]"] == TokenType.UNUSED
    assert keys["tokenizer.ggml.bos_token_id"] == tokens.index(hf_models.SPECIAL[0])
    assert keys["tokenizer.ggml.eos_token_id"] == tokens.index(hf_models.SPECIAL[1])
    assert keys["tokenizer.chat_template"] == hf_models.CHAT


def test_sentencepiece_added_tokens(folder: Path) -> None:
    hf_models.write_sentencepiece(folder)
    (folder / "added_tokens.json").write_text(
        json.dumps({"▁tool": 400, "<|im_end|>": 401, "<pad>": 9999})
    )
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {
        "add_prefix_space": False,
        "added_tokens_decoder": {"2": {"content": "</s>", "special": True}},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    keys = metadata(folder)
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert (tokens[400], types[400]) == (" tool", TokenType.USER_DEFINED)
    assert (tokens[401], types[401]) == ("<|im_end|>", TokenType.CONTROL)
    assert types[2] == TokenType.CONTROL
    assert types[tokens.index("<0x0A>")] == TokenType.BYTE
    assert keys["tokenizer.ggml.add_space_prefix"] is False
    assert keys["tokenizer.ggml.add_bos_token"] is True


DEEPSEEK = [
    *(
        {"type": "Split", "pattern": {"Regex": regex}}
        for regex in (r"[\r\n]", r"\s?[A-Za-zµÀ-ÖØ-öø-ƺ]+", r"\s?[!-/:-~]+", r"\s+$", "[一-龥]+")
    ),
    {"type": "Digits", "individual_digits": True},
    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
]


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        (DEEPSEEK, "deepseek-llm"),
        ([{"type": "ByteLevel", "add_prefix_space": False}], "gpt-2"),
        ([{"type": "ByteLevel", "add_prefix_space": True}], None),
        (DEEPSEEK[1:], None),
        ([{"type": "Digits", "individual_digits": True}, DEEPSEEK[-1]], None),
        ([{"type": "Split", "pattern": {"String": " "}}, DEEPSEEK[-1]], None),
        ([], None),
    ],
)
def test_rules_of_cutting(steps: list[Any], name: str | None, folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps} if steps else None
    (folder / "tokenizer.json").write_text(json.dumps(document))
    writer = GGUFWriter(path=None, arch="qwen3moe")
    if name is None:
        with pytest.raises(UserError, match="cuts text by a rule"):
            add_tokenizer(folder, Config(folder), writer)
    else:
        add_tokenizer(folder, Config(folder), writer)
        assert writer.kv_data[0]["tokenizer.ggml.pre"].value == name


def test_other_models_of_tokens(folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["type"] = "Unigram"
    (folder / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="not Unigram"):
        open_hf(folder)


def test_missing_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf_models.write_sentencepiece(folder)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r"moe-gguf\[convert\]"):
        open_hf(folder)
