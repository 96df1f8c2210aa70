"""Each wait of the code for devices, left out: some test must fail. `make waits`.

A wait that no test misses is not needed, or not tested. The plugin is built once per wait from a
changed copy of its source, and the tests over the device of native/lag.cpp run against that until
one fails or ends in a crash. Run as a pytest plugin this file puts that library in its place.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from moe_gguf.runtime.plugin import library

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "waits"
TESTS = ("test_device.py", "test_copying.py", "test_cpu_experts.py")
LIMIT_S = 300  # a device that nobody waits for may also leave everybody waiting
MUTANT = "MOE_GGUF_MUTANT"  # for the tests: the library to load instead


class Wait(NamedTuple):
    """A line of the source, which appears once in it, and what would happen without it."""

    what: str
    file: str
    line: str
    instead: str = ""


WAITS = (
    Wait(
        "ids are read when they have arrived",
        "device_executor.cpp",
        "    ggml_backend_synchronize(stream_);\n    model_.stats.wait_ns",
        "    model_.stats.wait_ns",
    ),
    Wait(
        "another context's launches have ended before its slots are filled",
        "device_executor.cpp",
        "        ggml_backend_synchronize(model_.computing);\n",
    ),
    Wait(
        "a range's copies wait for the range before",
        "device_executor.cpp",
        "            model_.pools->wait_for(stream_);\n",
    ),
    Wait(
        "an event computes when its experts are on the device",
        "device_executor.cpp",
        "        }\n    }\n    wait_on(ticket);\n}\n\n// Where the device computes",
        "        }\n    }\n}\n\n// Where the device computes",
    ),
    Wait(
        "a window is filled from slots whose copies have ended",
        "windows.cpp",
        "    wait_on_(ticket);\n",
    ),
    Wait(
        "a window is filled behind what still comes there for a layer that did not ask",
        "windows.cpp",
        "    wait_on_(model_.pools->begin_window(layer));\n",
        "    model_.pools->begin_window(layer);\n",
    ),
    Wait(
        "a stream waits for copies by their event",
        "pools.cpp",
        "        ggml_backend_event_wait(stream, event_of(ticket));\n",
    ),
    Wait(
        "copies leave an event behind them",
        "pools.cpp",
        "        ggml_backend_event_record(event_of(issued_), stream_);\n",
    ),
    Wait(
        "copies wait for computing by its event",
        "pools.cpp",
        "    ggml_backend_event_wait(stream_, before_);\n",
    ),
    Wait(
        "computing leaves an event behind it",
        "pools.cpp",
        "    ggml_backend_event_record(before_, stream);\n",
    ),
    Wait(
        "a slot in memory is read into when its copy to the device has ended",
        "model.cpp",
        "        pools->settle(read_by_[slot]);\n",
    ),
    Wait(
        "what is brought to the device at the start is there",
        "model.cpp",
        "    pools->settle(ticket);\n",
    ),
    Wait(
        "settling waits for the event",
        "pools.cpp",
        "        ggml_backend_event_synchronize(event_of(ticket));\n",
    ),
    Wait(
        "memory of ranges is given back when nobody is at work on it",
        "ranges.cpp",
        "        ggml_backend_synchronize(stream_);\n",
    ),
)


def pytest_configure() -> None:
    """Load the changed plugin in this process."""
    found, mutant = library.built_file, os.environ.get(MUTANT)
    if mutant:
        library.built_file = lambda name: Path(mutant) if name == library.LIBRARY else found(name)


def main() -> int:
    source = BUILD / "native"
    shutil.rmtree(BUILD, ignore_errors=True)  # or what was built last, without a wait, stays
    shutil.copytree(ROOT / "runtime/native", source)
    command = ["cmake", "-S", str(source), "-B", str(BUILD / "out")]
    subprocess.run(
        [*command, f"-DPython_EXECUTABLE={sys.executable}"], check=True, stdout=subprocess.DEVNULL
    )
    if is_missed(
        Wait("all waits are there", "pools.cpp", "namespace moe {\n", "namespace moe {\n"), source
    ):
        print("the tests fail as it is", file=sys.stderr)
        return 1
    missed = [wait.what for wait in WAITS if not is_missed(wait, source)]
    if missed:
        print("no test misses: " + "; ".join(missed), file=sys.stderr)
    return bool(missed)


def is_missed(wait: Wait, source: Path) -> bool:
    """Whether a test fails without it."""
    path, whole = source / wait.file, (ROOT / "runtime/native" / wait.file).read_text()
    assert whole.count(wait.line) == 1, f"{wait.file} has changed: where {wait.what}?"
    path.write_text(whole.replace(wait.line, wait.instead))
    build = ["cmake", "--build", str(BUILD / "out"), "--target", "ggml-moe"]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    path.write_text(whole)
    start, why = time.monotonic(), "NOTHING"
    tests = [str(ROOT / "tests" / name) for name in TESTS]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "waits", *tests],
            env={**os.environ, MUTANT: str(BUILD / "out/libggml-moe.so"), "PYTHONPATH": "tests"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        lines = done.stdout.splitlines()
        if done.returncode == 1:
            why = next(line for line in reversed(lines) if line.startswith(("FAILED", "ERROR")))
        elif done.returncode < 0:
            why = f"ended by signal {-done.returncode}"
        else:
            assert done.returncode == 0, done.stdout + done.stderr
    except subprocess.TimeoutExpired:
        why = f"nothing moves for {LIMIT_S} s"
    print(f"{wait.what}: {why} ({time.monotonic() - start:.0f} s)", flush=True)
    return why != "NOTHING"


if __name__ == "__main__":
    sys.exit(main())
