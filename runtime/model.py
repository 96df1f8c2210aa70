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
from moe_gguf.runtime.layout import ModelLayout, SlotLayout, Source, read_layout, slot_layout
from moe_gguf.runtime.plugin import (
    ABI,
    SOURCE_FILE,
    SOURCE_MEMORY,
    SOURCE_SKIP,
    Config,
    PluginModel,
    Segment,
    Tensor,
)

_MIB = 2**20
# ggml-cpu's own work buffers of the trunk's matmuls and the tiled kernels' per-thread scratch.
_WORK_BASE = 8 * _MIB
_WORK_BYTES = 32 * _MIB  # native/executor.h, WORK_BYTES


_SOURCES = {
    Source.FILE: SOURCE_FILE,
    Source.MEMORY: SOURCE_MEMORY,
    Source.SKIP: SOURCE_SKIP,
}


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
        self.budget: Budget | None = None
        self.controller: Controller | None = None

    # -- loading

    def model_params(self, params: llama_cpp.llama_model_params) -> llama_cpp.llama_model_params:
        """The caller's parameters with what the plugin needs."""
        names = {t.name.split(".", 2)[2] for layer in self.layout.layers for t in layer.tensors}
        pattern = r"^blk\.[0-9]+\.(" + "|".join(sorted(n.replace(".", r"\.") for n in names)) + ")$"
        overrides = (BuftOverride * 2)(
            BuftOverride(pattern.encode(), self.plugin.buffer_type()), BuftOverride(None, None)
        )
        self._keep.append(overrides)
        params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p).value
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE  # the trunk in anonymous memory
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
        with logs.capture() as log:
            model = llama_cpp.llama_model_load_from_file_ptr(self.plugin.stream(), params)
        if not model:
            raise UserError(f"llama.cpp cannot load {self.layout.path}: {log.reason()}")
        return model

    def measure(
        self,
        model_params: llama_cpp.llama_model_params,
        context_params: llama_cpp.llama_context_params,
        logits_all: bool = False,
    ) -> Budget:
        """Simulate loading (no weight is read) and divide the budget; UserError when too small."""
        dry = llama_cpp.llama_model_params.from_buffer_copy(model_params)
        dry.no_alloc = True
        with logs.capture() as log:
            model = llama_cpp.llama_model_load_from_file_ptr(self.plugin.stream(), dry)
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
        needs = Needs(
            trunk=self.layout.trunk_bytes,
            kv=sizes.kv,
            compute=sizes.compute + logits + executor_bytes(self.layout, self.n_used, n_ubatch),
            process=rss + budgets.MARGIN_BYTES,
        )
        self.budget = budgets.fit(
            self.total, needs, self.slots.slot_bytes, self.n_all, len(self.layout.layers) * self.n_used
        )
        return self.budget

    @property
    def n_all(self) -> int:
        """Slots that would hold every expert."""
        return len(self.layout.layers) * self.layout.n_experts

    def start(self, recorder: Recorder | None = None) -> Controller:
        """Allocate the slots the verified budget leaves and bind the controller.

        Called when trunk, KV cache and context exist: what they really took decides, not what
        was computed, so a wrong estimate costs slots and never the limit.
        """
        assert self.budget is not None
        needs = self.budget.needs
        rss = int(psutil.Process().memory_info().rss)
        surplus = max(0, rss - (needs.trunk + needs.kv + needs.process))
        if surplus:
            needs = needs._replace(process=needs.process + surplus)
            self.budget = budgets.fit(
                self.total, needs, self.slots.slot_bytes, self.n_all, self.budget.working_set
            )
        self.plugin.allocate(self.budget.n_slots)
        residency = Residency(
            self.budget.n_slots,
            self.layout.n_experts,
            self.policy.cache,
            self.policy.order,
            self.policy.predictor,
        )
        self.controller = Controller(self.plugin, residency, recorder)
        return self.controller

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
            f"moe-gguf: {layout.path.name} ({layout.architecture}, {len(layout.layers)} MoE layers x "
            f"{layout.n_experts} experts, top-{self.n_used}); {format_size(self.budget.total)} = trunk "
            f"{format_size(needs.trunk)} + KV {format_size(needs.kv)} + compute "
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

    Follows native/executor.cpp: the row table and the gathered rows are limited to WORK_BYTES
    each (but one expert's rows always go together), inputs of an event are kept once, and
    ggml-cpu quantizes a matmul's whole input (at most 4 bytes per element).
    """
    pairs = n_ubatch * n_used
    n_all = len(layout.layers) * layout.n_experts
    table = min(_WORK_BYTES, pairs * n_all * 8) + 72 * n_all
    width = max(sum(t.ne[0] + t.ne[1] for t in layer.tensors) * 4 for layer in layout.layers)
    gathered = min(pairs * width, max(_WORK_BYTES, n_ubatch * width))
    widest = max(t.ne[0] for layer in layout.layers for t in layer.tensors)
    kept = n_ubatch * widest * 4
    quantized = pairs * max(
        t.ne[0] * (4 if t.ggml_type <= 1 or t.ggml_type == 30 else 1.2)
        for layer in layout.layers
        for t in layer.tensors
    )
    return int(_WORK_BASE + table + gathered + kept + quantized)


def _config(layout: ModelLayout, slots: SlotLayout, mode: disk.ReadMode) -> Config:
    segments = (Segment * len(layout.segments))(
        *(Segment(s.start, s.end, s.offset, _SOURCES[s.source], s.file) for s in layout.segments)
    )
    tensors = [t for layer in layout.layers for t in layer.tensors]
    mirrored = (Tensor * len(tensors))(
        *(
            Tensor(t.name.encode(), t.offset, t.expert_bytes, slots.offsets[t.layer, t.name], t.layer, t.file)
            for t in tensors
        )
    )
    paths = (ctypes.c_char_p * len(layout.files))(*(str(f).encode() for f in layout.files))
    header = layout.header or b""


    config = Config(
        abi=ABI,
        n_experts=layout.n_experts,
        n_files=len(layout.files),
        n_segments=len(segments),
        n_tensors=len(tensors),
        lanes=mode.lanes,
        direct=mode.direct,
        offset_align=mode.offset_align,
        memory_align=mode.memory_align,
        slot_bytes=slots.slot_bytes,
        header_bytes=len(header),
        stream_bytes=layout.stream_size,
        paths=paths,
        segments=segments,
        tensors=mirrored,
        header=header,
    )
    return config
