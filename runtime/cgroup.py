"""A memory cgroup of a given size for one child process, under version 1 or 2.

Owns making it, entering it, what it counted, and removing it. Does not know what runs in it, and
changes nothing in the cgroups that were there before.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

_PROBE_BYTES = 64 * 2**20
_REMOVE_SECONDS = 2.0  # a cgroup stays busy for a moment after its last process


class Files(NamedTuple):
    """What one version calls the same things."""

    limit: str
    peak: str
    events: str
    swap: tuple[str, int | None]  # the file that keeps swap out, and its value (None: the limit)


FILES = {
    1: Files(
        "memory.limit_in_bytes",
        "memory.max_usage_in_bytes",
        "memory.oom_control",
        ("memory.memsw.limit_in_bytes", None),
    ),
    2: Files("memory.max", "memory.peak", "memory.events", ("memory.swap.max", 0)),
}


class MemoryCgroup(NamedTuple):
    """One cgroup that exists; see ``memory_cgroup``."""

    folder: Path
    version: int

    def command(self, command: Sequence[str]) -> list[str]:
        """``command``, run inside: the shell enters first, so every page is charged here."""
        enter = 'echo $$ > "$0" && exec "$@"'
        return ["/bin/sh", "-c", enter, str(self.folder / "cgroup.procs"), *command]

    def peak_bytes(self) -> int | None:
        """The most that was charged, page cache included; None where the kernel does not tell."""
        try:
            return int((self.folder / FILES[self.version].peak).read_text())
        except (OSError, ValueError):
            return None

    def oom_kills(self) -> int:
        """Processes the kernel killed here because the limit was reached."""
        try:
            text = (self.folder / FILES[self.version].events).read_text()
        except OSError:
            return 0
        counts = dict(line.split()[:2] for line in text.splitlines())
        return int(counts.get("oom_kill", 0))


def places(root: Path = Path("/")) -> tuple[int, list[Path]]:
    """The version in use, and the folders in which a memory cgroup may be made, nearest first.

    Raises OSError where there are no memory cgroups.
    """
    found: dict[int, list[Path]] = {}
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            version, base = 1, root / "sys/fs/cgroup/memory"
        elif controllers == "":
            version, base = 2, root / "sys/fs/cgroup"
        else:
            continue
        own = base / path.lstrip("/")  # inside a container only its ancestors may be visible
        nested = [folder for folder in (own, *own.parents) if folder.is_relative_to(base)]
        found[version] = [folder for folder in nested if folder.is_dir()]
    for version in (1, 2):  # a hybrid system has memory in version 1
        if found.get(version):
            return version, found[version]
    raise OSError("this system has no memory cgroups")


@contextlib.contextmanager
def memory_cgroup(n_bytes: int, root: Path = Path("/")) -> Iterator[MemoryCgroup]:
    """A fresh cgroup of ``n_bytes`` without swap, removed afterwards; OSError if not permitted."""
    version, folders = places(root)
    refused: OSError | None = None
    for parent in folders:
        try:
            group = MemoryCgroup(Path(tempfile.mkdtemp(prefix="moe-gguf-", dir=parent)), version)
        except OSError as error:
            refused = error
            continue
        try:
            _limit(group, n_bytes)
        except OSError as error:  # a version 2 parent that does not share its memory controller
            refused = error
            _remove(group.folder)
            continue
        try:
            yield group
        finally:
            _remove(group.folder)
        return
    raise refused or OSError("no memory cgroup is visible to this process")


def _limit(group: MemoryCgroup, n_bytes: int) -> None:
    files = FILES[group.version]
    _write(group.folder / files.limit, n_bytes)
    swap, value = files.swap
    with contextlib.suppress(FileNotFoundError):  # a kernel that does not count swap
        _write(group.folder / swap, n_bytes if value is None else value)


def _write(file: Path, value: int) -> None:
    with file.open("r+") as stream:  # never creates: a file that is missing was not offered
        stream.write(str(value))


def _remove(folder: Path) -> None:
    deadline = time.monotonic() + _REMOVE_SECONDS
    while True:
        try:
            folder.rmdir()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def refusal() -> str | None:
    """Why no child of this process can be put into a memory cgroup; None if it can."""
    try:
        with memory_cgroup(_PROBE_BYTES) as group:
            subprocess.run(group.command(["true"]), check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return error.strerror or str(error) if isinstance(error, OSError) else "entering it failed"
    return None
