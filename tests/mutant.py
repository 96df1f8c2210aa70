"""GGUF files to be damaged on purpose, and a process in which llama.cpp may die of them.

Mutant holds a file's fields as values, so that a test can change one and write the rest as it
was. Helper gives each file a child of one process, to be opened by stock llama.cpp or to be tried,
and tells how the child ended. Run as a script, this file is that process.
"""

from __future__ import annotations

import functools
import json
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from moe_gguf import Llama
from moe_gguf.runtime import trial
from moe_gguf.runtime.formats.ggml_types import GGML_TYPES, pad_up, type_bytes
from moe_gguf.runtime.formats.gguf_header import Scalar, ValueType, read_header
from moe_gguf.runtime.plugin import library

T = ValueType
_CODES = {T.UINT8: "B", T.INT8: "b", T.UINT16: "H", T.INT16: "h", T.UINT32: "I", T.INT32: "i"}
_CODES |= {T.FLOAT32: "f", T.BOOL: "B", T.UINT64: "Q", T.INT64: "q", T.FLOAT64: "d"}


@dataclass
class Field:
    """A metadata value: of a list, kind is that of its items."""

    kind: ValueType
    value: Scalar | list[Scalar]

    def write(self) -> bytes:
        if isinstance(self.value, list):
            items = b"".join(_scalar(self.kind, v) for v in self.value)
            return struct.pack("<IIQ", T.ARRAY, self.kind, len(self.value)) + items
        return struct.pack("<I", self.kind) + _scalar(self.kind, self.value)


def _scalar(kind: ValueType, value: Scalar) -> bytes:
    if kind is T.STRING:
        raw = str(value).encode("utf-8", "replace")
        return struct.pack("<Q", len(raw)) + raw
    if kind in (T.FLOAT32, T.FLOAT64):
        return struct.pack("<" + _CODES[kind], float(value))
    size = struct.calcsize("<" + _CODES[kind])
    return (int(value) % (1 << 8 * size)).to_bytes(size, "little")


@dataclass
class Weight:
    """A tensor: shape and type may be changed, its data is then cut or repeated to fit."""

    ne: list[int]
    ggml_type: int
    data: bytes

    def fitted(self) -> bytes:
        items = 1
        for d in self.ne:
            items *= d
        block = GGML_TYPES[self.ggml_type].block if self.ggml_type in GGML_TYPES else 1
        size = type_bytes(self.ggml_type, items // block * block)
        if size > 1 << 26:  # no need to write it out: it will not be read
            return b""
        return (self.data * (size // max(1, len(self.data)) + 1))[:size]


@dataclass
class Mutant:
    """A whole file as values; write() lays it out anew, with offsets that agree."""

    fields: dict[str, Field]
    weights: dict[str, Weight]
    alignment: int = 32
    version: int = 3

    @classmethod
    def read(cls, path: Path) -> Mutant:
        header = read_header(path)
        fields: dict[str, Field] = {}
        for key, pair in header.pairs.items():
            value = header.get(key)
            assert value is not None
            if isinstance(value, tuple):
                value = list(value)
            fields[key] = Field(pair.kind if pair.item is None else pair.item, value)
        raw = path.read_bytes()[header.data_start :]
        weights = {
            t.name: Weight(list(t.ne), t.ggml_type, raw[t.offset : t.offset + t.n_bytes])
            for t in header.tensors
        }
        return cls(fields, weights, header.alignment)

    def head(self) -> bytes:
        """Everything before the data."""
        infos = list(self.weights.items())
        out = bytearray(b"GGUF" + struct.pack("<IQQ", self.version, len(infos), len(self.fields)))
        for key, value in self.fields.items():
            out += struct.pack("<Q", len(key.encode())) + key.encode() + value.write()
        offset = 0
        for name, weight in infos:
            out += struct.pack("<Q", len(name.encode())) + name.encode()
            dims = [d % (1 << 64) for d in weight.ne]
            out += struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
            out += struct.pack("<IQ", weight.ggml_type % (1 << 32), offset)
            offset += pad_up(len(weight.fitted()), self.alignment)
        return bytes(out + bytes(-len(out) % self.alignment))

    def write(self, path: Path) -> Path:
        with path.open("wb") as file:
            file.write(self.head())
            for weight in self.weights.values():
                data = weight.fitted()
                file.write(data + bytes(-len(data) % self.alignment))
        return path


# --- mutations ----------------------------------------------------------------------------------

Choose = Callable[[int], int]  # a number in [0, n)

_INTS: tuple[int, ...] = (
    0,
    1,
    2,
    3,
    5,
    7,
    8,
    15,
    16,
    17,
    31,
    33,
    63,
    64,
    65,
    100,
    127,
    128,
    255,
    256,
    257,
    300,
)
_INTS += (304, 305, 306, 511, 512, 513, 1000, 1023, 1024, 1025, 4096, 65535, 65536, 1 << 20)
_INTS += (1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 32) - 2, 1 << 40, (1 << 63) - 1)
_FLOATS: tuple[float, ...] = (0.0, -0.0, 1.0, -1.0, 1e-6, 1e-45, 1e30, -1e30, 0.5, 2.0, 10000.0)
_FLOATS += (float("inf"), -float("inf"), float("nan"))
_WORDS: tuple[str, ...] = (
    "",
    "llama",
    "gpt2",
    "bert",
    "t5",
    "rwkv",
    "plamo2",
    "no_vocab",
    "none",
    "default",
)
_WORDS += ("llama-bpe", "qwen2", "tekken", "gpt-4o", "yarn", "longrope", "linear", "x" * 300)
_WORDS += ("a b", " ", "\0", "\x80\xff", "é", "Ġ", "<|eos|>", "gelu", "silu", "[", "hybriddna")
_ARCHITECTURES = (
    "afmoe arctic bailingmoe bailingmoe2 cohere2moe dbrx deepseek deepseek2 deepseek32"
    " deepseek4 dots1 ernie4_5-moe exaone-moe gemma4 glm4moe glm-dsa glm5-next gpt-oss"
    " granitehybrid granitemoe grok grovemoe hunyuan-moe hy_v3 jamba kimi-k3 kimi-linear"
    " laguna lfm2moe llada-moe llama llama4 mellum mimo2 minimax-01 minimax-m2 minimax-m3"
    " mistral3 mistral4 nemotron_h_moe olmoe phimoe qwen2moe qwen35moe qwen3moe qwen3next"
    " qwen3vlmoe qwen4exp rnd1 smallthinker step35 bert t5 clip mamba rwkv7 wavtokenizer-dec"
    " gemma-embedding no-such-thing"
)
ARCHITECTURES = tuple(_ARCHITECTURES.split())
_KINDS = tuple(k for k in ValueType if k is not T.ARRAY)


@functools.cache
def llama_keys() -> list[str]:
    """Every key the installed llama.cpp knows, found in its library; ".x" is an architecture's."""
    import llama_cpp

    library = next((Path(llama_cpp.__file__).parent / "lib").glob("*llama.*"))
    found = re.findall(rb"%s(\.[a-z0-9_.]+)|(tokenizer\.[a-z_.]+)", library.read_bytes())
    return sorted({(own or other).decode() for own, other in found})


def _value(choose: Choose, kind: ValueType) -> Scalar:
    if kind is T.STRING:
        return _WORDS[choose(len(_WORDS))]
    if kind in (T.FLOAT32, T.FLOAT64):
        return _FLOATS[choose(len(_FLOATS))]
    return _INTS[choose(len(_INTS))]


def mutate(mutant: Mutant, choose: Choose, keys: list[str]) -> str:
    """Change one thing about a file; says what."""
    action = choose(13)
    named = mutant.fields.get("general.architecture")  # an earlier change may have taken it
    arch = str(named.value) if named else ""
    names, weights = list(mutant.fields), list(mutant.weights)
    if action < 5 and names:
        key = names[choose(len(names))]
        return f"{key} = {_mutate_field(mutant.fields[key], choose)}"
    if action < 7:
        key = keys[choose(len(keys))]
        key = arch + key if key.startswith(".") else key
        kind = (T.UINT32, T.UINT32, T.FLOAT32, T.BOOL, T.STRING, T.UINT32)[choose(6)]
        mutant.fields[key] = Field(kind, _value(choose, kind))
        return f"new {key} = {mutant.fields[key]}"
    if action == 7 and names:
        key = names[choose(len(names))]
        del mutant.fields[key]
        return f"no {key}"
    if action == 8 and arch:
        new = ARCHITECTURES[choose(len(ARCHITECTURES))]
        mutant.fields = {
            re.sub(f"^{re.escape(arch)}\\.", f"{new}.", key): v for key, v in mutant.fields.items()
        }
        mutant.fields["general.architecture"] = Field(T.STRING, new)
        return f"architecture {new}"
    if not weights:
        return "nothing"
    name = weights[choose(len(weights))]
    weight = mutant.weights[name]
    if action == 9:
        del mutant.weights[name]
        return f"no {name}"
    if action == 10:
        new = _rename(name, choose)
        mutant.weights = {new if n == name else n: w for n, w in mutant.weights.items()}
        return f"{name} renamed {new}"
    if action == 11:
        kinds = sorted(GGML_TYPES)
        weight.ggml_type = kinds[choose(len(kinds))]
        return f"{name} is {GGML_TYPES[weight.ggml_type].name}"
    return f"{name} {_reshape(weight, choose)}"


def _mutate_field(field: Field, choose: Choose) -> str:
    if isinstance(field.value, list):
        n = len(field.value)
        how = choose(5)
        if how == 0:
            field.value = field.value[: choose(n + 1)]
        elif how == 1:
            field.value = field.value + field.value[: choose(n + 1)]
        elif how == 2:
            field.kind = _KINDS[choose(len(_KINDS))]
            field.value = [_value(choose, field.kind)] * n
        elif how == 3 and n:
            field.value[choose(n)] = _value(choose, field.kind)
        else:
            field.value = [_value(choose, field.kind)] * n
        return f"{field.kind.name}[{len(field.value)}] {field.value[:4]}"
    if choose(6) == 0:
        field.kind = _KINDS[choose(len(_KINDS))]
    field.value = _value(choose, field.kind)
    if choose(8) == 0:
        field.value = [field.value] * (1, 2, 3, 4, 5, 600)[choose(6)]
    return f"{field.kind.name} {field.value!r}"[:200]


def _rename(name: str, choose: Choose) -> str:
    how = choose(4)
    if how == 0:
        return re.sub(r"blk\.\d+", f"blk.{(0, 1, 3, 9, 511, 512, 99999)[choose(7)]}", name)
    if how == 1:
        return name.replace("weight", "bias")
    if how == 2:
        return name.replace("weight", "scale")
    parts = ("attn_q", "ffn_up_exps", "ffn_gate_inp", "attn_norm", "ffn_down_shexp", "attn_qkv")
    return re.sub(r"^(blk\.\d+)\.[a-z_]+", rf"\1.{parts[choose(len(parts))]}", name)


def _reshape(weight: Weight, choose: Choose) -> str:
    how = choose(4)
    dim = choose(len(weight.ne))
    if how == 0:
        weight.ne[dim] = (0, 1, 2, 3, 32, 64, 96, 128, 256, 305, 512, 1 << 20, 1 << 62)[choose(13)]
    elif how == 1:
        weight.ne = weight.ne[::-1]
    elif how == 2:
        weight.ne = [*weight.ne, 1][:5]
    else:
        weight.ne[dim] = weight.ne[dim] * 2
    return f"has shape {weight.ne}"


# --- opening a file in a process of its own -----------------------------------------------------


COMPUTED = b"computed\n"


class Death(NamedTuple):
    """How a child ended: its signal (0: it lived), and the last it said."""

    signal: int
    said: str


class Helper:
    """A process that has llama.cpp loaded and forks a child for each task: one that opens a file
    and computes, by stock llama.cpp or by moe_gguf.Llama, or one that meets a model as in a trial.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.sent = 0  # trials
        self.has_computed = False  # in the last one llama.cpp objected to nothing
        self.log = Path()

    def __enter__(self) -> Helper:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        if self.process is not None:
            self.process.communicate()
            self.log.unlink()
            self.process = None

    def open(self, path: Path) -> Death:
        """Stock: vocabulary, weights, context, one batch of four tokens."""
        return self._death({"stock": str(path)})

    def open_ours(self, path: Path) -> Death:
        """The same by moe_gguf.Llama; an exception is no death."""
        return self._death({"ours": str(path)})

    def _death(self, task: dict[str, str | int]) -> Death:
        number = self._do(task)
        said = self.log.read_text(errors="replace")
        lines = [text for text in said.splitlines() if text.strip()]
        fatal = [text for text in lines if "GGML_ASSERT" in text or "GGML_ABORT" in text]
        return Death(number, (fatal or lines or [""])[-1])

    def send(self, header: bytes, stream_bytes: int, cpu_s: float = trial.CPU_S) -> trial.Verdict:
        """In the place of trial.send, without the second that a fresh process takes."""
        with tempfile.NamedTemporaryFile() as file:
            file.write(header)
            file.flush()
            task = {"header": file.name, "stream_bytes": stream_bytes, "cpu_s": int(cpu_s)}
            number = self._do(task)
        self.sent += 1
        self.has_computed = self.log.read_bytes().endswith(COMPUTED)
        with self.log.open("rb") as said:
            return trial.verdict_of(number, said)

    def _do(self, task: dict[str, str | int]) -> int:
        """The signal that ended the child of this task."""
        if self.process is None:
            handle, log = tempfile.mkstemp(suffix=".log")
            os.close(handle)
            self.log = Path(log)
            self.process = subprocess.Popen(
                [sys.executable, __file__, log],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"GGML_NO_BACKTRACE": "1"},
                start_new_session=True,  # a test's Ctrl-C is not for it
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the helper process itself died"
        return int(line)


def _serve(log: str) -> None:
    """Fork a child per task read from stdin; print the signal that ended it."""
    library.load()
    for line in sys.stdin:
        task = json.loads(line)
        child = os.fork()
        if child == 0:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            try:
                _child(task)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, flush=True)


def _child(task: dict[str, Any]) -> None:
    if "header" in task:
        trial.limit(task["cpu_s"])
        if trial.meet(Path(task["header"]).read_bytes(), task["stream_bytes"]):
            os.write(1, COMPUTED)
    else:
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.alarm(20)
        if "stock" in task:
            _open(task["stock"].encode())
        else:
            _open_ours(task["ours"])
    os._exit(0)


def _open_ours(path: str) -> None:
    try:
        llm = Llama(path, memory="1GB", policy="lru", n_ctx=64, n_batch=8, n_threads=1)
        llm.tokenize(b"Hello world 123 <|eos|>\n", special=True)
        llm.eval([0, 1, 2, 3])
        llm.detokenize([llm.sample(temp=0.0)])
        llm.close()
    except Exception as error:
        print(f"{type(error).__name__}: {error}")


def _open(path: bytes) -> None:
    import llama_cpp as lc

    params = lc.llama_model_default_params()
    params.use_extra_bufts = False
    params.load_mode = 0  # none: no mapping
    model = lc.llama_model_load_from_file(path, params)
    if not model:
        return
    context_params = lc.llama_context_default_params()
    context_params.n_ctx, context_params.n_batch, context_params.n_ubatch = 64, 8, 8
    context_params.n_threads = context_params.n_threads_batch = 1
    context = lc.llama_init_from_model(model, context_params)
    if not context:
        return
    vocab = lc.llama_model_get_vocab(model)
    tokens = (lc.llama_token * 64)()
    text = b"Hello world 123 <|eos|>\n"
    lc.llama_tokenize(vocab, text, len(text), tokens, 64, True, True)
    for i in range(4):
        tokens[i] = i
    lc.llama_decode(context, lc.llama_batch_get_one(tokens, 4))
    logits = lc.llama_get_logits_ith(context, -1)
    if logits:
        piece = bytes(64)
        n_vocab = lc.llama_vocab_n_tokens(vocab)
        best = max(range(n_vocab), key=logits.__getitem__)
        buffer = lc.ctypes.create_string_buffer(piece, 64)
        lc.llama_token_to_piece(vocab, best, buffer, 64, 0, True)
    lc.llama_free(context)
    lc.llama_model_free(model)


if __name__ == "__main__":
    _serve(sys.argv[1])
