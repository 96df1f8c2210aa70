"""Open WebUI before our server, with the settings that docs/serving.md gives: the model is on its
list, and an answer comes through it as a stream.

Not part of ``make check``: ``make open-webui`` installs it, 3 GB, in an environment of its own. It
runs without its embedding models, which come from a hub that may not be reachable, and without
signing in.
"""

from __future__ import annotations

import json
import os
import re
import sys
import urllib.request
from pathlib import Path
from typing import Any

from processes import running

ROOT = Path(__file__).parent.parent
OURS, THEIRS = 18091, 18092
QUESTION = {"role": "user", "content": "Why is sleep important?"}
ASKED = {"model": "demo", "messages": [QUESTION], "max_tokens": 24, "temperature": 0.0}


def documented() -> dict[str, str]:
    """The variables that the document has people set."""
    text = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```sh\npip install open-webui\n(.*?)```", text, flags=re.S)
    (line,) = re.findall(r"^export (.*)$", block, flags=re.M)
    settings = dict(word.split("=", 1) for word in line.split())
    return {k: v.replace(":8080", f":{OURS}") for k, v in settings.items()}


def call(port: int, path: str, body: dict[str, Any] | None, key: str) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)
    with urllib.request.urlopen(request) as answer:
        return bytes(answer.read())


def test_it_shows_the_model_and_streams_its_answer(tmp_path: Path) -> None:
    settings = documented()
    key = settings["OPENAI_API_KEY"]
    serve = [sys.executable, "-m", "moe_gguf", "serve", "demo", "--alias", "demo"]
    env = {
        **os.environ,
        **settings,
        **{"HOME": str(tmp_path), "DATA_DIR": str(tmp_path), "WEBUI_SECRET_KEY": "another"},
        **{"WEBUI_AUTH": "False", "OFFLINE_MODE": "true", "BYPASS_EMBEDDING_AND_RETRIEVAL": "true"},
    }
    theirs = [str(ROOT / "build/open-webui/bin/open-webui"), "serve", "--port", str(THEIRS)]
    with (
        running([*serve, "--port", str(OURS), "--api-key", key], f"http://127.0.0.1:{OURS}/health"),
        running(theirs, f"http://127.0.0.1:{THEIRS}/health", env),
    ):
        nobody = {"email": "", "password": ""}
        token = json.loads(call(THEIRS, "/api/v1/auths/signin", nobody, ""))["token"]
        models = json.loads(call(THEIRS, "/api/models", None, token))["data"]
        assert "demo" in [model["id"] for model in models]
        answer = json.loads(call(OURS, "/v1/chat/completions", ASKED, key))
        streamed = call(THEIRS, "/api/chat/completions", {**ASKED, "stream": True}, token)
        assert text_of(streamed.decode()) == answer["choices"][0]["message"]["content"] != ""


def text_of(stream: str) -> str:
    lines = [
        line.removeprefix("data: ") for line in stream.splitlines() if line.startswith("data: ")
    ]
    chunks = [json.loads(line) for line in lines if line != "[DONE]"]
    return "".join(
        choice["delta"].get("content") or ""
        for chunk in chunks
        for choice in chunk.get("choices", [])
    )
