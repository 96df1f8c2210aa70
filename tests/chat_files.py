"""What tests of chat share: llama.cpp's own templates, and a vocabulary of letters."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

from conftest import missing

from moe_gguf.runtime.chat.templates import KEY, Templates

# What the build keeps of llama-cpp-python's source distribution (native/moe-chat.cmake).
KEPT = Path(
    os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache",
    "moe-gguf",
    f"llama-cpp-python-{version('llama-cpp-python')}",
)

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}


class Letters:
    """A vocabulary with a token for each byte, and one for each of the given control texts."""

    def __init__(self, *control: str, adds_bos: bool = False) -> None:
        self.control = [text.encode() for text in ("<s>", "</s>", *control)]
        self.bos, self.eos = 256, 257
        self.adds_bos, self.adds_eos = adds_bos, False

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        out = [self.bos] if add_bos and self.adds_bos else []
        while text:
            found = [c for c in self.control if special and text.startswith(c)]
            out.append(256 + self.control.index(found[0]) if found else text[0])
            text = text[len(found[0]) if found else 1 :]
        return out

    def piece(self, token: int, special: bool = False) -> bytes:
        return bytes([token]) if token < 256 else self.control[token - 256] if special else b""


def template(name: str) -> str:
    path = KEPT / "models" / "templates" / f"{name}.jinja"
    if not path.exists():
        missing(f"{path} is not there: build moe-gguf where pip can download llama-cpp-python")
    return path.read_text()


def names() -> list[str]:
    return sorted(path.stem for path in (KEPT / "models" / "templates").glob("*.jinja"))


def templates(source: str, *control: str, adds_bos: bool = False) -> Templates:
    return Templates(Letters(*control, adds_bos=adds_bos), {KEY: source})  # type: ignore[arg-type]
