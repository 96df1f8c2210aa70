"""Tiny model files, written once per session, and prerequisites that may not be missed silently."""

from __future__ import annotations

import ctypes
import gc
import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import zoo
from mutant import Helper, Mutant

from moe_gguf.converters import convert
from moe_gguf.converters.choose import ConvertOptions
from moe_gguf.converters.convert import open_source
from moe_gguf.runtime import cache, kernels, logs, trial
from moe_gguf.runtime.bench import process, rounds
from moe_gguf.runtime.cli import main
from moe_gguf.runtime.disk import Ceiling
from moe_gguf.runtime.plugin.library import probe_direct

# A shell's background job ignores Ctrl-C, and so would every process that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

TinyFile = Callable[..., Path]
ZooFile = Callable[..., Path]
MakeBundle = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> TinyFile:
    """``tiny_file(layout, **flags)``: the path of a tiny model, the same file for the same call."""
    folder = tmp_path_factory.mktemp("tiny")
    made: dict[tuple[Any, ...], Path] = {}

    def get(layout: str, **flags: Any) -> Path:
        key = (layout, *sorted(flags.items()))
        if key not in made:
            name = "-".join([layout, *(f"{k}={v}" for k, v in sorted(flags.items()))])
            made[key] = tiny.write_tiny(layout, folder / f"{name}.gguf", **flags)
        return made[key]

    return get


@pytest.fixture(scope="session")
def helper() -> Iterator[Helper]:
    with Helper() as helper:
        yield helper


@pytest.fixture(scope="session", autouse=True)
def trials(helper: Helper, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Models are tried in forks of one helper, and verdicts are kept for this session only."""
    kept, folder = _user_cache(), tmp_path_factory.mktemp("cache")
    for model in kept.glob("*.gguf"):  # the demo's
        (folder / model.name).symlink_to(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_GGUF_CACHE", str(folder))  # of processes
        patch.setattr(cache, "_chosen", folder)  # of this one
        patch.setattr(trial, "send", helper.send)
        yield
    kept.mkdir(parents=True, exist_ok=True)
    for model in folder.glob("*.gguf"):
        if not model.is_symlink():  # made in this session
            shutil.move(model, kept)


def _user_cache() -> Path:
    return Path(os.environ.get("MOE_GGUF_CACHE") or cache.folder())


@pytest.fixture(scope="session")
def vocabulary(tiny_file: TinyFile) -> zoo.Fields:
    """Tokenizer keys for the models of the zoo."""
    return Mutant.read(tiny_file("qwen3moe")).fields


@pytest.fixture(scope="session")
def zoo_file(tmp_path_factory: pytest.TempPathFactory, vocabulary: zoo.Fields) -> ZooFile:
    """``zoo_file(architecture, **keys)``: the path of that model of the zoo, made once."""
    folder = tmp_path_factory.mktemp("zoo")

    def get(architecture: str, **keys: zoo.Value) -> Path:
        name = "-".join([architecture, *(f"{k}={v}" for k, v in sorted(keys.items()))])
        path = folder / f"{name}.gguf"
        if not path.exists():
            zoo.write(architecture, path, vocabulary, **keys)
        return path

    return get


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> MakeBundle:
    """``bundle(source, layout)``: the bundle of a GGUF, made once."""
    made: dict[tuple[Path, str], Path] = {}

    def get(path: Path, layout: str = "plain", **options: str) -> Path:
        key = path, layout + str(options)
        if key not in made:
            folder = tmp_path_factory.mktemp("bundle")
            source = open_source(path)
            try:
                given = ConvertOptions(layout=layout, **options)
                convert.convert(source, folder, given, kernels, lambda *_: None, lambda _: None)
            finally:
                source.close()
            made[key] = folder
        return made[key]

    return get


@pytest.fixture(scope="session")
def hf_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all of `hf_files.CHECKPOINTS` and `TOKENIZERS`; tests change copies only."""
    root = tmp_path_factory.mktemp("hf")
    script = Path(__file__).with_name("hf_models.py")
    subprocess.run([sys.executable, script, root], check=True, capture_output=True)
    return root


@pytest.fixture(scope="module", autouse=True)
def tidy() -> Iterator[None]:
    """Budgets cover the whole process: what one module's tests freed must not weigh on the next."""
    yield
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture
def known_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk's speed is taken for granted: measuring it takes longer than a tiny model's run."""
    known = process.Run(Ceiling(1e9, 4096, 2, direct=True)._asdict(), None)
    monkeypatch.setattr(rounds, "probe_disk", lambda *_: known)


def missing(what: str) -> None:
    """Skip a gate whose prerequisite this machine lacks; under CI that is a failure."""
    if os.environ.get("CI"):
        pytest.fail(f"a gate cannot run here: {what}")
    pytest.skip(f"GATE NOT RUN: {what}")


@pytest.fixture(scope="session")
def direct_io(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A temporary folder on a file system that can be read directly (not tmpfs)."""
    file = tmp_path_factory.mktemp("direct") / "file"
    file.write_bytes(bytes(1 << 16))
    if not probe_direct(file).direct:
        missing(f"direct reads do not work in {file.parent}")


# --- the command line ---------------------------------------------------------------------------


class Result(NamedTuple):
    code: int
    out: str
    err: str

    def error(self, code: int) -> str:
        """The one line that says what is wrong."""
        (line,) = self.err.splitlines()
        assert self.code == code
        assert self.out == ""
        assert line.startswith("moe-gguf: error: ")
        return line.removeprefix("moe-gguf: error: ")


Command = Callable[..., Result]


@pytest.fixture
def moe_gguf(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """``moe_gguf(*args, stdin=b"")``: run the command in this process, away from a terminal."""
    monkeypatch.setattr(logs, "_listeners", list(logs._listeners))
    capfd.readouterr()

    def run(*args: object, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "argv", ["moe-gguf", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as exit:
            main.main()
        out, err = capfd.readouterr()
        return Result(int(exit.value.code or 0), out, err)

    return run
