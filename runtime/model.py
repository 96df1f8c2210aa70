"""An open model: its files checked, the plugin bound to them, and the budget that makes it fit.

Owns the plugin's model and the controller. Knows how llama.cpp is asked to load from our stream;
does not know generation, sampling or the command line.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp
import psutil

from moe_gguf.policies.presets import policy as policy_by_name
from moe_gguf.policies.residency import Residency
from moe_gguf.runtime import budget as budgets
from moe_gguf.runtime import disk, logs
from moe_gguf.runtime.budget import Budget, Needs, format_size
from moe_gguf.runtime.controller import Controller, Recorder
from moe_gguf.runtime.errors import UserError
from moe_gguf.runtime.layout import ModelLayout, SlotLayout, read_layout, slot_layout
from moe_gguf.runtime.plugin import (
    ABI,
    Config,
    PluginModel,
    Tensor,
    TrunkTensor,
)

_MIB = 2**20
# ggml-cpu's own work buffers of the trunk's matmuls and the tiled kernels' per-thread scratch.
_WORK_BASE = 8 * _MIB
_WORK_BYTES = 32 * _MIB  # native/executor.h, WORK_BYTES
_FLOAT_TYPES = (0, 1, 30)  # F32, F16, BF16


class Options(NamedTuple):
    """What a user may say about memory and reading; the defaults are the command line's."""

    memory: str | int = "auto"
    policy: str = "lru"
    reads: str = "auto"
    lanes: int | None = None
    experts_used: int | None = None
    device: str = "cpu"


class BuftOverride(ctypes.Structure):
    """llama_model_tensor_buft_override."""

    _fields_ = [("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p)]


class OpenModel:
    """A checked model, its plugin and, once ``start`` was called, its arena and controller."""

    def __init__(self, path: Path, options: Options) -> None:
        if options.device != "cpu":
            raise UserError(f"device {options.device!r} is not supported yet: use --device cpu")
        self.options = options
        try:
            self.policy = policy_by_name(options.policy)
        except ValueError as error:
            raise UserError(str(error)) from None
        self.layout = read_layout(path)
        self.n_used = _experts_used(self.layout, options.experts_used)
        self.total = (
            budgets.auto_size()
            if options.memory == "auto"
            else options.memory
            if isinstance(options.memory, int)
            else budgets.parse_size(options.memory)
        )
        probe = disk.probe_all(self.layout.files)
        self.slots = slot_layout(self.layout, probe.offset_align)
        spare = budgets.auto_size() - self.total
        self.mode = disk.choose(self.layout, probe, options.reads, options.lanes, spare)
        self.plugin = PluginModel(_config(self.layout, self.slots, self.mode))
        self._keep: list[Any] = []  # ctypes memory llama.cpp points into while loading
        self.needs: Needs | None = None  # once measured
        self.n_ctx = 0  # likewise
        self.budget: Budget | None = None  # once divided
        self.controller: Controller | None = None

    # -- loading

    def model_params(self, params: llama_cpp.llama_model_params) -> llama_cpp.llama_model_params:
        """The caller's parameters with what the plugin needs."""
        names = {t.name.split(".", 2)[2] for layer in self.layout.layers for t in layer.tensors}
        pattern = r"^blk\.[0-9]+\.(" + "|".join(sorted(n.replace(".", r"\.") for n in names)) + ")$"
        overrides = (BuftOverride * 3)(
            BuftOverride(pattern.encode(), self.plugin.expert_buffer_type()),
            BuftOverride(b".*", self.plugin.trunk_buffer_type()),
            BuftOverride(None, None),
        )
        self._keep.append(overrides)
        params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p).value
        # Nothing is mapped (see open_stream in native/model.cpp): the trunk is anonymous memory.
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
        # Slots hold experts in the plain layout; repacked kernels sum in another order.
        params.use_extra_bufts = False
        params.n_gpu_layers = 0
        return params

    def load(
        self,
        params: llama_cpp.llama_model_params,
        progress: Callable[[float, float], None] | None = None,
    ) -> Any:
        """A llama_model whose trunk came through our stream; UserError with llama.cpp's reason."""
        if progress is not None:

            @llama_cpp.llama_progress_callback
            def report(done: float, _: Any) -> bool:
                progress(done, 1.0)
                return True

            params.progress_callback = report
            self._keep.append(report)
        with logs.capture() as log, self.plugin.stream() as stream:
            model = llama_cpp.llama_model_load_from_file_ptr(stream, params)
        if not model:
            raise UserError(f"llama.cpp cannot load {self.layout.path}: {log.reason()}")
        if error := self.plugin.take_error():
            llama_cpp.llama_model_free(model)
            raise error
        return model

    def measure(
        self,
        model_params: llama_cpp.llama_model_params,
        context_params: llama_cpp.llama_context_params,
        logits_all: bool = False,
    ) -> Needs:
        """Simulate loading (no weight is read) to learn what everything but experts takes."""
        dry = llama_cpp.llama_model_params.from_buffer_copy(model_params)
        dry.no_alloc = True
        with logs.capture() as log, self.plugin.stream() as stream:
            model = llama_cpp.llama_model_load_from_file_ptr(stream, dry)
            if not model:
                raise UserError(f"llama.cpp cannot load {self.layout.path}: {log.reason()}")
            context = llama_cpp.llama_init_from_model(model, context_params)
            rss = int(psutil.Process().memory_info().rss)
            if context:
                llama_cpp.llama_free(context)
            llama_cpp.llama_model_free(model)
        if not context:
            raise UserError(f"llama.cpp cannot make a context for this model: {log.reason()}")
        sizes = logs.context_sizes(log)
        n_ubatch = min(context_params.n_ubatch, context_params.n_ctx)
        rows = context_params.n_ctx + context_params.n_batch if logits_all else 1
        logits = rows * self.layout.n_vocab * 4
        self.n_ctx = int(context_params.n_ctx)
        self.needs = Needs(
            trunk=self.layout.trunk_bytes,
            kv=sizes.kv,
            compute=sizes.compute + logits + executor_bytes(self.layout, self.n_used, n_ubatch),
            process=rss + budgets.MARGIN_BYTES,
        )
        return self.needs

    def divide(self) -> Budget:
        """Give the slots what the needs leave of the budget; UserError when that is too little."""
        assert self.needs is not None
        self.budget = budgets.fit(
            self.total, self.needs, self.slots.slot_bytes, self.n_all, self.working_set
        )
        return self.budget

    @property
    def working_set(self) -> int:
        """Experts that one token uses, over all layers."""
        return len(self.layout.layers) * self.n_used

    @property
    def n_all(self) -> int:
        """Slots that would hold every expert."""
        return len(self.layout.layers) * self.layout.n_experts

    def start(self, recorder: Recorder | None = None) -> Controller:
        """Allocate the slots the verified budget leaves and bind the controller.

        Called when trunk, KV cache and context exist: what they really took decides, not what
        was computed, so a wrong estimate costs slots and never the limit.
        """
        assert self.needs is not None
        rss = int(psutil.Process().memory_info().rss)
        surplus = max(0, rss - (self.needs.trunk + self.needs.kv + self.needs.process))
        if surplus:
            self.needs = self.needs._replace(process=self.needs.process + surplus)
        budget = self.divide()
        self.plugin.allocate(budget.n_slots)
        residency = Residency(
            budget.n_slots,
            self.layout.n_experts,
            self.policy.cache,
            self.policy.order,
            self.policy.predictor,
        )
        self.controller = Controller(self.plugin, residency, recorder)
        return self.controller

    def free_slots(self) -> int:
        """Slots no expert has been read into yet."""
        assert self.controller is not None
        return len(self.controller.residency.free)

    def mode_line(self) -> str:
        """The one line that says what is in force."""
        assert self.budget is not None
        layout = self.layout
        lossy = (
            f", LOSSY: {self.n_used} experts used instead of {layout.n_experts_used}"
            if self.n_used != layout.n_experts_used
            else ""
        )
        needs = self.budget.needs
        return (
            f"moe-gguf: {layout.path.name} ({layout.architecture}, {len(layout.layers)} MoE layers "
            f"x {layout.n_experts} experts, top-{self.n_used}); {format_size(self.budget.total)} = "
            f"trunk {format_size(needs.trunk)} + KV {format_size(needs.kv)} + compute "
            f"{format_size(needs.compute)} + experts {format_size(self.budget.experts)} "
            f"({self.budget.n_slots} slots, {self.budget.resident_share:.0%}) + process "
            f"{format_size(needs.process)}; reads {self.mode}; policy {self.options.policy}; "
            f"device cpu{lossy}"
        )

    def close(self) -> None:
        self.plugin.close()


def _experts_used(layout: ModelLayout, override: int | None) -> int:
    if override is None:
        return layout.n_experts_used
    if not 1 <= override <= layout.n_experts:
        raise UserError(
            f"--experts-used {override} is out of range: this model has {layout.n_experts} experts"
        )
    return override


def executor_bytes(layout: ModelLayout, n_used: int, n_ubatch: int) -> int:
    """Bytes the plugin and its inner device allocate for a batch of ``n_ubatch`` tokens.

    Follows native/executor.cpp: an event runs either whole (ggml-cpu's table of rows, 8 bytes per
    slot and pair, at most WORK_BYTES) or in rounds (gathered rows, at most WORK_BYTES unless one
    expert has more, and the event's inputs kept once). Either way ggml-cpu quantizes a matmul's
    input, to at most 1.2 bytes per element unless the weights are floats.
    """
    pairs = n_ubatch * n_used
    n_all = len(layout.layers) * layout.n_experts
    whole = min(_WORK_BYTES, pairs * n_all * 8)
    tensors = [t for layer in layout.layers for t in layer.tensors]
    width = max(sum(4 * (t.ne[0] + t.ne[1]) for t in layer.tensors) for layer in layout.layers)
    gathered = min(pairs * width, max(_WORK_BYTES, n_ubatch * width))
    kept = n_ubatch * max(t.ne[0] for t in tensors) * 4
    element = max(4.0 if t.ggml_type in _FLOAT_TYPES else 1.2 for t in tensors)
    quantized = int(pairs * max(t.ne[0] for t in tensors) * element)
    return _WORK_BASE + 72 * n_all + max(whole, gathered + kept) + quantized


def _config(layout: ModelLayout, slots: SlotLayout, mode: disk.ReadMode) -> Config:
    tensors = [t for layer in layout.layers for t in layer.tensors]
    mirrored = (Tensor * len(tensors))(
        *(
            Tensor(
                t.name.encode(),
                t.offset,
                t.expert_bytes,
                slots.offsets[t.layer, t.name],
                t.layer,
                t.file,
            )
            for t in tensors
        )
    )
    experts = {t.name for t in tensors}
    trunk = [t for t in layout.tensors if t.name not in experts]
    trunk_tensors = (TrunkTensor * len(trunk))(
        *(TrunkTensor(t.name.encode(), t.offset, t.n_bytes, t.file) for t in trunk)
    )
    paths = (ctypes.c_char_p * len(layout.files))(*(str(f).encode() for f in layout.files))

    config = Config(
        abi=ABI,
        n_experts=layout.n_experts,
        n_files=len(layout.files),
        n_trunk_tensors=len(trunk),
        n_tensors=len(tensors),
        lanes=mode.lanes,
        direct=mode.direct,
        offset_align=mode.offset_align,
        memory_align=mode.memory_align,
        slot_bytes=slots.slot_bytes,
        header_bytes=len(layout.header),
        stream_bytes=layout.stream_bytes,
        paths=paths,
        trunk_tensors=trunk_tensors,
        tensors=mirrored,
        header=layout.header,
    )
    return config
