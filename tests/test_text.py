"""Text and names from outside: what any editor writes, and what no terminal should be shown."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_gguf.runtime import progress
from moe_gguf.runtime.cli import terminal
from moe_gguf.runtime.errors import UserError
from moe_gguf.runtime.text import decoded, printable, shown, well_formed

TEXT = "Grüße,\nline two\nand three"
EDITORS: dict[str, Callable[[str], bytes]] = {
    "plain": lambda text: text.encode(),
    "a last line end": lambda text: text.encode() + b"\n",
    "UTF-8 with a mark": lambda text: text.encode("utf-8-sig"),
    "UTF-16, little": lambda text: b"\xff\xfe" + text.encode("utf-16-le"),
    "UTF-16, big": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
    "UTF-32": lambda text: text.encode("utf-32"),
    "line ends of Windows": lambda text: text.replace("\n", "\r\n").encode() + b"\r\n",
    "all of Windows": lambda text: text.replace("\n", "\r\n").encode("utf-16") + b"\r\0\n\0",
}


@pytest.mark.parametrize("editor", EDITORS)
def test_a_prompt_of_any_editor(editor: str, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes(EDITORS[editor](TEXT))
    assert terminal.prompt_text(None, str(tmp_path / "prompt.txt"), wants_terminal=False) == TEXT


@pytest.mark.parametrize(
    "data", [b"caf\xe9", b"\xff\xfea", b"\xff\xfe\x00\xd8a\0", b"\xef\xbb\xbf\xff", b"\xc0\x80"]
)
def test_what_is_no_text_is_refused_in_a_sentence(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes(data)
    with pytest.raises(UserError, match="is not text in UTF-8"):
        terminal.prompt_text(None, str(tmp_path / "prompt.txt"), wants_terminal=False)


def test_an_argument_that_is_no_text() -> None:
    with pytest.raises(UserError, match="what -p gives is not text in UTF-8"):
        terminal.prompt_text(os.fsdecode(b"caf\xe9"), None, wants_terminal=False)


def test_a_mark_inside_a_text_stays() -> None:
    assert decoded("a\ufeffb\rc".encode()) == "a\ufeffb\rc"


def test_halves_of_pairs_are_joined_or_replaced() -> None:
    assert well_formed("\ud83d\ude00 \ud83d x") == "😀 \ufffd x"
    assert well_formed(os.fsdecode(b"a\xffb")) == "a\ufffdb"
    assert well_formed("\ufeffplain 😀") == "\ufeffplain 😀"


def test_names_are_shown_in_one_line() -> None:
    assert shown("a\nb\x1b[31m\u202e\udcff") == "a\\nb\\x1b[31m\\u202e\\udcff"
    long = shown("x" * 70_000 + "end")
    assert len(long) <= 101 and long.endswith("end") and "…" in long


def test_a_sentence_about_a_long_name_keeps_its_mend() -> None:
    sentence = f"{'y' * 70_000} is no model: give another\nsecond \x07 line"
    first, second = printable(sentence).split("\n")
    assert len(first) < 2100 and first.endswith("give another")
    assert second == "second \\x07 line"


def command(*args: str | bytes | Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "moe_gguf", *args], capture_output=True, check=False, timeout=120
    )


@pytest.mark.parametrize(
    "name", [b"no\xff\x1b[31m.gguf", b"no\nsuch.gguf", b"{x}[/b].gguf", b"a/" * 1500 + b"b"]
)
def test_a_file_that_is_not_there_is_named_harmlessly(name: bytes, tmp_path: Path) -> None:
    done = command("inspect", os.fsencode(tmp_path) + b"/" + name)
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1 and len(done.stderr) < 2300
    assert b"\x1b" not in done.stderr and b"\xff" not in done.stderr


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("name", ["{x}.gguf", "[/b].gguf", "a\x1b[31mb", "x" * 70_000])
def test_any_name_on_a_progress_bar(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress.bar(f"loading {name}") as report:
        report(1, 2)
