"""lm-eval scores texts with our server, and gets the likelihoods that the engine computes.

Not part of ``make check``: ``make lm-eval`` installs it in an environment of its own. Its data are
a file here, since a hub may not be reachable.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from moe_gguf import Engine
from moe_gguf.runtime.cli.model import resolve
from moe_gguf.runtime.engine.request import PromptScored

ROOT = Path(__file__).parent.parent
PORT = 18090
FACTS = [
    ("The capital of France is", [" Paris", " banana", " Tuesday"], 0),
    ("Water is made of hydrogen and", [" iron", " oxygen", " sugar"], 1),
    ("The opposite of hot is", [" green", " loud", " cold"], 2),
    ("The sun rises in the", [" kitchen", " east", " spoon"], 1),
]
TASK = """
task: facts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def test_it_gets_the_engine_s_likelihoods(tmp_path: Path) -> None:
    data = tmp_path / "facts.jsonl"
    names = ("question", "choices", "answer")
    data.write_text("\n".join(json.dumps(dict(zip(names, fact, strict=True))) for fact in FACTS))
    (tmp_path / "facts.yaml").write_text(TASK.format(data=data))
    serve = [sys.executable, "-m", "moe_gguf", "serve", "demo", "--port", str(PORT)]
    server = subprocess.Popen([*serve, "--memory", "500MB"], stderr=subprocess.DEVNULL)
    try:
        wait_until_ready()
        url = f"http://127.0.0.1:{PORT}/v1/completions"
        given = f"model=demo,base_url={url},tokenizer_backend=remote,num_concurrent=4"
        command = [str(ROOT / "build/lm-eval/bin/lm-eval"), "run", "--model", "local-completions"]
        command += ["--model_args", given, "--include_path", str(tmp_path), "--tasks", "facts"]
        command += ["--log_samples", "--output_path", str(tmp_path / "out")]
        offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        subprocess.run(command, check=True, env=offline, timeout=300)
    finally:
        server.terminate()
        server.wait()
    (results,) = tmp_path.rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["facts"]["acc,none"] == 1.0
    (samples,) = tmp_path.rglob("samples_*.jsonl")
    told = {
        sample["doc"]["question"]: [float(answer[0][0]) for answer in sample["resps"]]
        for sample in map(json.loads, samples.read_text().splitlines())
    }
    with Engine(resolve("demo"), chat=False) as engine:
        for question, choices, _ in FACTS:
            own = [likelihood(engine, question, choice) for choice in choices]
            assert told[question] == pytest.approx(own, abs=0.05)


def wait_until_ready() -> None:
    for _ in range(300):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health").close()
            return
        except OSError:
            time.sleep(0.1)
    pytest.fail("the server does not answer")


def likelihood(engine: Engine, question: str, choice: str) -> float:
    """Of a choice's tokens behind those of a question."""
    before = engine.tokenize(question, add_bos=False)
    tokens = engine.tokenize(question + choice, add_bos=False)
    events = list(engine.submit(tokens, max_tokens=0, prompt_logprobs=0))
    (scored,) = (event for event in events if isinstance(event, PromptScored))
    assert scored.logprobs is not None
    return sum(one.logprob for one in scored.logprobs[len(before) - 1 :])
