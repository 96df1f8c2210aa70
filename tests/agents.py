"""Claude Code, Codex and opencode from npm, each for one turn with a tool, against the server:
`make agents` installs them in build/agents and runs these. Not in `make check`.

The model is scripted: asked with the tool on offer, it has a file written, and says so once it was
told of the result. Nobody is signed in, and nothing but the server is needed.
"""

from __future__ import annotations

import dataclasses
import json
import os
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

PROGRAMS = Path(__file__).parents[1] / "build/agents/node_modules/.bin"
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
            ANTHROPIC_BASE_URL=claude.url,
            ANTHROPIC_AUTH_TOKEN=KEY,
            ANTHROPIC_MODEL=NAME,
            ANTHROPIC_DEFAULT_HAIKU_MODEL=NAME,
            CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
        )
        assert said.strip() == SAID
        claude.wrote()


CODEX = """
model = "{model}"
model_provider = "moe-gguf"
check_for_update_on_startup = false

[analytics]
enabled = false

[model_providers.moe-gguf]
name = "moe-gguf"
base_url = "{url}/v1"
wire_api = "responses"
env_key = "MOE_GGUF_API_KEY"
"""


def test_codex(tmp_path: Path) -> None:
    with agent(tmp_path, "exec_command", {"cmd": "echo blue > colour.txt"}) as codex:
        config = codex.home / ".codex/config.toml"
        config.parent.mkdir()
        config.write_text(CODEX.format(model=NAME, url=codex.url))
        said = codex.run(
            *("codex", "exec", "--skip-git-repo-check", "-s", "danger-full-access", ASKED),
            MOE_GGUF_API_KEY=KEY,
        )
        assert said.strip() == SAID
        codex.wrote()


OPENCODE = {
    "$schema": "https://opencode.ai/config.json",
    "autoupdate": False,
    "share": "disabled",
    "model": f"moe-gguf/{NAME}",
    "provider": {
        "moe-gguf": {
            "npm": "@ai-sdk/openai-compatible",
            "name": "moe-gguf",
            "options": {"baseURL": "ADDRESS/v1", "apiKey": "{env:MOE_GGUF_API_KEY}"},
            "models": {NAME: {"name": NAME, "limit": {"context": 1 << 20, "output": 8192}}},
        }
    },
}


def test_opencode(tmp_path: Path) -> None:
    arguments = {"filePath": "WORK/colour.txt", "content": "blue"}
    with agent(tmp_path, "write", arguments) as opencode:
        config = opencode.work / "opencode.json"
        config.write_text(json.dumps(OPENCODE).replace("ADDRESS", opencode.url))
        said = opencode.run(
            *("opencode", "run", ASKED),
            MOE_GGUF_API_KEY=KEY,
            OPENCODE_DISABLE_MODELS_FETCH="1",
        )
        assert SAID in said
        opencode.wrote()
