"""The lines of an input file, one at a time, however long the file and whatever is in it.

A line has a number, by which people find it, and a digest, by which an answer belongs to it.
"""

from __future__ import annotations

import codecs
import io
import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from ..errors import UserError, reason

MOST_BYTES = 64 << 20  # of a line: six times the longest that anyone is expected to write
_PART = 1 << 20
_OTHER_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # those of UTF-32 begin like them


class Line(NamedTuple):
    """``data`` is without the white space around it; of a line that is too long, its beginning."""

    number: int  # from 1, empty lines counted too
    digest: int
    data: bytes
    is_whole: bool
    n_bytes: int

    @property
    def id(self) -> str:
        return f"batch_req_{self.number}_{self.digest:016x}"


class Raw(NamedTuple):
    """A line as it stands in a file."""

    start: int
    data: bytes  # its first MOST_BYTES
    n_bytes: int
    is_ended: bool  # by a line end, not by the file's


def raw_lines(file: io.BufferedReader, digest: xxhash.xxh3_64 | None = None) -> Iterator[Raw]:
    """Every line; ``digest`` is reset and fed with what a line has beyond its first MOST_BYTES."""
    start = 0
    while data := file.readline(MOST_BYTES):
        n, last = len(data), data[-1:]
        if digest is not None:
            digest.reset()
        while last != b"\n" and (more := file.readline(_PART)):
            n, last = n + len(more), more[-1:]
            if digest is not None:
                digest.update(more)
        yield Raw(start, data, n, last == b"\n")
        start += n


def lines(path: Path) -> Iterator[Line]:
    """The lines of an input file that are not empty. UserError for a file that is not UTF-8."""
    beyond = xxhash.xxh3_64()
    with path.open("rb") as file:
        for number, raw in enumerate(raw_lines(file, beyond), 1):
            data = raw.data
            if number == 1:
                if data.startswith(_OTHER_MARKS):
                    raise UserError(f"{path} is not text in UTF-8: convert it first")
                data = data.removeprefix(codecs.BOM_UTF8)
            data = data.strip()
            is_whole = raw.n_bytes <= MOST_BYTES
            if not data and is_whole:
                continue
            digest = xxhash.xxh3_64_intdigest(data)
            if not is_whole:
                digest ^= beyond.intdigest()
            yield Line(number, digest, data, is_whole, raw.n_bytes)


class Extent(NamedTuple):
    n_lines: int  # as editors count them
    n_asked: int  # that are not empty


def extent(path: Path) -> Extent:
    """How much there is in an input file. UserError for what is no file to be read twice."""
    _check(path)
    number = count = 0
    for count, line in enumerate(lines(path), 1):  # noqa: B007
        number = line.number
    return Extent(number, count)


def _check(path: Path) -> None:
    try:
        kind = path.stat().st_mode
        if stat.S_ISDIR(kind):
            raise UserError(f"{path} is a folder: give the file in it")
        if not stat.S_ISREG(kind):
            raise UserError(f"{path} is not a file: what comes from a pipe cannot be resumed")
        with path.open("rb"):
            pass
    except OSError as error:
        raise UserError(f"cannot read {path} ({reason(error)})") from None


class BadLine(Exception):
    """A line that never becomes a request; ``code`` and the sentence go into its error."""

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.custom_id = custom_id


class Asked(NamedTuple):
    """What a line asks for."""

    custom_id: str
    url: str
    body: Any


def parse(line: Line) -> Asked:
    """What is asked in a line; BadLine."""
    if not line.is_whole:
        raise BadLine(
            "line_too_long",
            f"line {line.number} has {line.n_bytes} bytes: at most {MOST_BYTES} are read",
        )
    try:
        fields = json.loads(line.data.decode(), parse_constant=_no_constant)
    except RecursionError:
        raise BadLine("invalid_json", f"line {line.number} is nested too deeply") from None
    except ValueError as error:  # of the encoding too
        raise BadLine("invalid_json", f"line {line.number} is not JSON in UTF-8: {error}") from None
    if not isinstance(fields, dict):
        raise BadLine("invalid_json", f"line {line.number} is not a JSON object")
    custom_id = fields.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise BadLine("invalid_custom_id", f"line {line.number} has no text as its custom_id")
    method, url = fields.get("method", "POST"), fields.get("url")
    if method != "POST":
        raise BadLine("invalid_method", "the method must be POST", custom_id)
    if not isinstance(url, str):
        raise BadLine("invalid_url", "the url is missing", custom_id)
    return Asked(custom_id, url, fields.get("body"))


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")
