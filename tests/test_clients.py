"""The packages that people use against the server, in a process of their own: they take more memory
than the budgets that other tests give this one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_packages_of_openai_and_anthropic() -> None:
    """`clients.py`, whose tests these are."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    file = Path(__file__).with_name("clients.py")
    run = subprocess.run([*command, str(file)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout
    assert "." * 9 in run.stdout, run.stdout
