"""The installed package as its users start it: from a checkout, from a folder with other files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

import moe_gguf

CHECKOUT = Path(moe_gguf.__file__).parents[1]
ROOMS = ("runtime", "converters", "policies")
# An editable install would answer for the package before any folder is looked at.
NOT_EDITABLE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__module__.startswith("_editable")]
"""

Python = Callable[..., str]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The sources as they are checked out."""
    folder = tmp_path / "checkout"
    for name in ("moe_gguf", *ROOMS):
        shutil.copytree(
            CHECKOUT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    return folder


@pytest.fixture
def site(checkout: Path, tmp_path: Path) -> Path:
    """What ``pip install .`` makes of them."""
    folder = tmp_path / "site"
    shutil.copytree(checkout / "moe_gguf", folder / "moe_gguf")
    for name in ROOMS:
        shutil.copytree(checkout / name, folder / "moe_gguf" / name)
    (folder / "sitecustomize.py").write_text(NOT_EDITABLE)
    return folder


@pytest.fixture
def python(checkout: Path, site: Path, tmp_path: Path) -> Python:
    """``python(*args, cwd=checkout)``: what Python with that install prints there."""
    path = os.pathsep.join([str(site), sysconfig.get_path("purelib")])
    env = {**os.environ, "PYTHONPATH": path, "MOE_GGUF_CACHE": "cache"}

    def run(*args: str, cwd: Path = checkout) -> str:
        done = subprocess.run(
            [sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.rstrip("\n")

    return run


def test_python_in_a_checkout_finds_the_installed_package(python: Python, site: Path) -> None:
    """It finds the checkout's ``moe_gguf`` first, which once had no ``runtime``."""
    code = "from moe_gguf import Llama, runtime; print(runtime.__file__)"
    assert python("-c", code) == str(site / "moe_gguf" / "runtime" / "__init__.py")
    assert "version" in python("-m", "moe_gguf", "--version")


CARVE = """
def demo_model(folder, progress):
    folder.mkdir()
    (folder / "demo.gguf").touch()
    return folder / "demo.gguf"
"""


def test_the_demo_is_found_in_a_checkout(python: Python, checkout: Path, site: Path) -> None:
    """A child carves it: started in no folder of the user's, it uses the user's cache all the
    same. Carving takes its time, and is tested elsewhere."""
    (site / "moe_gguf" / "converters" / "demo.py").write_text(CARVE)
    code = """
from pathlib import Path
from moe_gguf.runtime import cache
from moe_gguf.runtime.cli.model import resolve
cache.use(Path("cache"))
print(resolve("demo"))
"""
    made = checkout / "cache" / "demo.gguf"
    assert python("-c", code) == str(made)
    assert made.exists()


def test_a_child_does_not_import_from_the_user_s_folder(python: Python, tmp_path: Path) -> None:
    folder = tmp_path / "user"
    folder.mkdir()
    (folder / "json.py").write_text("raise SystemExit('imported from the working folder')")
    code = """
import subprocess, sys
sys.path.remove("")
from moe_gguf.runtime import child
command = child.command("moe_gguf", "--version")
print(subprocess.run(command, cwd=child.FOLDER, text=True, capture_output=True).stdout)
"""
    assert "version" in python("-c", code, cwd=folder)


def test_an_option_added_to_the_dataclass_is_everywhere(python: Python, site: Path) -> None:
    """One line in ``runtime/options.py``, and commands and bench rows have it."""
    file = site / "moe_gguf" / "runtime" / "options.py"
    text = file.read_text()
    last = "    warm: bool = "
    assert text.count(last) == 1
    line = '    grace: float = entry(1.5, "S", "how long to wait")\n'
    file.write_text(text.replace(last, line + last))
    for command in ("run", "plan", "trace", "serve", "quality", "bench"):
        help = python("-m", "moe_gguf", command, "--help")
        assert "--grace S" in help
        assert "how long to wait" in help
    code = (
        "from moe_gguf.runtime.bench.spec import Spec;"
        "from moe_gguf.runtime.options import Options;"
        "spec = Spec('m', 1, 1, 1, None, Options(grace=2.0));"
        "print(Spec.from_json(spec.to_json()).options.arguments()['grace'])"
    )
    assert python("-c", code) == "2.0"
