"""A cgroup of given limits for one child process, under version 1 or 2: memory, disk speed.

Owns making it, entering it, what it counted, and removing it. Does not know what runs in it, and
changes nothing in the cgroups that were there before.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

_REMOVE_SECONDS = 2.0  # a cgroup stays busy for a moment after its last process


class Files(NamedTuple):
    """What one version calls the same things."""

    limit: str
    peak: str
    events: str
    swap: tuple[str, int | None]  # the file that keeps swap out, and its value (None: the limit)
    disk: str
    disk_line: str  # of a device and its bytes per second


FILES = {
    1: Files(
        "memory.limit_in_bytes",
        "memory.max_usage_in_bytes",
        "memory.oom_control",
        ("memory.memsw.limit_in_bytes", None),
        "blkio.throttle.read_bps_device",
        "{} {}",
    ),
    2: Files(
        "memory.max",
        "memory.peak",
        "memory.events",
        ("memory.swap.max", 0),
        "io.max",
        "{} rbps={}",
    ),
}


class DiskLimit(NamedTuple):
    """How fast whole disks may be read, direct and buffered reads together."""

    devices: tuple[str, ...]  # each as major:minor
    bytes_per_s: int


class Limits(NamedTuple):
    """What to limit; None: not."""

    memory: int | None = None  # bytes, without swap
    disk: DiskLimit | None = None


class Group(NamedTuple):
    """Limits in force; see ``limited``."""

    folders: tuple[Path, ...]  # one per hierarchy; the first limits memory, if any does
    memory_version: int | None

    def command(self, command: Sequence[str]) -> list[str]:
        """``command``, run inside: the shell enters first, so every page is charged here."""
        procs = [str(folder / "cgroup.procs") for folder in self.folders]
        script = 'echo $$ > "$1" && shift && ' * len(procs) + 'exec "$@"'
        return ["/bin/sh", "-c", script, "sh", *procs, *command]

    def peak_bytes(self) -> int | None:
        """The most that was charged, page cache included; None where the kernel does not tell."""
        if self.memory_version is None:
            return None
        try:
            return int((self.folders[0] / FILES[self.memory_version].peak).read_text())
        except (OSError, ValueError):
            return None

    def oom_kills(self) -> int | None:
        """Processes the kernel killed here because the limit was reached; None without a limit."""
        if self.memory_version is None:
            return None
        try:
            text = (self.folders[0] / FILES[self.memory_version].events).read_text()
        except OSError:
            return 0
        counts = dict(line.split()[:2] for line in text.splitlines())
        return int(counts.get("oom_kill", 0))


def places(what: str = "memory", root: Path = Path("/")) -> tuple[int, list[Path]]:
    """The version in use, and the folders in which a cgroup that limits ``what`` (memory or disk)
    may be made, nearest first.

    Raises OSError where there are none.
    """
    controller = {"memory": "memory", "disk": "blkio"}[what]
    found: dict[int, list[Path]] = {}
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            # Resolved: controllers mounted together are one hierarchy under several names.
            version, base = 1, (root / "sys/fs/cgroup" / controller).resolve()
        elif controllers == "":
            version, base = 2, root / "sys/fs/cgroup"
        else:
            continue
        own = base / path.lstrip("/")  # inside a container only its ancestors may be visible
        nested = [folder for folder in (own, *own.parents) if folder.is_relative_to(base)]
        found[version] = [folder for folder in nested if folder.is_dir()]
    for version in (1, 2):  # a hybrid system has its controllers in version 1
        if found.get(version):
            return version, found[version]
    raise OSError(f"this system has no {what} cgroups")


@contextlib.contextmanager
def limited(limits: Limits, root: Path = Path("/")) -> Iterator[Group]:
    """Fresh cgroups with ``limits``, removed afterwards; OSError if not permitted."""
    wanted: list[tuple[list[Path], list[_Setting]]] = []
    version = 0
    if limits.memory is not None:
        version, parents = places("memory", root)
        wanted.append((parents, _memory_settings(version, limits.memory)))
    if limits.disk is not None:
        disk_version, parents = places("disk", root)
        settings = _disk_settings(disk_version, limits.disk)
        if wanted and wanted[0][0] == parents:  # a process is in one cgroup of a hierarchy
            wanted[0][1].extend(settings)
        else:
            wanted.append((parents, settings))
    with contextlib.ExitStack() as stack:
        folders = tuple(stack.enter_context(_folder(*pair)) for pair in wanted)
        yield Group(folders, version if limits.memory is not None else None)


class _Setting(NamedTuple):
    file: str
    value: str
    optional: bool = False


def _memory_settings(version: int, n_bytes: int) -> list[_Setting]:
    files = FILES[version]
    swap, value = files.swap
    return [
        _Setting(files.limit, str(n_bytes)),
        # A kernel that does not count swap has no such file.
        _Setting(swap, str(n_bytes if value is None else value), optional=True),
    ]


def _disk_settings(version: int, disk: DiskLimit) -> list[_Setting]:
    files = FILES[version]
    lines = [files.disk_line.format(device, disk.bytes_per_s) for device in disk.devices]
    return [_Setting(files.disk, line) for line in lines]


@contextlib.contextmanager
def _folder(parents: Sequence[Path], settings: Sequence[_Setting]) -> Iterator[Path]:
    """A new cgroup in the first of ``parents`` that offers every setting."""
    refused: OSError | None = None
    for parent in parents:
        try:
            folder = Path(tempfile.mkdtemp(prefix="moe-gguf-", dir=parent))
        except OSError as error:
            refused = error
            continue
        try:
            for setting in settings:
                _write(folder, setting)
        except OSError as error:  # a version 2 parent that does not share its controllers
            refused = error
            _remove(folder)
            continue
        try:
            yield folder
        finally:
            _remove(folder)
        return
    assert refused is not None
    raise refused


def _write(folder: Path, setting: _Setting) -> None:
    try:
        # "r+" never creates: a file that is missing was not offered.
        with (folder / setting.file).open("r+") as stream:
            stream.write(setting.value)
    except FileNotFoundError:
        if not setting.optional:
            raise


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


def refusal(limits: Limits) -> str | None:
    """Why no child of this process can be put under ``limits``; None if it can."""
    try:
        with limited(limits) as group:
            subprocess.run(group.command(["true"]), check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return error.strerror or str(error) if isinstance(error, OSError) else "entering it failed"
    return None


def disks_of(files: Sequence[Path], root: Path = Path("/")) -> tuple[str, ...]:
    """The whole disks that files lie on, as major:minor; OSError where there is none.

    Speed can be limited for whole disks only, so a partition stands for its disk.
    """
    disks = []
    for file in files:
        number = os.stat(file).st_dev
        block = root / "sys/dev/block" / f"{os.major(number)}:{os.minor(number)}"
        if not block.exists():
            raise OSError(f"{file} lies on a file system without a block device of its own")
        if (block / "partition").exists():
            block = block.resolve().parent
        disks.append((block / "dev").read_text().strip())
    return tuple(dict.fromkeys(disks))
