"""The dashboard's panels asked of a Prometheus that watches a server at work: each says something.

Not part of ``make check``: it needs a ``prometheus`` on the path or named in $PROMETHEUS (on
Debian: ``apt-get install prometheus``). What Grafana makes of the answers is not seen here.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from processes import running
from test_deploy import expressions

OURS, THEIRS = 18093, 18094
OURS_URL, THEIRS_URL = f"http://127.0.0.1:{OURS}", f"http://127.0.0.1:{THEIRS}"
SMALL = ("--memory", "450MB", "--reads", "direct")  # so that it reads, and guesses
SETTINGS = f"""
global: {{scrape_interval: 1s}}
scrape_configs:
  - job_name: moe-gguf
    static_configs: [{{targets: ["127.0.0.1:{OURS}"]}}]
"""


def get(url: str, **query: str) -> Any:
    with urllib.request.urlopen(f"{url}?{urllib.parse.urlencode(query)}") as answer:
        return json.load(answer)


def chat() -> None:
    """As two people do: questions whose starts are known, and whose answers need the disk."""
    for question in ("Why is sleep important?", "Why is the sky blue?"):
        messages = [{"role": "user", "content": question}]
        body = json.dumps({"model": "demo", "messages": messages, "max_tokens": 32}).encode()
        head = {"Content-Type": "application/json"}
        urllib.request.urlopen(
            urllib.request.Request(f"{OURS_URL}/v1/chat/completions", body, head)
        ).close()


def test_each_panel_says_something(tmp_path: Path) -> None:
    prometheus = os.environ.get("PROMETHEUS") or shutil.which("prometheus")
    if prometheus is None:
        pytest.fail("there is no prometheus, on the path or in $PROMETHEUS")
    settings = tmp_path / "prometheus.yml"
    settings.write_text(SETTINGS)
    serve = [sys.executable, "-m", "moe_gguf", "serve", "demo", "--alias", "demo"]
    watch = [prometheus, f"--config.file={settings}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    with (
        running([*serve, "--port", str(OURS), *SMALL], f"{OURS_URL}/health"),
        running([*watch, f"--web.listen-address=127.0.0.1:{THEIRS}"], f"{THEIRS_URL}/-/ready"),
    ):
        for _ in range(3):
            chat()
            time.sleep(2.0)
        silent = []
        for expression in expressions():
            query = expression.replace("$job", ".*").replace("$__rate_interval", "1m")
            found = get(f"{THEIRS_URL}/api/v1/query", query=query)["data"]["result"]
            if not found or not all(math.isfinite(float(each["value"][1])) for each in found):
                silent.append((query, found))
        assert not silent
