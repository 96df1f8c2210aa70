"""Lets a child process meet a model first, so that a file that ends llama.cpp ends only that.

llama.cpp reports most faults of a file and asserts on others, and an assertion ends the process.
No table of rules can tell which, so a child is shown the header and, in place of the weights, pages
of zeros. It loads the model with stock llama.cpp, tokenizes, makes a context and computes a few
tokens. If it dies, the model is refused with llama.cpp's last words; what llama.cpp reports by
itself is left to it. A verdict is remembered under what the child saw.

What a pass proves depends on the model's size, because a second is long to wait. Of every model it
proves that header, vocabulary, shapes and graph do no harm. Up to ``SMALL_BYTES`` it also proves
that every kernel the model needs computes one token, and several at once. Of a larger one it proves
that of one token only, and as far as ``COMPUTE_S`` goes: to the end where a token takes a GB of
weights or less, else through the first layers, whose kinds the others repeat.

No model is exempt. An architecture that the tests cover could be, if the presence of a key were
what kills; but its value is, and a known architecture with a strange number in it is the common
case of a damaged file.

Knows nothing of slots, budgets and policies. Run as a module this is the child, which reads the
header from its standard input and imports little, because everybody waits for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import json
import math
import mmap
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from . import cache, child
from .errors import UserError

if TYPE_CHECKING:
    from .formats.layout import ModelLayout
    from .formats.stream import Stream

PROTOCOL = 2  # of what a child does: verdicts of others do not count

CPU_S = 20  # a child's own, of which the largest models known take 1
WALL_S_PER_CPU_S = 10  # for a machine that is busy with other things
MEMORY_BYTES = 4 << 30  # a child's own; the zeros take none

SMALL_BYTES = 1 << 30  # up to here several tokens are computed at once, too, and without haste
COMPUTE_S = 0.1  # of CPU, for a token of a larger model
N_CTX, N_BATCH = 64, 16  # enough for every graph there is, and little memory
_TEXT = bytes(range(1, 256)) + " Hello wörld 1234 \U0001f600 <|eos|></s>\n".encode()

# A child computes on the processor: a GPU would want more than a child may take.
_ALONE = {"GGML_NO_BACKTRACE": "1", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}

_DEADLY = {signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
_LAST_WORDS = re.compile(r"GGML_ASSERT|GGML_ABORT|what\(\):|terminate called|: error|failed")
_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_LATE = 2  # what llama_decode returns when it is told to stop
_SAID_BYTES = 1 << 16  # the end of what a child says is looked at


class Verdict(NamedTuple):
    """The signal that ended a child, 0 if none did, and its last words."""

    signal: int
    said: str


LIVED = Verdict(0, "")


# --- in this process ----------------------------------------------------------------------------


def check(layout: ModelLayout) -> None:
    """Raise a UserError if llama.cpp would not survive this model."""
    from .formats.stream import stream_of

    stream = stream_of(layout)
    place = _place(stream)
    verdict = _recall(place)
    if verdict is None:
        verdict = send(*stream)
        if verdict.signal == 0 or verdict.signal in _DEADLY:
            _remember(place, verdict)
    if verdict.signal == signal.SIGXCPU:
        reason = "llama.cpp does not come to an end with it"
    elif verdict.signal in _DEADLY:
        reason = f"llama.cpp does not survive it: {verdict.said}"
    else:
        return
    raise UserError(f"{layout.path}: {reason}; download or convert the model again")


def send(header: bytes, stream_bytes: int, cpu_s: float = CPU_S) -> Verdict:
    """Have a child meet the model of this header.

    Where no child can be started, and where one is ended from outside, nothing is held against
    the model.
    """
    command = child.command(__name__, str(stream_bytes), str(int(cpu_s) + 1))
    try:
        with tempfile.TemporaryFile() as said:
            done = subprocess.run(
                command,
                input=header,
                stdout=subprocess.DEVNULL,
                stderr=said,
                cwd=child.FOLDER,
                env=os.environ | _ALONE,
                start_new_session=True,  # Ctrl-C is for this process, which ends the child
                timeout=cpu_s * WALL_S_PER_CPU_S,
                check=False,
            )
            return verdict_of(max(0, -done.returncode), said)
    except subprocess.TimeoutExpired:
        return Verdict(signal.SIGXCPU, "")
    except OSError:
        return LIVED


def verdict_of(number: int, said: IO[bytes]) -> Verdict:
    """The verdict on a child that this signal ended, whose output lies in a file."""
    if number == 0:
        return LIVED
    said.seek(0, os.SEEK_END)
    said.seek(max(0, said.tell() - _SAID_BYTES))
    lines = said.read().decode("utf-8", "replace").splitlines()
    telling = [line for line in lines if _LAST_WORDS.search(line)]
    line = (telling or [signal.strsignal(number) or f"signal {number}"])[-1].strip()
    line = re.sub(r"^\S*/(?=[^/\s]+:\d+: )", "", line)  # where llama.cpp was compiled
    return Verdict(number, "".join(c if c.isprintable() else "?" for c in line)[:300])


# --- what is remembered -------------------------------------------------------------------------


def folder() -> Path:
    """Where verdicts are kept, one small file each."""
    return cache.folder() / "trials"


def _place(stream: Stream) -> Path | None:
    """The file of the verdict on this stream here: by this llama.cpp, on this processor."""
    import importlib.metadata

    import llama_cpp
    import xxhash

    try:
        version = importlib.metadata.version("moe-gguf")
    except importlib.metadata.PackageNotFoundError:  # the plugin will say so
        return None
    who = (
        PROTOCOL,
        version,
        llama_cpp.__version__,
        llama_cpp.llama_print_system_info().decode(),
        stream.n_bytes,
    )
    name = xxhash.xxh3_128_hexdigest(repr(who).encode() + stream.header)
    try:
        return folder() / name
    except RuntimeError:  # a user without a home
        return None


def _recall(place: Path | None) -> Verdict | None:
    if place is None:
        return None
    try:
        match json.loads(place.read_text()):
            case [int(number), str(said)]:
                return Verdict(number, said)
    except (OSError, ValueError):  # there is none, or it is damaged
        pass
    return None


def _remember(place: Path | None, verdict: Verdict) -> None:
    """Keep it if that is possible; the next time costs as much as this one if not."""
    if place is None:
        return
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=place.parent, delete=False) as file:
            json.dump(verdict, file)
        Path(file.name).replace(place)


# --- in the child -------------------------------------------------------------------------------


def main() -> None:
    stream_bytes, cpu_s = map(int, sys.argv[1:])
    limit(cpu_s)
    meet(sys.stdin.buffer.read(), stream_bytes)
    os._exit(0)


def bindings() -> Any:
    """llama_cpp's low level, without the package around it: half of the time until it is there."""
    if "llama_cpp" not in sys.modules:
        spec = importlib.util.find_spec("llama_cpp")
        assert spec is not None
        package = types.ModuleType("llama_cpp")
        package.__path__ = list(spec.submodule_search_locations or ())
        sys.modules["llama_cpp"] = package
        low = importlib.import_module("llama_cpp.llama_cpp")
        vars(package).update({k: v for k, v in vars(low).items() if not k.startswith("__")})
    return sys.modules["llama_cpp"]


def limit(cpu_s: int) -> None:
    child.limit({resource.RLIMIT_CPU: cpu_s, resource.RLIMIT_DATA: MEMORY_BYTES})


def meet(header: bytes, stream_bytes: int) -> bool:
    """Load, tokenize and compute, if llama.cpp does not object; whether all of it was done.

    Where it is not, for want of memory perhaps, a simulation goes on to the graph: opening starts
    with one.
    """
    lc = bindings()
    from .plugin.abi import ABI, Config
    from .plugin.model import PluginModel

    @lc.llama_log_callback
    def on_line(level: int, text: bytes, _: Any) -> None:
        if level == _ERROR:
            sys.stderr.buffer.write(text)
            sys.stderr.buffer.flush()

    config = Config(abi=ABI, lanes=1, stream_bytes=stream_bytes)
    config.header, config.header_bytes = header, len(header)
    plugin = PluginModel(config)
    lc.llama_log_set(on_line, None)
    params = lc.llama_model_default_params()
    params.load_mode = lc.LLAMA_LOAD_MODE_MMAP
    params.lazy_mode = lc.LLAMA_LAZY_MODE_OFF
    params.use_extra_bufts = False
    nothing = (ctypes.c_void_p * 1)()
    params.devices = ctypes.cast(nothing, ctypes.c_void_p)  # none but the processor
    with plugin.stream() as stream:
        model = lc.llama_model_load_from_file_ptr(stream, params)
        is_blank = _blank()
    is_small = stream_bytes <= SMALL_BYTES
    if model and is_blank and _compute(lc, model, (4, 1) if is_small else (1,), not is_small):
        return True
    params.no_alloc, params.load_mode = True, lc.LLAMA_LOAD_MODE_NONE
    with plugin.stream() as stream:
        model = lc.llama_model_load_from_file_ptr(stream, params)
    if model:
        _compute(lc, model, ())
    return False


def _compute(lc: Any, model: Any, batches: tuple[int, ...], in_haste: bool = False) -> bool:
    """Have a model tokenize, and compute batches of so many tokens; whether it did.

    In haste each is left unfinished after ``COMPUTE_S``.
    """
    params = lc.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = N_CTX, N_BATCH, N_BATCH
    params.n_threads = params.n_threads_batch = 1  # more would wait, and busily
    end = math.inf

    @lc.ggml_abort_callback
    def is_late(_: Any) -> bool:
        return time.process_time() > end

    params.abort_callback = is_late
    context = lc.llama_init_from_model(model, params)
    vocab = lc.llama_model_get_vocab(model)
    if lc.llama_vocab_type(vocab) != lc.LLAMA_VOCAB_TYPE_NONE:
        _speak(lc, vocab)
    codes = []
    if context:
        for n in batches:
            tokens = (lc.llama_token * n)(*range(n))
            end = time.process_time() + COMPUTE_S if in_haste else math.inf
            codes.append(lc.llama_decode(context, lc.llama_batch_get_one(tokens, n)))
        lc.llama_free(context)
    lc.llama_model_free(model)
    return bool(codes) and set(codes) <= {0, _LATE}


def _speak(lc: Any, vocab: Any) -> None:
    tokens = (lc.llama_token * 1024)()
    lc.llama_tokenize(vocab, _TEXT, len(_TEXT), tokens, len(tokens), True, True)
    piece = ctypes.create_string_buffer(256)
    n_vocab = lc.llama_vocab_n_tokens(vocab)
    for token in {*range(min(n_vocab, 300)), n_vocab - 1}:
        lc.llama_token_to_piece(vocab, token, piece, len(piece), 0, True)


def _blank() -> bool:
    """Lay zeros over the plugin's empty mapping, where llama.cpp takes the weights to be; whether
    there is one.

    Pages of zeros that are only read are one page, shared by all.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    map_fixed = 0x10
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | map_fixed
    lines = Path("/proc/self/maps").read_text().splitlines()
    places = [line.split()[0] for line in lines if "memfd:moe-gguf" in line]
    for place in places:
        start, end = (int(number, 16) for number in place.split("-"))
        placed = libc.mmap(start, end - start, mmap.PROT_READ, flags, -1, 0)
        assert placed == start, f"zeros cannot be mapped: {os.strerror(ctypes.get_errno())}"
        libc.madvise(start, end - start, mmap.MADV_HUGEPAGE)
    return bool(places)


if __name__ == "__main__":
    main()
