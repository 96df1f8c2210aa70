"""Tokenizers of Hugging Face folders in llama.cpp: the tokens their own libraries give."""

from __future__ import annotations

import json
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import hf_files
import llama_cpp
import pytest
from gguf import GGUFWriter, TokenType
from hf_files import TEXTS, use_tokenizer
from hf_gguf import write_gguf

from moe_gguf.converters.hf.source import open_hf
from moe_gguf.converters.hf.tokenizer import add_tokenizer
from moe_gguf.converters.hf.wants import Config
from moe_gguf.runtime.errors import UserError


@pytest.fixture
def folder(hf_root: Path, tmp_path: Path) -> Path:
    """A checkpoint whose tokenizer the test may replace."""
    return shutil.copytree(hf_root / "qwen3_moe", tmp_path / "model")


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


@pytest.mark.parametrize("name", hf_files.TOKENIZERS)
def test_texts_become_the_same_tokens(
    name: str, hf_root: Path, folder: Path, vocab: Callable[[], llama_cpp.Llama]
) -> None:
    theirs = use_tokenizer(hf_root, name, folder)
    llm = vocab()
    if name in hf_files.BYTE_LEVEL:
        assert llm.metadata["tokenizer.ggml.pre"] == name
    for text, tokens in zip(TEXTS, theirs, strict=True):
        if name == "nfc":  # llama.cpp does not normalize: it agrees on text that is normal already
            text = unicodedata.normalize("NFC", text)
        ours = encode(llm, text)
        # Where tokens are words with their space, a text begins with one.
        space = " " if name in ("byte-fallback", "sentencepiece") else ""
        assert decode(llm, ours) == space + text
        # llama.cpp's gpt-4o rule does not take marks for letters, as the original does.
        if (name, text) != ("gpt-4o", hf_files.COMBINING):
            assert ours == tokens, text


def test_token_types_specials_and_template(folder: Path) -> None:
    keys = metadata(folder)
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    kind = dict(zip(tokens, types, strict=True))
    assert len(tokens) == hf_files.VOCAB == len(types)
    assert [kind[token] for token in hf_files.SPECIAL] == [TokenType.CONTROL] * 4
    assert kind["<tool>"] == TokenType.USER_DEFINED
    assert kind["a"] == TokenType.NORMAL
    assert kind[f"[PAD{hf_files.VOCAB - 1}]"] == TokenType.UNUSED
    assert keys["tokenizer.ggml.bos_token_id"] == tokens.index(hf_files.SPECIAL[0])
    assert keys["tokenizer.ggml.eos_token_id"] == tokens.index(hf_files.SPECIAL[1])
    assert keys["tokenizer.chat_template"] == hf_files.CHAT


def test_sentencepiece_added_tokens(hf_root: Path, folder: Path) -> None:
    use_tokenizer(hf_root, "sentencepiece", folder)
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
            add_tokenizer(folder, Config(folder), writer, [])
    else:
        add_tokenizer(folder, Config(folder), writer, [])
        assert writer.kv_data[0]["tokenizer.ggml.pre"].value == name


def test_other_models_of_tokens(folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["type"] = "Unigram"
    (folder / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="not Unigram"):
        open_hf(folder)


def test_missing_package(hf_root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_tokenizer(hf_root, "sentencepiece", folder)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r"moe-gguf\[convert\]"):
        open_hf(folder)
