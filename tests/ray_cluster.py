"""Batches on a local Ray cluster of two nodes with one processor each; `make ray` runs it.

Not among `make test`'s: Ray and what it brings take 540 MB and half a minute to start.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.data
import tiny
from ray.cluster_utils import Cluster

from moe_gguf.ray import Engine
from moe_gguf.runtime import ray as ours

OPTIONS: dict[str, Any] = {"memory": "600MB", "n_ctx": 128, "n_threads": 1, "parallel": 2}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    for _ in range(2):
        cluster.add_node(num_cpus=1, memory=3 << 30, object_store_memory=100 << 20)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_tiny("qwen3moe", tmp_path_factory.mktemp("model") / "tiny.gguf")


def read(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]


def asked(custom_id: str, **body: Any) -> str:
    body = {"max_tokens": 4, "temperature": 0, **body}
    return json.dumps({"custom_id": custom_id, "url": "/v1/completions", "body": body})


def test_a_batch_file_over_two_nodes_is_taken_up_again(
    cluster: Cluster, model: Path, tmp_path: Path
) -> None:
    source, folder = tmp_path / "in.jsonl", tmp_path / "out"
    lines = [asked(f"id-{i}", prompt=f"text {i}") for i in range(150)]
    lines[70:70] = ["not json", asked("id-3", prompt="again"), asked("bad", prompt=None)]
    said: list[str] = []
    source.write_text("\n".join(lines[:100]))
    ours.run(cluster.address, model, source, folder, OPTIONS, said.append)
    assert said == ["an engine on each of 2 nodes"]
    first = read(folder)
    assert len(first) == 100
    source.write_text("\n".join(lines))
    command = [sys.executable, "-m", "moe_gguf", "batch", model, source, folder]
    options = ["--memory", "600MB", "--ctx", "128", "--threads", "1", "--parallel", "2"]
    done = subprocess.run(
        [*command, *options, "--ray", cluster.address], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"wrote {folder}: an answer for each line" in done.stderr
    answers = read(folder)
    assert all(one in answers for one in first)
    assert Counter(one["id"] for one in answers).most_common(1)[0][1] == 1
    assert len(answers) == 153
    codes = Counter(one["error"]["code"] for one in answers if one["error"])
    assert codes == {"invalid_json": 1, "duplicate_custom_id": 1}
    statuses = Counter(one["response"]["status_code"] for one in answers if one["response"])
    assert statuses == {200: 150, 400: 1}


def test_rows_of_one_s_own(cluster: Cluster, model: Path) -> None:
    rows = [{"name": f"{i}", "prompt": f"text {i}"} for i in range(5)] + [
        {"name": "too long", "prompt": "word " * 200}
    ]
    answered = ray.data.from_items(rows).map_batches(
        Engine,
        fn_constructor_args=(str(model),),
        fn_constructor_kwargs={"body": {"max_tokens": 3, "temperature": 0}, **OPTIONS},
        batch_size=4,
        compute=ray.data.ActorPoolStrategy(size=1, max_concurrent_calls_per_actor=2),
    )
    found = {row["name"]: row for row in answered.take_all()}
    assert len(found) == 6
    assert json.loads(found["0"]["response"])["body"]["choices"][0]["text"] == found["0"]["text"]
    assert json.loads(found["too long"]["response"])["status_code"] == 400
    assert found["too long"]["text"] is None
