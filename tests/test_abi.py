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
from pathlib import Path
from typing import Any, get_args

import llama_cpp
import pytest
from conftest import TinyFile, missing
from harness import ours

from moe_gguf import UserError
from moe_gguf.policies.base import Phase
from moe_gguf.policies.predict import Variant
from moe_gguf.runtime.binding import BuftOverride
from moe_gguf.runtime.plugin import abi, library, model
from moe_gguf.runtime.plugin.gates import Gating

NATIVE = Path(__file__).parent.parent / "runtime" / "native"
INCLUDE = Path(str(importlib.metadata.distribution("llama-cpp-python").locate_file("include")))

MIRRORS: dict[str, type[ctypes.Structure]] = {
    "moe_tensor": abi.Tensor,
    "moe_part": abi.Part,
    "moe_transform": abi.Transform,
    "moe_trunk_tensor": abi.TrunkTensor,
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
GGML_SIZES = {
    "ggml_backend_buffer_type_i": 6 * 8,
    "ggml_backend_buffer_type": 6 * 8 + 16,
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


def compiled(source: str, folder: Path) -> dict[str, int]:
    """What a program against the plugin's headers prints, as ``name number`` lines."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        missing("no C++ compiler")
    program = folder / "sizes"
    flags = ["-std=c++17", "-Wno-invalid-offsetof", f"-I{NATIVE}", f"-I{INCLUDE}"]
    includes = ["#include <cstddef>", "#include <cstdio>", '#include "moe.h"']
    lines = [*includes, '#include "ggml-iface.h"', "int main() {", source, "}"]
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
    lines.append(show("MOE_COPIES", "MOE_COPIES"))
    expected = {"MOE_ABI": abi.ABI, "MOE_MAX_GUESSES": abi.MAX_GUESSES}
    expected["MOE_COPIES"] = abi.COPIES
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
    text = (NATIVE / "model.h").read_text()
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
    shift = re.search(r" CHUNK_BYTES\s+= 1 << (\d+);", (NATIVE / "reads.h").read_text())
    assert shift
    assert 1 << int(shift[1]) == abi.CHUNK_BYTES


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
