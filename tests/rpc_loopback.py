"""Devices behind ggml's RPC on this machine: stock's logits there, also through pools and windows.

``make rpc``, a part of ``make check``, builds the module from llama.cpp's source and runs this. A
server's streams are in order, so that a missing wait is not seen here; what is seen is whether a
real device of another kind gets all that it needs: an event type, strides, buffers without host
memory behind them.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULE = ROOT / "build/rpc/bin/libggml-rpc.so"
SERVER = """
import ctypes, sys
import llama_cpp
from moe_gguf.runtime.plugin.library import load

load()
host, handle = llama_cpp.llama_cpp._lib, ctypes.c_void_p
host.ggml_backend_load(sys.argv[1].encode())
host.ggml_backend_dev_by_type.restype = handle
devices = (handle * 1)(host.ggml_backend_dev_by_type(0))  # the processor
serve = ctypes.CDLL(sys.argv[1]).ggml_backend_rpc_start_server
serve.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, handle]
serve(sys.argv[2].encode(), None, 1, 1, devices)
"""


def wait_for(port: int) -> None:
    for _ in range(300):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.1)
    pytest.fail("the server does not answer")


def test_identity_on_a_server() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    endpoint = f"127.0.0.1:{port}"
    command = [sys.executable, "-c", SERVER, str(MODULE), endpoint]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(port)
        script = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "identity", "--device", "rpc0"]
        script += ["--module", str(MODULE), "--rpc", endpoint]
        done = subprocess.run(script, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        document = json.loads(done.stdout.splitlines()[-1])
        assert document["exact"] == document["of"] > 0
    finally:
        server.kill()
        server.wait()
