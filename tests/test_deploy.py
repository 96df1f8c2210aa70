"""What is in deploy/ fits this server: metrics of the dashboard, options of the unit and image."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click
import pytest
from prometheus_client.parser import text_string_to_metric_families

from moe_gguf.runtime.cli.main import cli
from moe_gguf.runtime.server import metrics
from moe_gguf.runtime.server.metrics import Metrics

DEPLOY = Path(__file__).parents[1] / "deploy"
# PromQL of the kind that the dashboard is written in, by what may follow what.
TOKEN = re.compile(
    r"""\s+|(?P<name>[a-z_]\w*)|(?P<labels>\{[a-z_]\w*=~?"[^"]*"\})|(?P<range>\[[\w$]+\])"""
    r"""|(?P<number>\d*\.?\d+)|(?P<sign>[-+/*(),])"""
)
FUNCTIONS = {"sum", "by", "rate", "histogram_quantile"}
LABELS = {"le", "status"}


class Everything:
    """An engine that counts all that may be counted."""

    def stats(self) -> dict[str, Any]:
        counted = [*metrics._COUNTERS, *metrics._GAUGES]
        return {**dict.fromkeys(counted, 1), "requests": dict.fromkeys(metrics._REQUESTS, 1)}


def expressions() -> list[str]:
    board = json.loads((DEPLOY / "grafana.json").read_text())
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


def tokens(expression: str) -> list[tuple[str, str]]:
    found, at = [], 0
    while at < len(expression):
        match = TOKEN.match(expression, at)
        assert match, f"not understood: {expression[at:]}"
        if match.lastgroup:
            found.append((match.lastgroup, match[0]))
        at = match.end()
    return found


def exported() -> dict[str, str]:
    """The kind of each sample that /metrics tells."""
    told = Metrics()
    told.watch(Everything())
    told.calls.labels("/", "200").inc()
    families = text_string_to_metric_families(told.text().decode())
    return {sample.name: family.type for family in families for sample in family.samples}


@pytest.mark.parametrize("expression", expressions())
def test_the_dashboard_asks_for_what_is_not_there(expression: str) -> None:
    known, found = exported(), tokens(expression)
    named = [text for kind, text in found if kind == "name" and text not in FUNCTIONS | LABELS]
    assert named
    assert set(named) <= set(known)
    depth = 0
    for _, text in found:
        depth += {"(": 1, ")": -1}.get(text, 0)
        assert depth >= 0
    assert depth == 0
    for i, (_, text) in enumerate(found):
        if text in named:  # a counter's speed is asked for, a gauge's value
            assert found[i + 1][0] == "labels"
            assert (found[i + 2][0] == "range") == (known[text] != "gauge")


def options(command: list[str]) -> None:
    """click's own parser: it ends the process at what it does not know."""
    serve = cli.get_command(click.Context(cli), command[0])
    assert serve is not None
    serve.make_context("serve", command[1:], resilient_parsing=False)


def test_the_unit_and_the_image_start_a_server_that_is_there() -> None:
    (unit,) = re.findall(r"^ExecStart=\S+/moe-gguf (.+)$", read("moe-gguf.service"), flags=re.M)
    options(unit.split())
    (image,) = re.findall(r"^ENTRYPOINT (.+)$", read("Containerfile"), flags=re.M)
    options([*json.loads(image)[1:], "model.gguf", "--memory", "auto"])


def read(name: str) -> str:
    return (DEPLOY / name).read_text(encoding="utf-8")
