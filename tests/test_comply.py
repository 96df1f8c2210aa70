"""The protocols' conformance as others test it, over a scripted engine whose model can do all."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
from service import NAME, service


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with service() as (_, url):
        yield url


@pytest.mark.parametrize(
    ("form", "n"), [("openai-chat", 9), ("open-responses", 13), ("anthropic", 9)]
)
def test_llm_comply(url: str, form: str, n: int) -> None:
    more = ["--auth-header", "x-api-key", "--no-bearer", "-H", "anthropic-version:2023-06-01"]
    command = [sys.executable, "-m", "llm_comply.cli", "--format", form, "-u", f"{url}/v1"]
    command += ["-k", "x", "-m", NAME, "--json", *(more if form == "anthropic" else [])]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    results = json.loads(run.stdout)["results"]
    assert [one for one in results if one["status"] != "passed"] == []
    assert [one for one in results if one.get("warnings") and form != "open-responses"] == []
    assert len(results) == n
