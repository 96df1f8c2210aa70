"""Files appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from moe_gguf.runtime import files
from moe_gguf.runtime.files import replacing, sha256


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a [1].gguf"  # no pattern
    path.write_text("old")
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as partial:
            partial.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_do_not_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path) as first:
        first.write_text("first")
        with replacing(path) as second:
            assert second != first
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"


def test_what_a_killed_writer_left_is_removed_when_it_is_old(tmp_path: Path) -> None:
    killed, running = (tmp_path / f"file.{i}.partial" for i in "ab")
    killed.touch()
    running.touch()
    os.utime(killed, (0, 0))
    with replacing(tmp_path / "file") as partial:
        partial.touch()
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file", running]


def test_the_bytes_are_on_the_disk_before_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    synced: list[bool] = []  # whether the name was there
    monkeypatch.setattr(files.os, "fsync", lambda fd: synced.append(path.exists()))
    with replacing(path) as partial:
        partial.write_text("new")
    assert synced == [False, True]  # the bytes, then the folder


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(3 << 20))
    assert sha256(tmp_path / "file") == hashlib.sha256(bytes(3 << 20)).hexdigest()
