"""What HTTP costs, what a follow-up waits for, and what many clients get, here and elsewhere.

    sudo $(which python) benchmarks/serve.py olmoe.gguf --server .../server/server.py --json FILE

`--server` is llama-cpp-python's example server, in its source distribution; without it only ours
runs. Everything is measured turn about, ``--rounds`` times; the answers are greedy and as long as
asked. Clients are a process of their own. Sections:

    overhead   8 sequences through `Engine` in this process, and as many clients of a server over it
    followup   the time to the first token of a chat of about 3,600 tokens, and of what follows it
    clients    16 clients at once, ours over the other: all in memory, both repacking weights,
               and in a memory cgroup of ``--cap`` of the file (root only), neither doing so: the
               other one would be killed, and mapped it reads its weights from disk for every token,
               so that the answers are short
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moe_gguf import Engine
from moe_gguf.runtime.api.texts import EngineTexts
from moe_gguf.runtime.bench import cgroup, opponent
from moe_gguf.runtime.bench.process import drop_page_cache
from moe_gguf.runtime.bench.prose import passages
from moe_gguf.runtime.bench.results import machine_facts, versions
from moe_gguf.runtime.bench.spec import Spec
from moe_gguf.runtime.engine.schedule import Schedule
from moe_gguf.runtime.errors import UserError
from moe_gguf.runtime.options import Options
from moe_gguf.runtime.server.service import Served, Service
from moe_gguf.runtime.server.serving import Server, listen
from moe_gguf.runtime.server.settings import Settings
from moe_gguf.runtime.system import physical_cores

SECTIONS = ("overhead", "followup", "clients")
SEQUENCES, CLIENTS, PROMPT = 8, 16, 64
CONVERSATION = 3600  # tokens

Job = list[list[int]]  # prompts


# --- one process that asks ----------------------------------------------------------------------


def ask(
    port: int, name: str | None, answer: int, banned: Sequence[int], job: Job
) -> dict[str, Any]:
    """Have all of a job answered at once; what its clients saw."""
    begin = time.perf_counter()
    times = opponent.ask(port, job, answer, banned, name)
    first = [each[0] - begin for each in times]
    tokens = sum(map(len, times))
    job_s = max(each[-1] for each in times) - begin
    return {"tokens": tokens, "job_s": job_s, "tps": tokens / job_s, "first_token_s": first}


def asked(
    port: int, name: str | None, answer: int, banned: Sequence[int], job: Job
) -> dict[str, Any]:
    """The same by another process, whose work does not hold up this one's."""
    what = json.dumps([port, name, answer, list(banned), job])
    command = [sys.executable, __file__, "ask"]
    done = subprocess.run(command, input=what, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# --- overhead -----------------------------------------------------------------------------------


def overhead(args: argparse.Namespace) -> dict[str, Any]:
    jobs, banned = _jobs(args, SEQUENCES, 2 * args.rounds + 2)
    with (
        Engine(
            args.model,
            n_ctx=PROMPT + args.tokens,
            parallel=SEQUENCES,
            schedule=Schedule(SEQUENCES),
            n_threads=args.threads,
            score_rows=1,
            chat=False,
        ) as engine,
    ):
        service = Service(Settings())
        service.open(Served(engine=engine, texts=EngineTexts(engine), name="model"))
        server = Server(service, listen("127.0.0.1", 0))
        port = _port(server.url)
        rounds = []
        for i in range(args.rounds + 1):
            bare = asyncio.run(_bare(engine, jobs.pop(), args.tokens, banned))
            over = asked(port, "model", args.tokens, banned, jobs.pop())["tps"]
            rounds += (
                [{"engine_tps": bare, "http_tps": over}] if i else []
            )  # the first touches memory
            _note(f"overhead: engine {bare:.2f} tok/s, over HTTP {over:.2f}")
        server.stop()
        while server.is_alive:
            server.wait(0.1)
        service.close()
    ratios = [each["http_tps"] / each["engine_tps"] for each in rounds]
    return {"rounds": rounds, "ratio": statistics.median(ratios), "aim": ">= 0.97"}


async def _bare(engine: Engine, job: Job, answer: int, banned: Sequence[int]) -> float:
    begin = time.perf_counter()
    bias = dict.fromkeys(banned, -100.0)
    running = [engine.submit(p, max_tokens=answer, temp=0.0, logit_bias=bias) for p in job]
    results = await asyncio.gather(*(each.wait() for each in running))
    return sum(len(each.tokens) for each in results) / (time.perf_counter() - begin)


# --- a conversation -----------------------------------------------------------------------------


def followup(args: argparse.Namespace) -> dict[str, Any]:
    with _ours(args, None, "--ctx", "4096", "--parallel", "1") as (port, name):
        rounds = []
        for i in range(args.rounds):
            text = f"{i}. " + " ".join(passages(400)[i :: args.rounds])
            text = _cut(port, text, CONVERSATION)
            messages = [{"role": "user", "content": text}]
            first, answer = _chat(port, name, messages)
            messages += [
                {"role": "assistant", "content": answer},
                {"role": "user", "content": "Go on, please."},
            ]
            second, _ = _chat(port, name, messages)
            rounds.append({"first_s": first, "followup_s": second})
            _note(f"followup: first token after {first:.2f} s, then after {second:.2f} s")
    ratios = [each["followup_s"] / each["first_s"] for each in rounds]
    return {"rounds": rounds, "ratio": statistics.median(ratios), "aim": "<= 0.15"}


def _cut(port: int, text: str, n: int) -> str:
    tokens = _post(port, "/tokenize", {"content": text})["tokens"]
    content: str = _post(port, "/detokenize", {"tokens": tokens[:n]})["content"]
    return content


def _chat(port: int, name: str, messages: list[dict[str, str]]) -> tuple[float, str]:
    """Seconds to the first piece of an answer, and the answer."""
    body = {"model": name, "messages": messages, "max_tokens": 16, "temperature": 0.0}
    begin, first, text = time.perf_counter(), 0.0, ""
    for line in _answer(port, "/v1/chat/completions", body | {"stream": True}):
        if line.startswith(b"data: {"):
            choices = json.loads(line[len(b"data: ") :])["choices"]
            delta = choices[0]["delta"] if choices else {}
            piece = delta.get("content") or delta.get("reasoning_content") or ""
            first = first or (time.perf_counter() - begin if piece else 0.0)
            text += piece
    return first, text


def _post(port: int, path: str, body: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(b"".join(_answer(port, path, body)))
    return found


def _answer(port: int, path: str, body: dict[str, Any]) -> Iterator[bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1200.0)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != http.client.OK:
        raise SystemExit(f"{path}: {response.read().decode()[:300]}")
    yield from response


# --- many clients -------------------------------------------------------------------------------


def clients(args: argparse.Namespace) -> dict[str, Any]:
    cap = int(args.cap * args.model.stat().st_size)
    return {
        "resident": _compared(args, None, args.tokens, ">= 1"),
        "capped": _compared(args, cap, args.capped_answer_tokens, ">= 5"),
    }


def _compared(args: argparse.Namespace, cap: int | None, answer: int, aim: str) -> dict[str, Any]:
    jobs, banned = _jobs(args, CLIENTS, args.rounds + 1)
    rounds = []
    for i in range(args.rounds):
        mine = _ours(args, cap, *_room(args))
        found = {"ours": _served(args, mine, jobs, banned, answer, i)}
        if args.server:
            try:
                found["other"] = _served(args, _theirs(args, cap), jobs, banned, answer, i)
            except UserError as error:
                found["other"] = {"failure": str(error)}
        rounds.append(found)
        told = ", ".join(f"{who} {_brief(each)}" for who, each in found.items())
        _note(f"{CLIENTS} clients, {f'in {cap / 1e9:.2f} GB' if cap else 'all in memory'}: {told}")
    document: dict[str, Any] = {"bytes": cap, "answer_tokens": answer, "rounds": rounds}
    document["repacked"] = cap is None
    both = [each for each in rounds if "tps" in each.get("other", {})]
    if both:
        ratios = [each["ours"]["tps"] / each["other"]["tps"] for each in both]
        document |= {"ratio": statistics.median(ratios), "aim": aim}
    return document


def _brief(found: dict[str, Any]) -> str:
    return f"{found['tps']:.2f} tok/s" if "tps" in found else f"fails: {found['failure']}"


def _served(
    args: argparse.Namespace,
    server: contextlib.AbstractContextManager[tuple[int, str | None]],
    jobs: Sequence[Job],
    banned: Sequence[int],
    answer: int,
    i: int,
) -> dict[str, Any]:
    """One job by a fresh server, after a short one of other prompts."""
    drop_page_cache([args.model])
    with server as (port, name):
        asked(port, name, min(answer, 8), banned, jobs[-1])
        return asked(port, name, answer, banned, jobs[i])


def _room(args: argparse.Namespace) -> tuple[str, ...]:
    return ("--ctx", str(PROMPT + args.tokens), "--parallel", str(CLIENTS))


@contextlib.contextmanager
def _ours(args: argparse.Namespace, cap: int | None, *more: str) -> Iterator[tuple[int, str]]:
    path = str(args.model.absolute())
    command = [sys.executable, "-m", "moe_gguf", "serve", path, "--port", "0"]
    command += ["--alias", "model", *more]
    command += ["--memory", str(cap)] if cap else []
    command += ["--threads", str(args.threads)] if args.threads else []
    with contextlib.ExitStack() as stack:
        said = stack.enter_context(tempfile.TemporaryFile("w+"))
        if cap:
            command = stack.enter_context(cgroup.limited(cgroup.Limits(memory=cap))).command(
                command
            )
        process = stack.enter_context(subprocess.Popen(command, stderr=said, text=True))
        stack.callback(process.kill)
        while True:
            said.seek(0)
            log = said.read()
            if found := re.search(r"serving model at http://[^:]*:(\d+)", log):
                yield int(found[1]), "model"
                return
            if process.poll() is not None:
                raise SystemExit(log)
            time.sleep(0.2)


@contextlib.contextmanager
def _theirs(args: argparse.Namespace, cap: int | None) -> Iterator[tuple[int, str | None]]:
    longest = PROMPT + args.tokens
    spec = Spec(
        str(args.model.absolute()),
        args.tokens,
        PROMPT,
        longest,
        args.threads,
        Options(),
        stock=True,
        sequences=CLIENTS,
        server=args.server,
        repack=cap is None,
    )
    threads = args.threads or physical_cores()
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(cgroup.limited(cgroup.Limits(memory=cap))) if cap else None
        server = stack.enter_context(opponent.served(spec, CLIENTS * longest, threads, group))
        yield server.port, None


# --- all of it ----------------------------------------------------------------------------------


def _jobs(args: argparse.Namespace, n: int, count: int) -> tuple[list[Job], list[int]]:
    """Jobs of n distinct prompts each, and the tokens that would end an answer."""
    found, banned = opponent.tokens_of(str(args.model), passages(n * count))
    prompts = [tokens[:PROMPT] for tokens in found]
    return [prompts[i : i + n] for i in range(0, n * count, n)], list(banned)


def _port(url: str) -> int:
    return int(url.split(":")[2].split("/")[0])


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    if sys.argv[1:] == ["ask"]:
        print(json.dumps(ask(*json.load(sys.stdin))))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--server", help="examples/server/server.py of llama-cpp-python's source")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--capped-answer-tokens", type=int, default=8)
    parser.add_argument("--cap", type=float, default=0.6, help="of the file")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    document: dict[str, Any] = {"machine": machine_facts(), "versions": versions()}
    document |= {
        "model": args.model.name,
        "rounds": args.rounds,
        "answer_tokens": args.tokens,
    }
    for name in args.sections.split(","):
        document[name] = {"overhead": overhead, "followup": followup, "clients": clients}[name](
            args
        )
        if args.json:
            args.json.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
