"""Servers in processes of their own."""

from __future__ import annotations

import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pytest


@contextmanager
def running(
    command: Sequence[str], ready: str, env: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Such a process, from when ``ready``, an address, answers."""
    with subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(1200):
                try:
                    urllib.request.urlopen(ready).close()
                    break
                except OSError:
                    assert process.poll() is None, f"{command[0]} ended"
                    time.sleep(0.1)
            else:
                pytest.fail(f"{command[0]} does not answer")
            yield
        finally:
            process.terminate()
