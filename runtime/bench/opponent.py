"""The row of another engine: llama-cpp-python's own example server, which batches too.

The server's file is named by whoever runs it (`examples/server/server.py` of the source
distribution); it runs on the llama.cpp that we run on, with its own defaults but for context,
sequences and threads, and where asked without repacking weights, which it has no option for. Its
steps are not seen, only what its clients are told.
"""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError
from .cgroup import Group
from .spec import Spec

_OPEN_S = 300.0  # until it answers
_REQUEST_S = 1200.0
# Runs a file of which llama.cpp keeps the weights as they are mapped.
_PLAINLY = """
import runpy, sys
import llama_cpp.llama_cpp as llama_cpp
made = llama_cpp.llama_model_default_params
def plain():
    params = made()
    params.use_extra_bufts = False
    return params
llama_cpp.llama_model_default_params = plain
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Served(NamedTuple):
    """A server that answers."""

    port: int
    process: subprocess.Popen[str]

    @property
    def peak_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024


def tokens_of(model: str, texts: Sequence[str]) -> tuple[list[list[int]], list[int]]:
    """The texts' tokens, and the tokens with which the model ends; no weight is loaded."""
    import llama_cpp
    import llama_cpp._logger

    from ..vocab import Vocabulary

    llama_cpp._logger.set_verbose(False)
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    loaded = llama_cpp.llama_model_load_from_file(model.encode(), params)
    if not loaded:
        raise UserError(f"llama.cpp cannot load {model}")
    try:
        vocabulary = Vocabulary(llama_cpp.llama_model_get_vocab(loaded))
        found = [vocabulary.tokenize(text.encode(), vocabulary.adds_bos) for text in texts]
        return found, vocabulary.ending_tokens
    finally:
        llama_cpp.llama_model_free(loaded)


@contextmanager
def served(
    spec: Spec, n_cells: int, n_threads: int, group: Group | None = None
) -> Iterator[Served]:
    """Inside a cgroup, if one is given. UserError where it does not come up, with the last that it
    said."""
    assert spec.server is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    config = {
        "server": {"host": "127.0.0.1", "port": port},
        "model": {
            "path": spec.model,
            "n_ctx": n_cells,
            "n_seq_max": spec.sequences,
            "threads": n_threads,
            "threads_batch": n_threads,
            "flash_attn": True,
        },
    }
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+") as said:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(config))
        plainly = [] if spec.repack else ["-c", _PLAINLY]
        command = [sys.executable, *plainly, spec.server, "-C", str(file)]
        command = command if group is None else group.command(command)
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, text=True
        ) as process:
            try:
                if not _comes_up(process, port):
                    said.seek(0)
                    last = said.read().strip().splitlines()[-1:]
                    raise UserError(
                        f"{spec.server} does not come up: {''.join(last) or 'it ended'}"
                    )
                yield Served(port, process)
            finally:
                process.kill()


def _comes_up(process: subprocess.Popen[str], port: int) -> bool:
    deadline = time.perf_counter() + _OPEN_S
    while process.poll() is None and time.perf_counter() < deadline:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5.0)
            connection.request("GET", "/healthz")
            if connection.getresponse().status == http.client.OK:
                return True
        except OSError:
            pass
        time.sleep(0.1)
    return False


def ask(
    port: int,
    prompts: Sequence[Sequence[int]],
    answer: int,
    banned: Sequence[int],
    model: str | None = None,
) -> list[list[float]]:
    """Have all answered at once; when each piece of each answer came. ``model`` is named to a
    server that wants to hear it."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        asked = [pool.submit(_ask_one, port, p, answer, banned, model) for p in prompts]
        return [each.result() for each in asked]


def _ask_one(
    port: int, prompt: Sequence[int], answer: int, banned: Sequence[int], model: str | None
) -> list[float]:
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": answer,
        "temperature": 0.0,
        "stream": True,
        "logit_bias": {str(token): -100.0 for token in banned},
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_REQUEST_S)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    response = connection.getresponse()
    if response.status != http.client.OK:
        raise UserError(f"the server refuses a request: {response.read().decode()[:300]}")
    times = []
    for line in response:
        if line.startswith(b"data: {"):
            chunk: dict[str, Any] = json.loads(line[len(b"data: ") :])
            if chunk.get("choices") and not chunk["choices"][0].get("finish_reason"):
                times.append(time.perf_counter())
    return times
