"""What a device is worth: stock llama.cpp and ours on one GPU, identity first, then speed.

    python benchmarks/gpu.py identity --device cuda0
    python benchmarks/gpu.py rows model.gguf --device cuda0 --json gpu.json

``identity`` holds tiny models of every layout against stock on the same device: decoding,
windows and layers that are wholly there to the last bit. Events in pieces and experts on the
processor are told by their error, beside that of stock against itself when it computes a prompt in
pieces (``stock``). ``rows``
runs each row in a process of its own and writes the document anew after each, so that one that is
cut short keeps what it has; it ends before ``--deadline`` seconds are over. Rows:

    ceiling           copies of 64 MB from pinned memory to the device, nothing else
    stock             every weight on the device
    stock-cpu         experts on the processor, in pinned memory; steps of 32 tokens and more are
                      offloaded, so 32 sequences are copied to the device as prompts are
    stock-cpu-host    the same without offloading
    stock-cpu@SHARE   stock, that share of the layers with their experts on the device
    POLICY@SHARE      ours: that share of the experts on the device, divided among layers as ever,
                      the rest in pinned memory; POLICY@SHARE/even gives each layer that share,
                      POLICY@SHARE/cold starts with an empty memory,
                      POLICY@SHARE/auto has the processor compute some of those missing,
                      POLICY@SHARE/asked copies nothing to the device before it is asked for,
                      POLICY@SHARE/ahead does so whether it pays or not,
                      POLICY@SHARE/window has one window instead of two,
                      POLICY@SHARE/apart copies every matrix by itself, and
                      POLICY@SHARE/traced besides says when the device computed and when it was
                      copied to, by CUDA's tracing, which torch brings
    POLICY@all        ours: every expert on the processor

Every row decodes one sequence, then several, then reads a long prompt; all do the same steps.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from gpu_trace import traced

from moe_gguf.policies import presets
from moe_gguf.policies.base import Phase
from moe_gguf.policies.copying import IdleLink
from moe_gguf.policies.presets import Facts, Policy, PolicyMaker
from moe_gguf.policies.tiers import Tiers
from moe_gguf.runtime import logs, opening
from moe_gguf.runtime.arena import Arena, start
from moe_gguf.runtime.bench.results import machine_facts, versions
from moe_gguf.runtime.budget import DeviceBudget, pool_slots
from moe_gguf.runtime.engine.context import Context, Logits, Row
from moe_gguf.runtime.formats.open import read_layout
from moe_gguf.runtime.options import Options
from moe_gguf.runtime.params import ContextShape, ModelParams
from moe_gguf.runtime.placement import expert_bytes
from moe_gguf.runtime.plugin.devices import Device, address, choose
from moe_gguf.runtime.plugin.library import load
from moe_gguf.runtime.stats import Meter

ROWS = "ceiling,stock,stock-cpu,fate@0.4,fate@0.1,fate@0.8,load-on-demand@0.4,eap@0.4,"
ROWS += "stock-cpu@0.8,stock-cpu@0.4,fate@0.8/even,fate@0.9,stock-cpu@0.9,"
ROWS += "fate@0.4/apart,fate@0.4/asked,fate@0.4/auto,stock-cpu-host,fate@all,fate@0.2,fate@0.6,"
ROWS += "lru@0.4,fate@0.4/cold"
COPY_BYTES = 64 << 20
N_IDENTITY = 16  # tokens, one by one
N_TRACED = 8  # tokens
N_BATCH, N_BATCH_WARM = 16, 20  # steps of several sequences, after so many
PIECE = 5  # tokens of a prompt that stock computes in pieces


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure a device.")
    parser.add_argument("what", choices=("identity", "rows", "row"))
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--module", type=Path, help="a library of ggml's to load the device from")
    parser.add_argument("--rpc", help="HOST:PORT of a server, with ggml's RPC module as --module")
    parser.add_argument("--ubatch", type=int, default=512, help="of identity")
    parser.add_argument("--layouts", nargs="*", help="likewise; default: all")
    parser.add_argument("--memory", default="auto")
    parser.add_argument("--reads", default="auto")
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--row")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, help="folder for the reference logits")
    parser.add_argument("--deadline", type=float, default=3600.0)
    parser.add_argument("--row-seconds", type=float, default=120.0)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--sequences", type=int, nargs="*", default=[8, 32])
    parser.add_argument("--traces", type=Path, help="JSON file of what the device did when")
    args = parser.parse_args(argv)
    if args.what == "rows":
        return run_rows(args)
    load()
    if args.module is not None:
        library = llama_cpp.llama_cpp._lib
        with logs.capture():
            if not library.ggml_backend_load(str(args.module).encode()):
                parser.error(f"ggml does not take {args.module}")
            if args.rpc:
                add_server(args.module, args.rpc)
    device = choose(args.device)
    if device is None:
        parser.error("there is no GPU here")
    document = (
        identity(device, args.ubatch, args.layouts)
        if args.what == "identity"
        else run_row(args, device)
    )
    print(json.dumps(document), flush=True)
    return 0 if document.get("ok", True) else 1


def add_server(module: Path, endpoint: str) -> None:
    """Make a server's devices known to this process's ggml."""
    rpc, library, handle = ctypes.CDLL(str(module)), llama_cpp.llama_cpp._lib, ctypes.c_void_p
    rpc.ggml_backend_rpc_add_server.restype = handle
    rpc.ggml_backend_rpc_add_server.argtypes = [ctypes.c_char_p]
    library.ggml_backend_register.argtypes = [handle]
    server = rpc.ggml_backend_rpc_add_server(endpoint.encode())
    if not server:
        raise SystemExit(f"no server answers at {endpoint}")
    library.ggml_backend_register(server)


# --- rows, each in a process --------------------------------------------------------------------


def run_rows(args: argparse.Namespace) -> int:
    started = time.monotonic()
    document: dict[str, Any] = {"machine": machine_facts(), "versions": versions(), "rows": {}}
    document["arguments"] = {k: str(v) for k, v in vars(args).items()}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.rows.split(","):
            left = args.deadline - (time.monotonic() - started)
            if left < 15:
                document["rows"][name] = {"skipped": "no time left"}
                continue
            began = time.monotonic()
            document["rows"][name] = child(args, name, Path(folder), min(left, args.row_seconds))
            document["rows"][name]["seconds"] = time.monotonic() - began
            print(f"{name}: {brief(document['rows'][name])}", file=sys.stderr, flush=True)
            if args.json is not None:
                args.json.write_text(json.dumps(document, indent=1))
    print(json.dumps(document))
    return 0


def child(args: argparse.Namespace, name: str, folder: Path, seconds: float) -> dict[str, Any]:
    command = [sys.executable, __file__, "row", str(args.model), "--row", name, "--work", folder]
    command += ["--device", args.device, "--memory", args.memory, "--reads", args.reads]
    command += ["--tokens", str(args.tokens), "--prompt", str(args.prompt)]
    command += ["--sequences", *map(str, args.sequences)]
    if args.module is not None:
        command += ["--module", args.module]
    if args.rpc:
        command += ["--rpc", args.rpc]
    if args.traces is not None:
        command += ["--traces", args.traces]
    try:
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, timeout=seconds, check=False
        )
        out, err = done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        said = (late.stdout or b"", late.stderr or b"")
        out, err = (t if isinstance(t, str) else t.decode(errors="replace") for t in said)
        err += f"\nno more after {seconds:.0f} s"
    documents = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    merged: dict[str, Any] = {}
    for document in documents:
        merged |= document
    if not merged.get("complete"):
        merged["error"] = err[-1500:]
    return merged


def brief(row: dict[str, Any]) -> str:
    names = ("gb_per_s", "identical", "decode_tps", "hit_rate", "open_s", "error")
    parts = [f"{k} {row[k]:.4g}" if isinstance(row[k], float) else f"{k} {row[k]}"
             for k in names if k in row]  # fmt: skip
    speeds = [(k, v) for k, v in row.items() if k.startswith(("batch_", "prefill_"))]
    parts += [f"{k} {v:.4g}" for k, v in speeds if k.endswith("_tps")]
    return ", ".join(parts)[:600]


def run_row(args: argparse.Namespace, device: Device) -> dict[str, Any]:
    if args.row == "ceiling":
        return {"device": device._asdict(), "gb_per_s": ceiling(device) / 1e9, "complete": True}
    began = time.monotonic()
    is_stock = args.row.startswith("stock")
    opened = stock(args, device) if is_stock else ours(args, device)
    with opened as runner:
        tell(open_s=time.monotonic() - began, **runner.facts())
        runner.identity(args.work)
        runner.decode(args.tokens)
        if args.row.endswith("/traced"):
            runner.trace(args.tokens, args.traces)
        for n in args.sequences:
            runner.batch(n)
        for n_ubatch in sorted({min(512, args.prompt), args.prompt}):
            runner.use(n_ubatch)
            runner.prefill(args.prompt, f"prefill_{n_ubatch}_")
    return {"complete": True}


def tell(**values: Any) -> None:
    """Part of a row's document, kept even if the rest never comes."""
    print(json.dumps(values), flush=True)


class Runner:
    """The steps of a row, on a model that is open."""

    def __init__(self, model: Any, arena: Arena | None, shape: ContextShape, opoff: bool) -> None:
        self.model = model
        self.params = shape.params()
        self.params.op_offload = opoff
        self.arena = arena
        self.meter = None if arena is None else Meter(arena)
        self.context: Context | None = None
        self.use(min(512, self.params.n_batch))

    def use(self, n_ubatch: int) -> None:
        """A fresh context that computes so many tokens at once."""
        self.close()
        self.params.n_ubatch = n_ubatch
        self.context = Context(self.model, self.params, self.arena, self.meter)
        self.memory = llama_cpp.llama_get_memory(self.context.ctx)
        self.n_vocab = self.context.n_vocab

    def close(self) -> None:
        if self.context is not None:
            self.context.close()
            self.context = None

    def facts(self) -> dict[str, Any]:
        if self.arena is None:
            return {}
        ways = {True: "joined", False: "apart"}
        copies = {f"copy_us_{ways[way]}": ns / 1e3 for way, ns in self.arena.copy_ns.items()}
        plugin = self.arena.plugin
        return {"mode_line": self.arena.mode_line(), "is_pinned": plugin.is_pinned, **copies}

    def reset(self) -> None:
        llama_cpp.llama_memory_clear(self.memory, True)
        if self.meter is not None:
            self.meter.reset()

    def step(self, rows: list[Row], phase: Phase) -> Logits:
        assert self.context is not None
        return self.context.decode(rows, phase)

    def identity(self, folder: Path) -> None:
        """Tokens one by one: stock's logits are kept, ours compared."""
        self.reset()
        tokens = self.tokens(N_IDENTITY, seed=3)
        got = np.concatenate([self.step([Row(t, i)], Phase.DECODE) for i, t in enumerate(tokens)])
        kept = folder / "stock.npy"
        if not kept.exists():
            np.save(kept, got)
            return
        expected = np.load(kept)
        error = float(((got - expected) ** 2).sum() / (expected**2).sum())
        same = bool((got.argmax(-1) == expected.argmax(-1)).all())
        tell(identical=bool(np.array_equal(got, expected)), nmse=error, same_tokens=same)

    def tokens(self, n: int, seed: int = 1) -> list[int]:
        known = min(self.n_vocab - 8, 32_000)
        return [int(t) for t in np.random.default_rng(seed).integers(260, known, n)]

    def decode(self, n: int) -> None:
        self.reset()
        prompt = self.tokens(64)
        logits = self.step([Row(t, i, 0, i == 63) for i, t in enumerate(prompt)], Phase.PREFILL)
        tokens, times = [], []
        for i in range(n):
            if i == n // 3 and self.meter is not None:
                self.meter.reset()
            token = int(logits[-1].argmax())
            tokens.append(token)
            began = time.perf_counter()
            logits = self.step([Row(token, 64 + i)], Phase.DECODE)
            times.append(time.perf_counter() - began)
        warm = times[n // 3 :]
        tell(decode_tps=len(warm) / sum(warm), decode_median_ms=1e3 * statistics.median(warm))
        tell(tokens=tokens)
        self.counted("")

    def trace(self, n_before: int, path: Path | None) -> None:
        """What the device does in some tokens after so many."""
        token = self.tokens(1)[0]
        at = itertools.count(64 + n_before)
        figures, lanes = traced(lambda: self.step([Row(token, next(at))], Phase.DECODE), N_TRACED)
        tell(**figures, traced_tokens=N_TRACED)
        if path is not None:
            path.write_text(json.dumps(lanes))

    def counted(self, prefix: str) -> None:
        if self.meter is None:
            return
        names = ("hits", "misses", "hit_rate", "uploads", "uploads_ahead", "bytes_uploaded")
        names += ("device_waits", "device_passed", "device_wait_s")
        names += ("cpu_experts", "cpu_pairs", "cpu_s")
        names += ("bytes_read", "route_s", "guess_s", "tell_s", "stall_s", "rss_peak_bytes")
        table = self.meter.table()
        tell(**{prefix + name: table[name] for name in names})
        residency = self.arena.controller.residency if self.arena is not None else None
        if isinstance(residency, Tiers):
            used = sum(pool.guesses_used for pool in residency.pools.values())
            copying = residency.copying
            on = isinstance(copying, IdleLink) and copying.trial.is_on
            tell(**{f"{prefix}copies_used": used, f"{prefix}copies_on": on})

    def batch(self, n: int) -> None:
        """So many sequences, a token of each per step."""
        self.reset()
        starts = [self.tokens(4, seed=10 + s) for s in range(n)]
        rows = [Row(t, i, s, i == 3) for s, ts in enumerate(starts) for i, t in enumerate(ts)]
        logits = self.step(rows, Phase.PREFILL)
        times = []
        for i in range(N_BATCH + N_BATCH_WARM):
            if i == N_BATCH_WARM and self.meter is not None:
                self.meter.reset()
            rows = [Row(int(logits[s].argmax()), 4 + i, s) for s in range(n)]
            began = time.perf_counter()
            logits = self.step(rows, Phase.DECODE)
            times.append(time.perf_counter() - began)
        tell(**{f"batch_{n}_tps": n * N_BATCH / sum(times[N_BATCH_WARM:])})
        self.counted(f"of_{n}_")

    def prefill(self, n: int, prefix: str) -> None:
        """A prompt, twice; the second counts."""
        seconds = 0.0
        for seed in (1, 2):
            self.reset()
            rows = [Row(t, i, 0, i == n - 1) for i, t in enumerate(self.tokens(n, seed))]
            began = time.perf_counter()
            self.step(rows, Phase.PREFILL)
            seconds = time.perf_counter() - began
            tell(**{f"{prefix}tps": n / seconds})
        self.counted(prefix)


def shape_of(args: argparse.Namespace) -> ContextShape:
    n = max([1, *args.sequences])
    return ContextShape(
        max(4096, 256 * n), args.prompt, n_outputs=n, n_seq_max=n, kv_unified=True, flash_attn=True
    )


class BuftOverride(ctypes.Structure):
    """llama_model_tensor_buft_override."""

    _fields_ = [("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p)]


@contextlib.contextmanager
def stock(args: argparse.Namespace, device: Device) -> Iterator[Runner]:
    library = llama_cpp.llama_cpp._lib
    handle = ctypes.c_void_p
    library.ggml_backend_cpu_buffer_type.restype = handle
    params = llama_cpp.llama_model_default_params()
    devices = (handle * 2)(address(device.name), None)
    params.devices = ctypes.cast(devices, handle).value
    params.n_gpu_layers, params.load_mode = 999, llama_cpp.LLAMA_LOAD_MODE_NONE
    if args.row != "stock":
        cpu = library.ggml_backend_cpu_buffer_type()
        layers = [layer.layer for layer in read_layout(args.model).layers]
        share = float(args.row.partition("@")[2] or 0)
        numbers = "|".join(map(str, layers[: len(layers) - round(share * len(layers))]))
        pattern = rf"blk\.({numbers})\.ffn_.*_exps".encode()
        overrides = (BuftOverride * 2)(BuftOverride(pattern, cpu), BuftOverride(None, None))
        params.tensor_buft_overrides = ctypes.cast(overrides, handle).value
    with logs.capture() as log:
        model = llama_cpp.llama_model_load_from_file(str(args.model).encode(), params)
    if not model:
        raise SystemExit(log.reason())
    runner = Runner(model, None, shape_of(args), opoff=args.row != "stock-cpu-host")
    try:
        yield runner
    finally:
        runner.close()
        llama_cpp.llama_model_free(model)


@contextlib.contextmanager
def ours(args: argparse.Namespace, device: Device) -> Iterator[Runner]:
    policy, _, rest = args.row.partition("@")
    share, _, how = rest.partition("/")
    mode = "all" if share == "all" else "auto" if how == "auto" else "off"
    options = Options(args.memory, policy, args.reads, device=device.name, cpu_experts=mode)
    found = opening.find(args.model, options)
    layout, placement = found.layout, found.placement
    assert placement is not None
    shape = shape_of(args)
    params = ModelParams().params
    with contextlib.closing(found.bind()) as binding:
        measured = opening.measure(found, binding, params, shape.params())
        loaded = opening.load(measured, binding, params)
        layers = {layer.layer: expert_bytes(layer) for layer in placement.layers(layout)}
        n = max(found.n_used, round(float(share) * layout.n_experts)) if layers else 0
        room = n * sum(layers.values())
        slots = pool_slots(room, layers, layout.n_experts, found.n_used)
        pools = DeviceBudget(
            device.free,
            measured.on_device,
            dict.fromkeys(layers, n) if how == "even" else slots,
            layers,
            layout.n_experts,
            max(layers.values(), default=0) * layout.n_experts,
            1 if how == "window" else 2,
        )
        arena = start(loaded, pools=pools, make_policy=in_pools(policy))
        residency = arena.controller.residency
        if how == "asked" and isinstance(residency, Tiers):
            residency.copying = None
        copying = residency.copying if isinstance(residency, Tiers) else None
        if how in ("ahead", "traced") and isinstance(copying, IdleLink):
            copying.trial.step = lambda ns: None  # type: ignore[method-assign]
        if how == "apart":
            arena.plugin.join_copies(False)
        if how != "cold":
            numbers = [layer.layer for layer in layout.layers]
            order = itertools.product(range(layout.n_experts), numbers)
            tell(filled=arena.fill(layer * layout.n_experts + expert for expert, layer in order))
        runner = Runner(loaded.model, arena, shape, opoff=True)
        try:
            yield runner
        finally:
            runner.close()
            llama_cpp.llama_model_free(loaded.model)
    arena.close()


def in_pools(name: str) -> PolicyMaker:
    """The policy of that name; one that keeps nothing does so on the device alone: in every row
    memory holds what it has room for."""

    def make(facts: Facts) -> Policy:
        is_memory = len(facts.layers) > 1
        return presets.policy("lru" if is_memory and name == "load-on-demand" else name, facts)

    return make


def ceiling(device: Device) -> float:
    """Bytes per second of large copies from the device's pinned memory, by ggml alone."""
    library = llama_cpp.llama_cpp._lib
    handle, size = ctypes.c_void_p, ctypes.c_size_t

    class InitParams(ctypes.Structure):
        _fields_ = [("mem_size", size), ("mem_buffer", handle), ("no_alloc", ctypes.c_bool)]

    for name, restype, argtypes in (
        ("ggml_backend_dev_init", handle, [handle, ctypes.c_char_p]),
        ("ggml_backend_dev_host_buffer_type", handle, [handle]),
        ("ggml_backend_buft_alloc_buffer", handle, [handle, size]),
        ("ggml_backend_buffer_get_base", handle, [handle]),
        ("ggml_backend_alloc_ctx_tensors", handle, [handle, handle]),
        ("ggml_init", handle, [InitParams]),
        ("ggml_new_tensor_1d", handle, [handle, ctypes.c_int, ctypes.c_int64]),
        ("ggml_backend_tensor_set_async", None, [handle, handle, handle, size, size]),
        ("ggml_backend_synchronize", None, [handle]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = restype, argtypes
    known = address(device.name)
    backend = library.ggml_backend_dev_init(known, None)
    pinned = library.ggml_backend_dev_host_buffer_type(known)
    source = library.ggml_backend_buffer_get_base(
        library.ggml_backend_buft_alloc_buffer(pinned, COPY_BYTES)
    )
    ctypes.memset(source, 1, COPY_BYTES)
    context = library.ggml_init(InitParams(1 << 16, None, True))
    tensor = library.ggml_new_tensor_1d(context, 24, COPY_BYTES)  # GGML_TYPE_I8
    library.ggml_backend_alloc_ctx_tensors(context, backend)
    speeds = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(8):
            library.ggml_backend_tensor_set_async(backend, tensor, source, 0, COPY_BYTES)
        library.ggml_backend_synchronize(backend)
        speeds.append(8 * COPY_BYTES / (time.perf_counter() - began))
    return statistics.median(speeds)


# --- identity ---------------------------------------------------------------------------------


def identity(device: Device, n_ubatch: int, layouts: Sequence[str] | None) -> dict[str, Any]:
    """Tiny models of every layout: stock on the device against ours."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import harness
    import tiny

    def singles(model: harness.Model) -> Logits:
        context = model.context(n_ubatch=n_ubatch)
        tokens = harness.random_tokens(12)
        return np.concatenate([context.decode([Row(t, i)]) for i, t in enumerate(tokens)])

    def prompt(model: harness.Model, most: int = n_ubatch) -> Logits:
        return model.context(n_ubatch=most).decode(harness.rows(harness.random_tokens(48)))

    cases: dict[str, Any] = {}

    def tell(name: str, got: Logits, expected: Logits) -> None:
        cases[name] = compared(got, expected)
        print(name, cases[name], file=sys.stderr)

    with tempfile.TemporaryDirectory() as folder:
        for layout in layouts or tiny.LAYOUTS:
            path = tiny.write_tiny(layout, Path(folder) / f"{layout}.gguf")
            with harness.stock(path, device=device.name) as model:
                expected = {"decode": singles(model), "prefill": prompt(model)}
                tell(f"{layout} stock prefill", prompt(model, PIECE), expected["prefill"])
            used = {"mixtral": 2, "llama4": 1}.get(layout, 4)
            kinds: dict[str, dict[str, Any]] = {
                "whole": {},
                "window": {"n_pool": used, "n_windows": 1},
                "windows": {"n_pool": used, "n_windows": 2},
                "pool": {"n_pool": 2 * used},
                "least": {"n_pool": used},
                "auto": {"n_pool": used, "cpu_experts": "auto"},
                "all": {"cpu_experts": "all"},
            }
            for kind, how in kinds.items():
                how = {"cpu_experts": "off", "device": device.name, **how}
                with harness.ours(path, **how) as model:
                    tell(f"{layout} {kind} decode", singles(model), expected["decode"])
                    tell(f"{layout} {kind} prefill", prompt(model), expected["prefill"])
    exact = {
        name: case
        for name, case in cases.items()
        for _, kind, step in [name.split()]
        if kind in ("whole", "window", "windows")
        or (step == "decode" and kind in ("pool", "least"))
    }
    return {
        "device": device._asdict(),
        "ok": all(case["equal"] for case in exact.values()),
        "exact": sum(case["equal"] for case in exact.values()),
        "of": len(exact),
        "cases": cases,
    }


def compared(got: Logits, expected: Logits) -> dict[str, Any]:
    return {
        "equal": bool(np.array_equal(got, expected)),
        "nmse": float(((got - expected) ** 2).sum() / (expected**2).sum()),
        "same_tokens": float((got.argmax(-1) == expected.argmax(-1)).mean()),
    }


if __name__ == "__main__":
    raise SystemExit(main())
