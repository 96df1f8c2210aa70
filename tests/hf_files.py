"""Hugging Face checkpoints for tests, and the safetensors format, without importing torch.

Checkpoints are written by `hf_models.py` in a process of its own: the tests of budgets run in this
one, and torch alone is larger than theirs. Along with each come the truths that transformers tells
about it: logits, the greedy continuation, and the tokens of odd texts.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

VOCAB = 512
N_POSITIONS, N_GREEDY = 50, 12

FAMILIES = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_moe_tied",
    "olmoe",
    "gpt_oss",
    "deepseek",
    "deepseek_v2",
    "deepseek_v2_full",
)
# A dash says how: experts as transformers 5 holds them in memory, small shards, another type.
CHECKPOINTS = (
    *FAMILIES,
    "mixtral-fused",
    "qwen2_moe-fused",
    "qwen3_moe-fused",
    "olmoe-fused",
    "deepseek_v2_full-fused",
    "qwen3_moe-sharded",
    "qwen3_moe-bfloat16",
    "qwen3_moe-float16",
    "gpt_oss-mxfp4",
)

SPECIAL = ("<|bos|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
)
CORPUS = (
    "The quick brown fox jumps over the lazy dog, isn't it? They've 'REALLY said: \"no\".",
    "def f(x):\n\treturn x**2  # squared\n\n\nprint(f(12345))",
    "the tokens of the memory and the expert in the words of the model is the best",
)
COMBINING = "e\u0301a\u0300o\u0302 n\u0303 Z\u0351\u036b\u0343\u036a\u0302\u036b\u033d\u034f\u0334"
MARKED = "<|im_start|>user\nhello<|im_end|>\n<|im_start|><|im_start|> <|endoftext|> <tool>x"
# Text that tokenizers disagree on.
TEXTS = (
    *CORPUS,
    COMBINING,
    "👨\u200d👩\u200d👧\u200d👦 👩🏽\u200d🚀 🏳\ufe0f\u200d🌈 🇩🇪🇯🇵 ☺\ufe0f",
    "漢字かな交じり文と한국어 中文\uff0c标点。全角\uff21\uff22\uff23",
    "שלום עולם مرحبا بالعالم \u202eRTL\u202c \u200f",
    "a\x01b\x02c\x1b[0m\x7f \u0085\u2028\u2029",
    " leading,  two   three    four\t\ttabs \n\n\r\n \n trailing  ",
    "\u00a0nbsp\u2003em\u3000ideographic\u200bzero\ufeffbom",
    "I'LL we'Ve don't 123 4567 1.5e-10 ½ Ⅷ x² ٣٤",
    "\ufb01 \ufb02 ß İ \u0131 \u017f Ǆ \U0001d54f\U00010400 \U000e0041",
    MARKED,
)
BYTE_LEVEL = ("gpt-2", "qwen2", "gpt-4o")  # named as llama.cpp names their rule
TOKENIZERS = (*BYTE_LEVEL, "nfc", "byte-fallback", "sentencepiece")


def prompt() -> list[int]:
    """Tokens that every test model is asked to continue."""
    return [int(token) for token in np.random.default_rng(3).integers(4, 300, N_POSITIONS)]


def use_tokenizer(root: Path, name: str, folder: Path) -> list[list[int]]:
    """Replace a checkpoint's tokenizer; returns the tokens of each of TEXTS."""
    for file in folder.glob("*token*"):
        file.unlink()
    for file in (root / f"tokenizer-{name}").iterdir():
        shutil.copy(file, folder)
    tokens: list[list[int]] = json.loads((root / f"tokenizer-{name}.json").read_text())
    return tokens


class Raw(NamedTuple):
    """A stored tensor."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @property
    def width(self) -> int:
        """Bytes of one item."""
        return len(self.data) // math.prod(self.shape)


def load(path: Path) -> dict[str, Raw]:
    content = path.read_bytes()
    base = 8 + struct.unpack("<Q", content[:8])[0]
    entries = json.loads(content[8:base])
    entries.pop("__metadata__", None)
    return {
        name: Raw(e["dtype"], tuple(e["shape"]), content[base:][slice(*e["data_offsets"])])
        for name, e in entries.items()
    }


def save(tensors: dict[str, Raw], path: Path) -> None:
    header, at = {}, 0
    for name, raw in tensors.items():
        offsets = [at, at := at + len(raw.data)]
        header[name] = {"dtype": raw.dtype, "shape": raw.shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    parts = [struct.pack("<Q", len(text)), text, *(raw.data for raw in tensors.values())]
    path.write_bytes(b"".join(parts))
