"""The binary interfaces: ours between plugin and Python, and the part of ggml's that the plugin
declares itself because ggml installs only its callers' half.

Three views of each must agree: the header a compiler sees, the ctypes mirror or a pinned number,
and the libraries in this process.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import llama_cpp
import pytest
import tiny
from conftest import TinyFile, missing
from harness import ours, random_tokens, rows

from moe_gguf import UserError
from moe_gguf.policies.base import Phase
from moe_gguf.policies.predict import Variant
from moe_gguf.runtime.binding import BuftOverride
from moe_gguf.runtime.formats.layout import ModelLayout
from moe_gguf.runtime.plugin import abi, library, model
from moe_gguf.runtime.plugin.gates import Gating

NATIVE = Path(__file__).parent.parent / "runtime" / "native"
INCLUDE = Path(str(importlib.metadata.distribution("llama-cpp-python").locate_file("include")))

MIRRORS: dict[str, type[ctypes.Structure]] = {
    "moe_tensor": abi.Tensor,
    "moe_part": abi.Part,
    "moe_transform": abi.Transform,
    "moe_trunk_tensor": abi.TrunkTensor,
    "moe_table": abi.Table,
    "moe_config": abi.Config,
    "moe_call": abi.Call,
    "moe_router": abi.Router,
    "moe_gates_config": abi.GatesConfig,
    "moe_stats": abi.Stats,
    "moe_event": abi.Event,
    "moe_probe": abi.Probe,
}

# sizeof of ggml's own declarations in ggml-backend-impl.h, release 0.3.36 of llama-cpp-python
# (ggml-backend API version 2), on 64-bit systems. A struct of function pointers is 8 bytes each.
# Version 3 differs in the table of a buffer type alone.
GGML_SIZES = {
    "ggml_backend_buffer_i": 11 * 8,
    "ggml_backend_buffer": 11 * 8 + 32,
    "ggml_backend_i": 16 * 8,
    "ggml_backend": 8 + 16 * 8 + 16,
    "ggml_backend_device_i": 15 * 8,
    "ggml_backend_device": 15 * 8 + 16,
    "ggml_backend_reg_i": 4 * 8,
    "ggml_backend_reg": 8 + 4 * 8 + 8,
    "ggml_tensor": 336,  # public in ggml.h, but the executor writes its fields
}
# Members of ggml_backend_buffer_type_i by version, in ggml's order: result, parameters after the
# first, and what ours answers in the test, 0 for a member that is null.
BUFFER_TYPE_MEMBERS = {
    2: {
        "get_name": ("const char *", "", 6),
        "alloc_buffer": ("ggml_backend_buffer_t", "size_t", 2),
        "get_alignment": ("size_t", "", 3),
        "get_max_size": ("size_t", "", 4),
        "get_alloc_size": ("size_t", "const ggml_tensor *", 5),
        "is_host": ("bool", "", 1),
    },
    3: {
        "get_name": ("const char *", "", 6),
        "alloc_buffer": ("ggml_backend_buffer_t", "size_t", 2),
        "alloc_buffer_n": ("ggml_backend_buffer_t", "ggml_tensor **, int", 0),
        "get_alignment": ("size_t", "", 3),
        "get_max_size": ("size_t", "", 4),
        "get_alloc_size": ("size_t", "const ggml_tensor *", 5),
        "get_alloc_size_n": ("size_t", "ggml_tensor **, int", 0),
        "is_host": ("bool", "", 1),
    },
}


def compiled(source: str, folder: Path, declarations: str = "") -> dict[str, int]:
    """What a program against the plugin's headers prints, as ``name number`` lines."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        missing("no C++ compiler")
    program = folder / "sizes"
    flags = ["-std=c++17", "-Wno-invalid-offsetof", f"-I{NATIVE}", f"-I{INCLUDE}"]
    includes = ["#include <cstddef>", "#include <cstdio>", '#include "moe.h"']
    includes += ['#include "ggml-iface.h"', '#include "buffer_type.h"']
    lines = [*includes, declarations, "int main() {", source, "}"]
    subprocess.run(
        [str(compiler), *flags, "-o", str(program), "-x", "c++", "-"],
        input="\n".join(lines),
        text=True,
        check=True,
    )
    done = subprocess.run([program], capture_output=True, text=True, check=True)
    return {name: int(n) for name, n in (line.split() for line in done.stdout.splitlines())}


def show(name: str, expression: str) -> str:
    return f'std::printf("%s %lld\\n", "{name}", (long long)({expression}));'


def test_the_mirror_equals_the_header(tmp_path: Path) -> None:
    lines = [show("MOE_ABI", "MOE_ABI"), show("MOE_MAX_GUESSES", "MOE_MAX_GUESSES")]
    expected = {"MOE_ABI": abi.ABI, "MOE_MAX_GUESSES": abi.MAX_GUESSES}
    for name in ("COPIES", "GGML_OLDEST", "GGML_NEWEST"):
        lines.append(show(f"MOE_{name}", f"MOE_{name}"))
        expected[f"MOE_{name}"] = getattr(abi, name)
    for name, mirror in MIRRORS.items():
        lines.append(show(name, f"sizeof(struct {name})"))
        expected[name] = ctypes.sizeof(mirror)
        for field, *_ in mirror._fields_:
            member = f"{name}.{field}"
            lines.append(show(f"{member}@", f"offsetof(struct {name}, {field})"))
            lines.append(show(f"{member}#", f"sizeof((({name} *)0)->{field})"))
            descriptor = getattr(mirror, field)
            expected[f"{member}@"], expected[f"{member}#"] = descriptor.offset, descriptor.size
    assert compiled("\n".join(lines), tmp_path) == expected


def test_the_mirror_is_complete() -> None:
    """Every struct and function of moe.h is mirrored, and the functions are typed."""
    text = re.sub(r"//.*", "", (NATIVE / "moe.h").read_text())
    structs = set(re.findall(r"^struct (\w+) \{", text, re.MULTILINE))
    assert structs == MIRRORS.keys()
    functions = re.findall(r"^MOE_API\s+[^;(]*?(\w+)\(([^;]*)\);", text, re.MULTILINE)
    assert len(functions) == text.count("MOE_API ") - text.count("define MOE_API ")
    lib = library.load()
    for name, arguments in functions:
        n_arguments = 0 if arguments.strip() == "void" else arguments.count(",") + 1
        assert len(getattr(lib, name).argtypes or ()) == n_arguments, name


def test_errors_have_the_numbers_of_the_header() -> None:
    text = (NATIVE / "failure.h").read_text()
    numbers = re.search(r"ERROR_NONE = (\d), ERROR_READ = (\d), ERROR_OTHER = (\d)", text)
    assert numbers
    assert tuple(map(int, numbers.groups())) == (
        abi.ERROR_NONE,
        abi.ERROR_READ,
        abi.ERROR_OTHER,
    )


def test_event_kinds_have_the_numbers_of_the_header() -> None:
    text = (NATIVE / "moe.h").read_text()
    kinds = dict(re.findall(r"MOE_(EVENT_\w+)\s+= (\d)", text))
    assert kinds
    assert {name: int(n) for name, n in kinds.items()} == {
        name: value for name, value in vars(abi).items() if name.startswith("EVENT_")
    }


def test_phases_have_the_numbers_of_the_header() -> None:
    names = re.findall(r"MOE_PHASE_(\w+)(?: = 0)?,", (NATIVE / "moe.h").read_text())
    assert {name.lower(): i for i, name in enumerate(names)} == abi.PHASES
    assert {phase.name.lower(): int(phase) for phase in Phase} == abi.PHASES


def test_a_chunk_is_as_long_as_the_reads_say() -> None:
    shift = re.search(r" CHUNK_BYTES\s+= (\d+) << 20;", (NATIVE / "reads.h").read_text())
    assert shift
    assert int(shift[1]) << 19 == abi.GUESS_CHUNK_BYTES  # half of it


def test_gatings_and_variants_have_the_numbers_of_the_header() -> None:
    names = re.findall(r"MOE_GATING_(\w+)", (NATIVE / "moe.h").read_text())
    assert [name.lower() for name in names] == list(abi.GATINGS)
    assert tuple(abi.GATINGS) == get_args(Gating)
    assert list(abi.GATINGS.values()) == list(range(len(names)))
    variants = re.findall(r"MOE_GATES_(\w+)(?: = 0)?,", (NATIVE / "moe.h").read_text())
    assert [name.lower() for name in variants] == list(abi.GATES_VARIANTS)
    assert tuple(abi.GATES_VARIANTS) == get_args(Variant)
    assert list(abi.GATES_VARIANTS.values()) == list(range(len(variants)))


def test_the_pinned_release_is_installed() -> None:
    """For another one, check ggml-iface.h against its ggml-backend-impl.h, then these numbers."""
    assert importlib.metadata.version("llama-cpp-python") == "0.3.36"
    required = importlib.metadata.requires("moe-gguf") or []
    assert "llama-cpp-python==0.3.36" in required


def test_ggml_s_structs_have_their_pinned_sizes(tmp_path: Path) -> None:
    lines = [show(name, f"sizeof(struct {name})") for name in GGML_SIZES]
    assert compiled("\n".join(lines), tmp_path) == GGML_SIZES


@pytest.mark.parametrize("version", BUFFER_TYPE_MEMBERS)
def test_a_buffer_type_speaks_each_version(tmp_path: Path, version: int) -> None:
    """Built by the plugin's own code, called as a host of that version would: by place."""
    members = BUFFER_TYPE_MEMBERS[version]
    host_table = "".join(
        f"{result} (*{name})(void *{parameters and ', ' + parameters});"
        for name, (result, parameters, _) in members.items()
    )
    ours = "".join(
        f"static {result} {name}(ggml_backend_buffer_type_t{parameters and ', ' + parameters}) "
        f"{{ return ({result}){answer}; }}\n"
        for name, (result, parameters, answer) in members.items()
        if answer
    )
    named = [name for name, (*_, answer) in members.items() if answer]
    source = f"""
        int owner;
        const moe::buffer_type_functions functions = {{{", ".join(named)}}};
        moe::buffer_type type({version}, functions, (ggml_backend_dev_t)7, &owner);
        auto * const host = (host_type *)type.ggml();
        {show("device", "host->device")}
        {show("owner", "moe::buffer_type::owner(type.ggml()) == &owner")}
        {show("is_ours", "moe::buffer_type::is_named_by(type.ggml(), get_name)")}
        {show("size", f"sizeof(moe::described_buffer_type<{version}>) - sizeof(host_type)")}
    """
    for name, (_, parameters, answer) in members.items():
        arguments = {"": "", "size_t": ", 8"}.get(parameters, ", nullptr")
        call = f"host->iface.{name}(host{arguments})" if answer else f"!!host->iface.{name}"
        source += show(name, call)
    host = f"struct host_type {{ struct {{ {host_table} }} iface; void * device, * context; }};"
    expected = {name: answer for name, (*_, answer) in members.items()}
    answers = compiled(source, tmp_path, f"{ours}{host}")
    assert answers == expected | {"device": 7, "owner": 1, "is_ours": 1, "size": 0}


@pytest.mark.parametrize("version", [1, 4])
def test_a_buffer_type_of_another_version_is_refused(tmp_path: Path, version: int) -> None:
    source = f"""
        bool refused = false;
        try {{
            moe::buffer_type type({version}, moe::buffer_type_functions(), nullptr, nullptr);
        }} catch (const std::runtime_error &) {{
            refused = true;
        }}
        {show("refused", "refused")}
    """
    assert compiled(source, tmp_path) == {"refused": 1}


REFUSED = """
import ctypes, sys
import llama_cpp
from moe_gguf import UserError
from moe_gguf.runtime.plugin import library

host = llama_cpp.llama_cpp._lib
llama_cpp.llama_backend_init()
host.ggml_backend_reg_get.restype = ctypes.c_void_p
host.ggml_backend_reg_get.argtypes = [ctypes.c_size_t]
ctypes.c_int32.from_address(host.ggml_backend_reg_get(0)).value = int(sys.argv[1])
try:
    library.load()
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("version", [1, 4, 6])
def test_another_interface_version_is_refused_in_one_sentence(version: int) -> None:
    """A process whose ggml says so of itself: nothing is registered, and the mend is named."""
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, str(version)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        f"this llama-cpp-python speaks version {version} of ggml's backend interface and moe-gguf "
        "versions 2 to 3: pip install llama-cpp-python==0.3.36"
    ]


def test_version_3_is_answered_with_version_3() -> None:
    """The ggml in this process speaks 2: where it claims 3, it gets a 3 and refuses that."""
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, "3"], capture_output=True, text=True, check=True
    )
    assert "it was built for another llama-cpp-python" in done.stdout


def test_what_differs_between_systems_is_in_one_file_per_system() -> None:
    system = re.compile(r"<(sys/\w+|fcntl|unistd|pthread|signal|windows)\.h>|memfd|_fileno|posix_")
    files = [file for file in NATIVE.iterdir() if file.suffix in (".h", ".cpp")]
    assert [file.name for file in files if system.search(file.read_text())] == ["os_linux.cpp"]


# --- against the libraries in this process --------------------------------------------------------


def host(name: str, *argtypes: Any, restype: Any = ctypes.c_void_p) -> Any:
    """A function of ggml through the libllama that llama_cpp loaded."""
    function = getattr(llama_cpp.llama_cpp._lib, name)
    function.argtypes, function.restype = argtypes, restype
    return function


def word(address: int, offset: int) -> int:
    return int(ctypes.c_uint64.from_address(address + offset).value)


pointer, size_t = ctypes.c_void_p, ctypes.c_size_t


@pytest.fixture(scope="module")
def devices() -> dict[str, int]:
    library.load()
    count = host("ggml_backend_dev_count", restype=size_t)()
    name = host("ggml_backend_dev_name", pointer, restype=ctypes.c_char_p)
    get = host("ggml_backend_dev_get", size_t)
    return {name(get(i)).decode(): get(i) for i in range(count)}


def test_live_registry_and_device(devices: dict[str, int]) -> None:
    """Where the declarations put a member, the running library keeps what it answers itself."""
    get_reg = host("ggml_backend_dev_backend_reg", pointer)
    reg_name = host("ggml_backend_reg_name", pointer, restype=ctypes.c_char_p)
    assert {"CPU", "MOE"} <= devices.keys()
    for name, device in devices.items():
        reg = get_reg(device)
        assert word(device, GGML_SIZES["ggml_backend_device_i"]) == reg, name
        assert ctypes.c_int32.from_address(reg).value == 2, f"{name} speaks another API version"
        get_name = ctypes.CFUNCTYPE(ctypes.c_char_p, pointer)(word(reg, 8))
        assert get_name(reg) == reg_name(reg)


def test_live_device_interface(devices: dict[str, int]) -> None:
    """First, middle and last members of the device table do what they are declared to do."""
    device = devices["CPU"]
    slot = {
        "get_name": 0,
        "get_type": 3,
        "get_buffer_type": 6,
        "buffer_from_host_ptr": 8,
        "supports_buft": 10,
        "event_synchronize": 14,
    }
    get_name = ctypes.CFUNCTYPE(ctypes.c_char_p, pointer)(word(device, 8 * slot["get_name"]))
    assert get_name(device) == b"CPU"
    get_type = ctypes.CFUNCTYPE(ctypes.c_int, pointer)(word(device, 8 * slot["get_type"]))
    assert get_type(device) == host("ggml_backend_dev_type", pointer, restype=ctypes.c_int)(device)
    get_buft = ctypes.CFUNCTYPE(pointer, pointer)(word(device, 8 * slot["get_buffer_type"]))
    buft = get_buft(device)
    assert buft == host("ggml_backend_dev_buffer_type", pointer)(device)
    supports = ctypes.CFUNCTYPE(ctypes.c_bool, pointer, pointer)(
        word(device, 8 * slot["supports_buft"])
    )
    assert supports(device, buft)
    assert word(device, 8 * slot["buffer_from_host_ptr"]) != 0
    assert word(device, 8 * slot["event_synchronize"]) == 0  # the CPU has no events


def test_live_backend(devices: dict[str, int]) -> None:
    init = host("ggml_backend_dev_init", pointer, ctypes.c_char_p)
    free = host("ggml_backend_free", pointer, restype=None)
    for name in ("CPU", "MOE"):
        backend = init(devices[name], None)
        assert word(backend, 8 + GGML_SIZES["ggml_backend_i"]) == devices[name]
        get_name = ctypes.CFUNCTYPE(ctypes.c_char_p, pointer)(word(backend, 8))
        assert get_name(backend) == name.encode()
        graph_compute = word(backend, 8 + 8 * 12)
        assert graph_compute != 0
        free(backend)


def test_live_buffer(devices: dict[str, int]) -> None:
    buft = host("ggml_backend_dev_buffer_type", pointer)(devices["CPU"])
    alignment = host("ggml_backend_buft_get_alignment", pointer, restype=size_t)(buft)
    assert ctypes.CFUNCTYPE(size_t, pointer)(word(buft, 8 * 2))(buft) == alignment
    buffer = host("ggml_backend_buft_alloc_buffer", pointer, size_t)(buft, 12288)
    fields = GGML_SIZES["ggml_backend_buffer_i"]
    assert word(buffer, fields) == buft
    assert word(buffer, fields + 16) == 12288
    base = host("ggml_backend_buffer_get_base", pointer)(buffer)
    assert ctypes.CFUNCTYPE(pointer, pointer)(word(buffer, 8))(buffer) == base
    clear = ctypes.CFUNCTYPE(None, pointer, ctypes.c_uint8)(word(buffer, 8 * 9))
    clear(buffer, 0x5A)
    assert ctypes.string_at(base, 12288) == b"\x5a" * 12288
    host("ggml_backend_buffer_free", pointer, restype=None)(buffer)


def test_live_tensor() -> None:
    assert host("ggml_tensor_overhead", restype=size_t)() - 32 == GGML_SIZES["ggml_tensor"]


def test_llama_cpp_s_structs() -> None:
    """llama_cpp's mirror gives the override list as a bare pointer; ours is pattern and type."""
    assert ctypes.sizeof(BuftOverride) == 16
    fields = dict(llama_cpp.llama_model_params._fields_)
    assert ctypes.sizeof(fields["tensor_buft_overrides"]) == 8
    assert {"load_mode", "no_alloc", "use_extra_bufts"} <= fields.keys()
    assert {"n_outputs_max", "cb_eval"} <= dict(llama_cpp.llama_context_params._fields_).keys()


# --- the bytes of a step --------------------------------------------------------------------------


def work_bytes(layout: ModelLayout, n_used: int, n_ubatch: int) -> int:
    """The plugin's sum once more, from the model's layout."""
    pairs = n_ubatch * n_used
    n_all = len(layout.layers) * layout.n_experts
    whole = min(2**25, pairs * n_all * 8)
    tensors = [t for layer in layout.layers for t in layer.tensors]
    width = max(sum(4 * (t.ne[0] + t.ne[1]) for t in layer.tensors) for layer in layout.layers)
    gathered = min(pairs * width, max(2**25, n_ubatch * width))
    kept = n_ubatch * max(t.ne[0] for t in tensors) * 4
    kinds = {kind for layer in layout.layers for copy in layer.copies for kind in copy.types}
    element = 4.0 if kinds & {0, 1, 30} else 1.2  # F32, F16, BF16
    quantized = int(pairs * max(t.ne[0] for t in tensors) * element)
    return 2**23 + 72 * n_all + max(whole, gathered + kept) + quantized


@pytest.mark.parametrize("name", tiny.LAYOUTS)
def test_what_a_step_takes_is_within_what_the_plugin_says(tiny_file: TinyFile, name: str) -> None:
    with ours(tiny_file(name), 3) as opened:
        plugin, n_used, layout = opened.plugin, opened.found.n_used, opened.found.layout
        for n in (0, 1, 8, 300, 512, 100_000):
            assert plugin.work_bytes(n_used, n) == work_bytes(layout, n_used, n)
        for n in (1, 8, 300):
            opened.reset_stats()
            opened.context().decode(rows(random_tokens(n)))
            stats = opened.stats()
            assert stats.rounds > 0 or stats.whole == stats.events
            of_tokens = plugin.work_bytes(n_used, n) - plugin.work_bytes(n_used, 0)
            assert 0 < stats.scratch_bytes <= of_tokens or stats.rounds == 0


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, abi.ABI - 1, abi.ABI + 1, -1, 2**31 - 1])
def test_another_abi_is_refused(version: int) -> None:
    """Before anything else of the struct is read: here every pointer of it leads nowhere."""
    nowhere = ctypes.cast(8, ctypes.c_void_p)
    config = abi.Config(abi=version, n_experts=-1, n_files=10**6, n_trunk_tensors=10**6)
    config.n_tensors, config.lanes = 10**6, 10**6
    config.header_bytes = config.stream_bytes = 2**40
    for name in ("paths", "trunk_tensors", "tensors", "parts", "transforms", "header"):
        kind = dict(abi.Config._fields_)[name]
        setattr(config, name, ctypes.cast(nowhere, kind))
    with pytest.raises(UserError, match="reinstall moe-gguf"):
        model.PluginModel(config)


def test_the_plugin_is_loaded_once(tiny_file: TinyFile, devices: dict[str, int]) -> None:
    assert library.load() is library.load()
    with ours(tiny_file("qwen3moe")) as first, ours(tiny_file("gpt-oss")) as second:
        kinds = [model.arena.plugin.expert_buffer_type() for model in (first, second)]
        assert len(set(kinds)) == 2
        get_device = host("ggml_backend_buft_get_device", pointer)
        assert {get_device(kind) for kind in kinds} == {devices["MOE"]}
        count = host("ggml_backend_reg_count", restype=size_t)()
        get = host("ggml_backend_reg_get", size_t)
        name = host("ggml_backend_reg_name", pointer, restype=ctypes.c_char_p)
        assert [name(get(i)) for i in range(count)].count(b"MOE") == 1
