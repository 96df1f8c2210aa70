"""Bench rows of several sequences: they run, are compared with their like, and are written down.

Numbers are not judged here.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import klotski
import pytest
from conftest import TinyFile

from moe_gguf.runtime.bench import cases, group, process, report, results
from moe_gguf.runtime.bench.process import Run
from moe_gguf.runtime.bench.prose import passages
from moe_gguf.runtime.bench.request import Request
from moe_gguf.runtime.bench.rounds import bench
from moe_gguf.runtime.bench.spec import Spec
from moe_gguf.runtime.errors import UserError
from moe_gguf.runtime.options import Options

CAP = 4_000_000_000  # the process of the tests may have grown by others


@pytest.fixture(scope="module", autouse=True)
def quiet_threads() -> Iterator[None]:
    """Threads that spin on a busy machine make a step of this size take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_WAIT_POLICY", "passive")
        yield


@pytest.fixture(scope="module")
def model(tiny_file: TinyFile) -> Path:
    return tiny_file("qwen3moe")


def spec(model: Path, **change: Any) -> Spec:
    numbers = {"n_predict": 4, "prompt_tokens": 12, "n_ctx": 256, "n_threads": 1, "sequences": 3}
    return Spec(str(model), **{**numbers, "options": Options(memory=CAP), **change})


# --- names --------------------------------------------------------------------------------------


def test_a_row_is_followed_by_how_many_sequences_and_in_which_way() -> None:
    rows = "lru,fate:1-12,stock-resident:3:same,klotski+low:64@some/bundle,fate-whole:2:turns"
    assert cases.parse_rows(rows) == {
        "lru": "",
        **{f"fate:{n}": "" for n in (1, 2, 4, 8, 12)},
        "stock-resident:3:same": "",
        "klotski+low:64@bundle": "some/bundle",
        "fate-whole:2:turns": "",
    }
    row = cases.row_of("klotski+low:64@bundle")
    assert (row.policy, row.low, row.sequences, row.way) == ("klotski", True, 64, "")
    row = cases.row_of("fate-whole:2:turns")
    assert (row.policy, row.whole, row.sequences, row.way) == ("fate", True, 2, "turns")


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ("fate:", "how many sequences, 1 to 256, or a range like 1-64"),
        ("fate:0", "how many sequences"),
        ("fate:9-3", "how many sequences"),
        ("fate:1-999", "how many sequences"),
        ("fate:4:twice", "behind the second colon stands turns, plan, same or score"),
        ("stock-mmap:4:plan", "behind the second colon stands same or score"),
        ("fat:4", "there is no row 'fat'"),
    ],
)
def test_refused(rows: str, sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        cases.parse_rows(rows)


def test_no_prompt_begins_another() -> None:
    texts = passages(144)
    assert len({text[:40] for text in texts}) == len(texts)


def test_the_preset_names_rows_that_exist() -> None:
    for section in klotski.SECTIONS.values():
        named = section.rows.replace("{n}", "8").replace(klotski.BUNDLE, "b")
        assert cases.parse_rows(named)
    for aim in klotski.AIMS:
        for row in filter(None, (aim.row, aim.over)):
            assert cases.parse_rows(row.replace("{n}", "8").replace(klotski.BUNDLE, "b"))


# --- runs ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("known_disk")
def test_groups_are_measured_and_shown(model: Path, tmp_path: Path) -> None:
    rows = "stock-resident:2-3,fate:2,fate-whole:3:turns"
    request = Request(
        model,
        "400MB",
        rows=rows,
        repeat=1,
        n_predict=4,
        prompt_tokens=12,
        n_ctx=256,
        n_threads=1,
        json_file=str(tmp_path / "r.json"),
        plot_file=str(tmp_path / "r.png"),
    )
    outcome = bench(request, note=lambda _: None)
    document = json.loads((tmp_path / "r.json").read_text())
    found = {row["row"]: row for row in document["rows"]}
    for name, row in found.items():
        assert row["failure"] is None, name
        n = int(name.split(":")[1])
        (run,) = row["runs"]
        assert (run["prompt_tokens"], run["answer_tokens"]) == (12 * n, 4 * n), name
        assert run["steps"]["answers"]["rows"] <= 3 * n, name  # first tokens come with the prompts
        for key in ("job_tps", "prefill_tps", "first_token_p95_s", "between_tokens_p50_s"):
            assert run[key] > 0, (name, key)
        assert "answers" not in run
        if row["policy"]:
            assert 4 <= run["distinct_experts"] <= 12, name
            assert row["job_of_stock_resident"] > 0, name
            assert 0.0 <= row["agreement"] <= 1.0, name
    assert found["fate-whole:3:turns"]["runs"][0]["distinct_experts"] == 4.0  # of one at a time
    assert found["fate:2"]["bound_row"] == "stock-resident:2"  # never that of another size
    text = report.table(document)
    assert "rows of N sequences: N prompts of 12 tokens and answers of 4" in text
    assert "between tokens s p50/p95" in text
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert not outcome.errors


@pytest.mark.usefixtures("known_disk")
def test_scores_are_those_of_stock(model: Path) -> None:
    stock = group.measure(spec(model, way="score", stock=True))
    ours = group.measure(spec(model, way="score"))
    assert ours["logprob_mean"] == pytest.approx(stock["logprob_mean"], abs=1e-3)
    assert ours["answer_tokens"] == 0
    assert ours["plan"]["parallel"] >= 1
    assert "decode_tps" not in ours
    assert report.speed_of(ours) == ours["prefill_tps"]


def test_one_prompt_n_times_wants_fewer_experts(model: Path) -> None:
    """Those of one, unless two of a tiny model's logits are so close that places in the memory
    decide, and an answer goes its own way."""
    same, others = (group.measure(spec(model, way=way)) for way in ("same", ""))
    assert len({tuple(answer) for answer in same["answers"]}) <= 2
    assert 4.0 <= same["distinct_experts"] < 7.0 < others["distinct_experts"]


def test_a_group_too_large_for_the_cap_is_left_out_in_words(model: Path) -> None:
    result = group.measure(spec(model, options=Options(memory=50_000_000), sequences=2))
    run = process._judge(0, json.dumps(result), "", None)
    assert run.failure is not None
    assert run.failure.startswith(f"{process.LEFT_OUT}: 50.0 MB of memory is too little")
    point = results.point_of({"fate:2": [run]}, CAP)
    assert results.errors_of([point]) == []


def test_a_loop_of_stock_that_thrashes_is_cut_off(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group, "DECODE_LIMIT_S", 0.0)
    result = group.measure(spec(model, stock=True, n_predict=30))
    assert result["answer_tokens"] == 3 * 2


# --- the other engine ---------------------------------------------------------------------------

SERVER = """
import http.server, json, sys
config = json.load(open(sys.argv[2]))

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200), self.end_headers()
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert len(body["prompt"]) <= 12 and body["stream"] and body["logit_bias"]
        self.send_response(200), self.end_headers()
        for end in [None] * body["max_tokens"] + ["length"]:
            choice = {"text": "a", "finish_reason": end}
            self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\\n\\n".encode())
        self.wfile.write(b"data: [DONE]\\n\\n")
    def log_message(self, *_): ...

assert config["model"]["n_seq_max"] == 3
where = config["server"]["host"], config["server"]["port"]
http.server.ThreadingHTTPServer(where, Handler).serve_forever()
"""


def test_a_server_is_asked_and_its_answers_are_timed(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "server.py"
    file.write_text(SERVER)
    result = group.measure(spec(model, stock=True, server=str(file)))
    assert (result["prompt_tokens"], result["answer_tokens"]) == (36, 12)
    assert result["job_tps"] > 0
    assert result["first_token_p50_s"] > 0


def test_a_server_that_does_not_come_up_is_said(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "server.py"
    file.write_text("raise SystemExit('no such module')")
    with pytest.raises(UserError, match=r"server.py does not come up: no such module"):
        group.measure(spec(model, stock=True, server=str(file)))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rows": "stock-server:4"}, "server names the file .* give both, or neither"),
        ({"rows": "lru", "server": "s.py"}, "give both, or neither"),
        ({"rows": "stock-server:4", "server": "/nowhere/s.py"}, "is not there: it is part of"),
        ({"rows": "stock-server"}, "stock-server is for several sequences"),
        ({"rows": "stock-server:4:same"}, "it knows no ways"),
    ],
)
def test_a_server_refused(model: Path, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        bench(Request(model, "400MB", **change), note=pytest.fail)


# --- what is concluded --------------------------------------------------------------------------


def result(tps: float, answers: list[list[int]], **more: Any) -> Run:
    numbers = {"decode_tps": tps, "job_tps": tps / 2, "rss_peak_bytes": 1, "threads": 1}
    return Run({**numbers, "answers": answers, **more}, None)


def test_groups_are_compared_with_stock_of_their_size() -> None:
    runs = {
        "stock-resident": [Run({"decode_tps": 1.0, "tokens": [1], "rss_peak_bytes": 1,
                                "threads": 1}, None)],
        "stock-resident:2": [result(10.0, [[1, 2], [3, 4]])],
        "stock-mmap:2": [result(1.0, [[1, 2], [3]])],
        "stock-resident:4": [result(20.0, [[1]] * 4)],
        "fate:2:plan": [result(8.0, [[1, 2], [3, 5]], bytes_per_token=10.0)],
    }  # fmt: skip
    point = results.point_of(runs, CAP, 1000.0)
    row = point.rows[-1]
    assert (row.of_stock_resident, row.x_stock_mmap, row.job_of_stock_resident) == (0.8, 8.0, 0.8)
    assert row.agreement == 0.75
    assert point.rows[2].agreement == 1.0  # as far as it came
    assert (row.identical, row.reference) == (None, None)
    assert row.bound_row == "stock-resident:2"
    assert row.of_disk_bound == pytest.approx(0.08)


def test_what_the_preset_says_of_its_aims() -> None:
    args = argparse.Namespace(scored=8, bundle=None)
    median = {"decode_tps": 46.0, "job_tps": 45.0, "stall_share": 0.0}
    rows = [
        {"row": "fate:64:plan", "failure": None, "median": median},
        {"row": "stock-resident:64", "failure": None, "median": {**median, "decode_tps": 50.0}},
        {"row": "fate:1", "failure": "killed", "median": {}},
    ]
    point = {"memory_bytes": CAP, "rows": rows}
    lines = [line.split() for line in klotski.told(point, args, is_small=False).splitlines()]
    ends = [(line[-3], " ".join(line[-2:])) for line in lines[2:]]
    assert ends == [("at", "least 0.92"), ("at", "least 0.92"), ("at", "most 0.05")]
    assert [line[-4] for line in lines[2:]] == ["0.920", "1.000", "0.000"]
    small = klotski.told(point, args, is_small=True)
    assert small.count("at least 0.80") == 2
    assert "most" not in small
