"""Claude Code, Codex and opencode from npm, each for one turn with a tool, against the server:
`make agents` installs them in build/agents and runs these. Not in `make check`.

The model is scripted: asked with the tool on offer, it has a file written, and says so once it was
told of the result. Nobody is signed in, and nothing but the server is needed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scripted import ByteTexts, Scripted
from service import service

from moe_gguf.runtime.api.texts import Conversation
from moe_gguf.runtime.chat.templates import Prompt
from moe_gguf.runtime.engine.request import Request

ROOT = Path(__file__).parents[1]
PROGRAMS = ROOT / "build/agents/node_modules/.bin"
DOCUMENT = ROOT / "docs/serving.md"
NAME = "olmoe"  # clients offer some names, such as gpt-5, tools of their own
KEY = "a-key"
ASKED = "Write blue to colour.txt"
SAID = "The colour is in the file now."


class AgentTexts(ByteTexts):
    """Marks in the prompt whether the tool can be called, and keeps what was asked."""

    n_ctx = 1 << 20

    def __init__(self, tool: str) -> None:
        self.asked: list[Conversation] = []
        self._tool = tool

    def conversation(self, asked: Conversation) -> Prompt:
        self.asked.append(asked)
        prompt = super().conversation(asked)
        text = prompt.text + f"<{self._turn(asked)}>"
        return dataclasses.replace(prompt, text=text, tokens=self.encode(text))

    def _turn(self, asked: Conversation) -> str:
        if results(asked):
            return "told"
        tools: Any = asked.tools or ()
        return "call" if self._tool in [tool["function"]["name"] for tool in tools] else "plain"


def results(asked: Conversation) -> list[str]:
    """What tools have answered, as the model is told of it."""
    messages: Any = asked.messages
    return [json.dumps(one["content"]) for one in messages if one["role"] == "tool"]


class Agent:
    """A folder and a home of its own, and the model that its server has."""

    def __init__(self, folder: Path, url: str, texts: AgentTexts) -> None:
        self.url, self.texts = url, texts
        self.home, self.work = folder / "home", folder / "work"
        self.home.mkdir()
        self.work.mkdir()

    def run(self, *command: str, **variables: str) -> str:
        """What it prints; the variables of this process stay here, but for the path."""
        env = {"PATH": os.environ["PATH"], "HOME": str(self.home), "TERM": "dumb", **variables}
        ran = subprocess.run(
            [str(PROGRAMS / command[0]), *command[1:]],
            cwd=self.work,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    def told(self, language: str) -> str:
        """What docs/serving.md tells people to set, in the agents' one block of this kind."""
        agents = DOCUMENT.read_text().partition("## Agents")[2].partition("\n## ")[0]
        (block,) = re.findall(rf"^```{language}\n(.*?)^```", agents, flags=re.M | re.S)
        settings = {"http://127.0.0.1:8080": self.url, "NAME": NAME, "secret": KEY}
        for written, meant in settings.items():
            block = block.replace(written, meant)
        return block

    def wrote(self) -> None:
        """The tool was called on this machine, and the model was told what came of it."""
        assert (self.work / "colour.txt").read_text().strip() == "blue"
        assert any(results(asked) for asked in self.texts.asked)


@contextmanager
def agent(folder: Path, tool: str, arguments: Mapping[str, Any]) -> Iterator[Agent]:
    """For a model that calls ``tool``; "WORK" in an argument is the folder it works in."""

    def script(request: Request) -> bytes:
        prompt = bytes(token for token in request.tokens if token < 256)
        if prompt.endswith(b"<told>"):
            return SAID.encode()
        if prompt.endswith(b"<plain>"):  # a title, a test of the connection
            return b"A colour"
        call = json.dumps({"name": tool, "arguments": arguments})
        call = call.replace("WORK", str(folder / "work"))
        return f"<call>{call}</call>".encode()

    texts = AgentTexts(tool)
    with service(Scripted(script), texts, name=NAME, keys=[KEY]) as (_, url):
        yield Agent(folder, url, texts)


def test_claude_code(tmp_path: Path) -> None:
    arguments = {"file_path": "WORK/colour.txt", "content": "blue"}
    with agent(tmp_path, "Write", arguments) as claude:
        said = claude.run(
            *("claude", "-p", ASKED, "--allowedTools", "Write"),
            **dict(re.findall(r"(\w+)=(\S+)", claude.told("sh"))),
        )
        assert said.strip() == SAID
        claude.wrote()


def test_codex(tmp_path: Path) -> None:
    with agent(tmp_path, "exec_command", {"cmd": "echo blue > colour.txt"}) as codex:
        config = codex.home / ".codex/config.toml"
        config.parent.mkdir()
        config.write_text(codex.told("toml"))
        said = codex.run(
            *("codex", "exec", "--skip-git-repo-check", "-s", "danger-full-access", ASKED),
            MOE_GGUF_API_KEY=KEY,
        )
        assert said.strip() == SAID
        codex.wrote()


def test_opencode(tmp_path: Path) -> None:
    arguments = {"filePath": "WORK/colour.txt", "content": "blue"}
    with agent(tmp_path, "write", arguments) as opencode:
        config = opencode.work / "opencode.json"
        config.write_text(opencode.told("json"))
        said = opencode.run(
            *("opencode", "run", ASKED),
            MOE_GGUF_API_KEY=KEY,
            OPENCODE_DISABLE_MODELS_FETCH="1",
        )
        assert SAID in said
        opencode.wrote()
