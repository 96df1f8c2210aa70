"""The header reader agrees with the gguf package, is fast, and names what is wrong with a file."""

from __future__ import annotations

import ctypes
import os
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import gguf
import llama_cpp
import pytest
from mutant import Field, Mutant
from test_abi import INCLUDE
from tiny import write_tiny

from moe_gguf.runtime.errors import UserError
from moe_gguf.runtime.formats import gguf_header
from moe_gguf.runtime.formats.ggml_types import GGML_TYPES
from moe_gguf.runtime.formats.gguf_header import ValueType, read_header


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny("qwen3moe", tmp_path / "tiny.gguf")


def test_types_agree_with_the_gguf_package() -> None:
    ours = {t.name: (n, t.block, t.block_bytes) for n, t in GGML_TYPES.items()}
    theirs = {q.name: (int(q), *gguf.GGML_QUANT_SIZES[q]) for q in gguf.GGML_QUANT_SIZES}
    theirs.pop("Q8_1", None)  # the package counts a float sum that blocks no longer have
    assert ours.items() >= theirs.items()


def test_types_agree_with_the_loaded_library() -> None:
    """Its sizes of each type, and no type that it has and we do not."""
    count = re.search(r"GGML_TYPE_COUNT\s*=\s*(\d+)", (INCLUDE / "ggml.h").read_text())
    assert count is not None
    ggml = llama_cpp.llama_cpp._lib
    ggml.ggml_type_name.restype = ctypes.c_char_p
    ggml.ggml_type_size.restype = ctypes.c_size_t
    ggml.ggml_blck_size.restype = ctypes.c_int64
    theirs = {}
    for number in range(int(count[1])):
        if block := ggml.ggml_blck_size(number):  # 0: a type that was given up
            theirs[number] = (block, ggml.ggml_type_size(number))
    assert theirs == {n: (t.block, t.block_bytes) for n, t in GGML_TYPES.items()}
    for number, kind in GGML_TYPES.items():
        assert ggml.ggml_type_name(number).decode().upper() == kind.name


@pytest.mark.parametrize("layout", ["qwen3moe", "gpt-oss", "gemma4", "updown"])
def test_reads_what_the_gguf_package_reads(layout: str, tmp_path: Path) -> None:
    path = write_tiny(layout, tmp_path / "m.gguf", mixed=True, align=64)
    header = read_header(path)
    theirs = gguf.GGUFReader(path)
    assert (header.version, header.alignment) == (3, 64)
    assert header.data_start == theirs.data_offset
    assert [
        (t.name, list(t.ne), t.ggml_type, t.n_bytes, header.data_start + t.offset)
        for t in header.tensors
    ] == [
        (t.name, t.shape.tolist(), int(t.tensor_type), t.n_bytes, t.data_offset)
        for t in theirs.tensors
    ]
    for key, pair in header.pairs.items():
        expected = theirs.fields[key].contents()
        if pair.kind is ValueType.ARRAY:
            assert header.get(key) == tuple(expected), key
        else:
            assert header.get(key) == expected, key
        assert header.raw(key) == path.read_bytes()[pair.start : pair.end]


def test_big_arrays_are_decoded_only_when_asked_for(tmp_path: Path) -> None:
    words = [f"token {i} é" for i in range(5000)]
    words[7] = "long " * (1 << 20)  # longer than what is read at once
    fields = {
        "words": Field(ValueType.STRING, list(words)),
        "numbers": Field(ValueType.UINT16, list(range(5000))),
        "last": Field(ValueType.UINT64, 7),
    }
    header = read_header(Mutant(fields, {}).write(tmp_path / "m.gguf"))
    assert header.pairs["words"].value is None
    assert header.pairs["numbers"].value is None
    assert header.get("words") == tuple(words)
    assert header.strings("words") == [word.encode() for word in words]
    assert header.get("numbers") == tuple(range(5000))
    assert header.payload("numbers") == struct.pack("<5000H", *range(5000))
    assert header.get("last") == 7
    assert header.get("none") is None
    assert header.strings("numbers") == header.strings("none") == []


def test_big_vocabulary_costs_less_than_a_third_of_a_second(tiny: Path) -> None:
    mutant = Mutant.read(tiny)
    mutant.fields["tokens"] = Field(ValueType.STRING, [f"token{i:06}" for i in range(150_000)])
    mutant.fields["merges"] = Field(ValueType.STRING, [f"ab{i} cd{i}" for i in range(280_000)])
    path = mutant.write(tiny)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        read_header(path)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3


def test_reads_version_2(tiny: Path) -> None:
    mutant = Mutant.read(tiny)
    mutant.version = 2
    assert read_header(mutant.write(tiny)).version == 2


def test_no_tensors_is_a_header_too(tmp_path: Path) -> None:
    header = read_header(Mutant({"a": Field(ValueType.BOOL, True)}, {}).write(tmp_path / "m"))
    assert header.tensors == ()
    assert header.get("a") is True


# --- what is refused ----------------------------------------------------------------------------


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_header(path)
    sentence = str(caught.value)
    assert path.name in sentence
    assert "\n" not in sentence
    return sentence


def test_missing_file(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "none.gguf")


def test_folder(tmp_path: Path) -> None:
    assert "is a folder" in refusal(tmp_path)


def test_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    assert "no regular file" in refusal(tmp_path / "pipe.gguf")


def test_zero_byte_in_the_name() -> None:
    with pytest.raises(UserError, match="cannot open"):
        read_header(Path("a\0b.gguf"))


def test_dangling_link(tmp_path: Path) -> None:
    (tmp_path / "link.gguf").symlink_to(tmp_path / "gone.gguf")
    assert "cannot open" in refusal(tmp_path / "link.gguf")


def test_name_that_is_no_name(tmp_path: Path) -> None:
    assert "cannot open" in refusal(tmp_path / ("x" * 300))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"GG", "not a GGUF file"),
        (b"PK\3\4 something else", "not a GGUF file"),
        (b"GGUF", "ends inside its header"),
        (b"GGUF" + struct.pack("<I", 3), "ends inside its header"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), "version 4"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "claims"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 63), "claims"),
    ],
)
def test_not_a_header(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(content)
    assert said in refusal(tmp_path / "bad.gguf")


def _named(n: int, name: bytes, rest: bytes) -> bytes:
    return struct.pack("<Q", n) + name + rest + bytes(64)


def _pair(rest: bytes, name: bytes = b"key") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + _named(len(name), name, rest)


def _info(dims: list[int], ggml_type: int = 0, offset: int = 0, name: bytes = b"t") -> bytes:
    raw = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, ggml_type, offset)
    return b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + _named(len(name), name, raw)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (_pair(struct.pack("<I", 13)), "unknown type 13"),
        (_pair(struct.pack("<IIQ", 9, 9, 0)), "array of arrays"),
        (_pair(struct.pack("<IIQ", 9, 77, 0)), "unknown type 77"),
        (_pair(struct.pack("<IIQ", 9, 4, 1 << 61)), "more than the file can hold"),
        (_pair(struct.pack("<IIQQ", 9, 8, 3, 1 << 40)), "a string of"),
        (_pair(struct.pack("<IIQQ", 9, 8, 1, 5000)), "ends inside"),
        (_pair(struct.pack("<IQ", 8, 1 << 62)), "a string of"),
        (_pair(struct.pack("<IQ", 8, 5000)), "ends inside"),
        (_pair(b"", name=b""), "empty"),
        (_pair(b"", name=b"a\0b"), "zero byte"),
        (_pair(b"", name=b"\xff\xfe"), "not text"),
        (_info([]), "has 0 dimensions"),
        (_info([1] * 5), "has 5 dimensions"),
        (_info([1, 0]), "impossible shape"),
        (_info([1 << 62, 1 << 62]), "impossible shape"),
        (_info([1 << 63]), "impossible shape"),
        (_info([4], 4), "type 4"),
        (_info([4], 43), "type 43"),
        (_info([33], 2), "block of 32"),
        (_info([4], 0, 32), "said to lie at 32"),
        (_info([4], 0, 3), "said to lie at 3"),
        (_info([4], name=b"n" * 64), "64 bytes long"),
        (_info([1000]), "bytes are missing"),
    ],
)
def test_header_that_lies(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(content)
    assert said in refusal(tmp_path / "bad.gguf")


def test_duplicate_key(tmp_path: Path) -> None:
    one = struct.pack("<Q", 1) + b"a" + struct.pack("<IQ", 10, 5)
    (tmp_path / "m").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + one + one)
    assert "key a appears twice" in refusal(tmp_path / "m")


def test_duplicate_tensor(tmp_path: Path) -> None:
    one = struct.pack("<Q", 1) + b"a" + struct.pack("<IQIQ", 1, 1, 0, 0)
    (tmp_path / "m").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2, 0) + one + one + bytes(99))
    assert "tensor a appears twice" in refusal(tmp_path / "m")


@pytest.mark.parametrize("value", [0, 3, 48])
def test_alignment_is_a_power_of_two(value: int, tmp_path: Path) -> None:
    fields = {"general.alignment": Field(ValueType.UINT32, value)}
    assert "power of two" in refusal(Mutant(fields, {}).write(tmp_path / "m"))


def test_alignment_of_another_type(tmp_path: Path) -> None:
    fields = {"general.alignment": Field(ValueType.UINT64, 32)}
    assert "32-bit" in refusal(Mutant(fields, {}).write(tmp_path / "m"))


def test_truncated_data_says_how_much_is_missing(tiny: Path) -> None:
    header = read_header(tiny)
    last = header.tensors[-1]
    end = header.data_start + last.offset + last.n_bytes
    tiny.write_bytes(tiny.read_bytes()[: end - 1000])
    assert f"1000 of {end} bytes are missing" in refusal(tiny)


def test_every_truncation_of_a_header_is_refused(tiny: Path) -> None:
    raw = tiny.read_bytes()
    head = read_header(tiny).data_start
    for size in range(0, head, 97):
        tiny.write_bytes(raw[:size])
        refusal(tiny)


def test_header_outlives_its_file(tiny: Path) -> None:
    mutant = Mutant.read(tiny)
    mutant.fields["words"] = Field(ValueType.STRING, ["a"] * 2000)
    header = read_header(mutant.write(tiny))
    tiny.unlink()
    assert header.get("words") == ("a",) * 2000


def test_header_without_end_is_refused_before_it_fills_the_memory(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged count may make an array of the weights; they are no header to be kept."""
    monkeypatch.setattr(gguf_header, "MAX_HEADER_BYTES", 1 << 20)
    monkeypatch.setattr(gguf_header, "_CHUNK_BYTES", 1 << 16)
    mutant = Mutant.read(tiny)
    mutant.fields["numbers"] = Field(ValueType.FLOAT64, [0.0] * (1 << 18))
    assert "longer than 1 MiB" in refusal(mutant.write(tiny))


COUNTED = """
import sys
from pathlib import Path
from moe_gguf.runtime.formats.open import read_layout
from moe_gguf.runtime.formats.stream import stream_of

def bytes_read():
    return int(Path("/proc/self/io").read_text().split()[1])

opened = []
sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" else None)
before = bytes_read()
stream_of(layout := read_layout(Path(sys.argv[1])))
after = bytes_read()
opens = sum(str(name) == sys.argv[1] for name in opened)
print(opens, after - before, layout.metadata.data_start)
"""


def test_header_is_opened_once_and_read_once(tiny: Path) -> None:
    """Read, validated and described to llama.cpp: 6 MB of vocabulary, one open, no byte twice."""
    mutant = Mutant.read(tiny)
    words = [f"token {i:029}" for i in range(150_000)]
    mutant.fields["tokenizer.ggml.tokens"] = Field(ValueType.STRING, list(words))
    mutant.weights["token_embd.weight"].ne[1] = len(words)
    mutant.weights["token_embd.weight"].ggml_type = 2  # Q4_0: no more than need be
    path = mutant.write(tiny)
    command = [sys.executable, "-c", COUNTED, path]
    done = subprocess.run(command, check=True, capture_output=True)
    opens, n_bytes, header_bytes = map(int, done.stdout.split())
    assert header_bytes > 6_000_000
    assert opens == 1
    assert header_bytes <= n_bytes < header_bytes + (4 << 20) + 10_000  # and /proc/self/io
