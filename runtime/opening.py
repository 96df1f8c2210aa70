"""An open model: its files checked, the plugin bound to them, and the budget that makes it fit.

Owns the plugin's model and the controller. Knows how llama.cpp is asked to load from our stream;
does not know generation, sampling or the command line.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import psutil

from ..policies.base import CachePolicy, LoadOrder
from ..policies.layered import hottest
from ..policies.precision import MixedResidency, Precision
from ..policies.predict import Gates
from ..policies.presets import Facts, Policy, policy
from ..policies.residency import Residency
from . import binding, disk, history, kernels, logs, sizes, system
from . import budget as budgets
from .budget import Budget, Needs
from .controller import Controller, Guessing, Recorder
from .errors import UserError, option
from .formats.ggml_types import GGML_TYPES
from .formats.layout import ModelLayout, slot_layout
from .formats.open import read_layout
from .history import Identity, Routing
from .kernels import Transforms
from .options import Options
from .plugin.gates import NativeGates
from .plugin.model import PluginModel
from .routers import read_routers
from .sizes import format_size

_MIB = 2**20
# ggml-cpu's own work buffers of the trunk's matmuls and the tiled kernels' per-thread scratch.
_WORK_BASE = 8 * _MIB
_WORK_BYTES = 32 * _MIB  # native/executor.h, WORK_BYTES
# Slots are filled at the start in steps of this size: Ctrl-C waits for one, and between two the
# lanes idle for about a read.
_FILL_BYTES = 64 * _MIB
_FLOAT_TYPES = {0, 1, 30}  # F32, F16, BF16


class BuftOverride(ctypes.Structure):
    """llama_model_tensor_buft_override."""

    _fields_ = [("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p)]


class OpenModel:
    """A checked model, its plugin and, once ``start`` was called, its arena and controller."""

    def __init__(self, path: Path, options: Options) -> None:
        self.options = options
        self.layout = read_layout(path)
        self.n_used = _experts_used(self.layout, options.experts_used)
        self.routing: Routing | None = None  # of earlier runs, until the policy knows it
        if options.warm:
            self.routing = history.load(self.routing_path, self.routing_identity)
        self.n_warmed: int | None = None  # slots filled from it; None if there was nothing
        self.precision = _precision(self.layout, options)
        self.total = (
            system.auto_size()
            if options.memory == "auto"
            else options.memory
            if isinstance(options.memory, int)
            else sizes.parse_size(options.memory)
        )
        probe = disk.probe_all(self.layout.files)
        self.slots = slot_layout(self.layout, probe.offset_align)
        spare = system.auto_size() - self.total
        self.mode = disk.choose(self.layout, probe, options.reads, options.lanes, spare)
        transforms = Transforms(self.layout.metadata)
        self.is_repacked = kernels.is_repacked(self.layout, transforms)
        self.repacked_trunk: list[str] = []
        if self.is_repacked:
            self.layout = kernels.repacked_layout(self.layout)
            self.repacked_trunk = kernels.repacked_trunk(self.layout)
        self.plugin = PluginModel(
            binding.config_of(self.layout, self.slots, self.mode, transforms, self.repacked_trunk)
        )
        self.foreign_layouts = tuple(transforms.rules)
        self._dry_overrides: int | None = None
        self._keep: list[Any] = []  # ctypes memory llama.cpp points into while loading
        self.needs: Needs | None = None  # once measured
        self.n_ctx = 0  # likewise
        self.budget: Budget | None = None  # once divided
        self.controller: Controller | None = None
        self.gates: NativeGates | None = None
        self.is_blind = False  # the policy would guess, but cannot

    @property
    def routing_path(self) -> Path:
        return history.routing_path(self.layout.path)

    @property
    def routing_identity(self) -> Identity:
        layout = self.layout
        layers = tuple(layer.layer for layer in layout.layers)
        return Identity(layout.architecture, layers, layout.n_experts, self.n_used)

    # -- loading

    def model_params(self, params: llama_cpp.llama_model_params) -> llama_cpp.llama_model_params:
        """The caller's parameters with what the plugin needs."""
        experts = [t.name for layer in self.layout.layers for t in layer.tensors]
        types = [
            (pattern, self.plugin.expert_buffer_type()) for pattern in binding.patterns(experts)
        ]
        rest = (".*", self.plugin.trunk_buffer_type())
        self._dry_overrides = self._overrides([*types, rest])
        for pattern in binding.patterns(self.repacked_trunk):
            types.append((pattern, self.plugin.repack_buffer_type()))
        params.tensor_buft_overrides = self._overrides([*types, rest])
        # Nothing is mapped (see open_stream in native/model.cpp): the trunk is anonymous memory.
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
        # What is to be repacked, the overrides say; left to itself llama.cpp would try AMX too.
        params.use_extra_bufts = False
        params.n_gpu_layers = 0
        return params

    def _overrides(self, types: Sequence[tuple[str, int]]) -> int | None:
        overrides = (BuftOverride * (len(types) + 1))(
            *(BuftOverride(pattern.encode(), buft) for pattern, buft in types),
            BuftOverride(None, None),
        )
        self._keep.append(overrides)
        return ctypes.cast(overrides, ctypes.c_void_p).value

    def load(
        self,
        params: llama_cpp.llama_model_params,
        progress: Callable[[float, float], None] | None = None,
    ) -> Any:
        """A llama_model whose trunk came through our stream; UserError with llama.cpp's reason."""
        if progress is not None:

            @llama_cpp.llama_progress_callback
            def report(done: float, _: Any) -> bool:
                progress(done * self.layout.trunk_bytes, self._load_bytes())
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
        # Repacked tensors take as much as plain ones, and buffers without memory cannot pose as
        # ggml-cpu's own.
        dry.tensor_buft_overrides = self._dry_overrides
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

    def _load_bytes(self) -> int:
        """What opening reads: the trunk, and experts to start warm with."""
        assert self.budget is not None
        n = 0 if self.routing is None else np.count_nonzero(self.routing.popularity)
        return self.layout.trunk_bytes + min(int(n), self.budget.n_slots) * self.slots.slot_bytes

    def start(
        self,
        recorder: Recorder | None = None,
        progress: Callable[[float, float], None] | None = None,
    ) -> Controller:
        """Allocate the slots the verified budget leaves, bind the controller and start warm.

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
        cache, order, predictor, pace = self.make_policy(budget.n_slots)
        residency = self._residency(budget.n_slots, cache, order)
        guessing = None
        if isinstance(predictor, Gates):
            self._guess_with(predictor)
            predictor = None
        if predictor is not None or self.gates is not None:
            blob_bytes = {layer.layer: layer.blob_bytes for layer in self.layout.layers}
            guessing = Guessing(predictor, pace, blob_bytes)
        layers = [layer.layer for layer in self.layout.layers]
        self.controller = Controller(self.plugin, residency, layers, recorder, guessing)
        if self.routing is not None:
            # What is worth most is admitted last.
            keys = hottest(self.routing.uses(), budget.n_slots, cache)[::-1]
            self.n_warmed = self.fill(keys, progress)
            self.routing = None
        return self.controller

    def fill(
        self, keys: Iterable[int], progress: Callable[[float, float], None] | None = None
    ) -> int:
        """Read experts into free slots, in the order of the file; how many."""
        assert self.controller is not None
        residency = self.controller.residency
        placed = sorted(residency.fill(keys))
        at_once = max(1, _FILL_BYTES // self.slots.slot_bytes)
        done, total = self.layout.trunk_bytes, self._load_bytes()
        try:
            for i in range(0, len(placed), at_once):
                step = placed[i : i + at_once]
                self.plugin.fill(step)
                done += len(step) * self.slots.slot_bytes
                if progress is not None:
                    progress(done, total)
        except BaseException:
            residency.reconcile(self.plugin.slot_keys())
            raise
        return len(placed)

    def _residency(self, n_slots: int, cache: CachePolicy, order: LoadOrder) -> Residency:
        n_experts = self.layout.n_experts
        if not self.precision.lossy:
            return Residency(n_slots, n_experts, cache, order)
        first_low_key = (self.layout.layers[-1].layer + 1) * n_experts
        return MixedResidency(n_slots, n_experts, cache, order, self.precision, first_low_key)

    def make_policy(self, n_slots: int) -> Policy:
        """The policy asked for, once the model is loaded."""
        facts = Facts(
            n_slots,
            self.layout.n_experts,
            self.n_used,
            [layer.layer for layer in self.layout.layers],
            not self.mode.direct,
        )
        if self.routing is not None:
            facts = replace(
                facts,
                recall=self.routing.recalls(),
                popularity=self.routing.uses(),
                transitions=self.routing.follows,
            )
        return policy(self.options.policy, facts)

    def _guess_with(self, how: Gates) -> None:
        """Let the plugin guess; where a router is not known, nothing is guessed."""
        routers = read_routers(self.layout, self.plugin)
        self.is_blind = not routers
        if routers:
            self.gates = NativeGates(routers, self.n_used, how)
            self.plugin.guess_with(self.gates.handle)

    def recall(self) -> dict[int, float]:
        """By layer: how many of the experts a token used were among its best guesses, lately."""
        if self.gates is not None:
            return self.gates.recall
        guessing = self.controller.guessing if self.controller else None
        return dict(guessing.predictor.recall) if guessing and guessing.predictor else {}

    def gate_recall(self) -> dict[int, float]:
        """``recall`` if the guesses were a router's: what a policy may be told of them later."""
        return self.gates.recall if self.gates is not None else {}

    def warm_line(self) -> str:
        """What came of starting warm."""
        assert self.budget is not None
        if self.n_warmed is None:
            return (
                f"moe-gguf: nothing to start warm from: {self.routing_path} does not exist; "
                "moe-gguf trace --save-routing makes it"
            )
        return (
            f"moe-gguf: started warm: {self.n_warmed} of {self.budget.n_slots} slots filled, by "
            f"{self.routing_path}"
        )

    def low_bytes_read(self) -> int:
        """Bytes of the low copies that were asked for."""
        assert self.controller is not None
        loads = self.controller.low_loads
        return sum(
            loads[layer.layer] * layer.copies[1].n_bytes
            for layer in self.layout.layers
            if layer.layer in loads
        )

    def free_slots(self) -> int:
        """Slots no expert has been read into yet."""
        assert self.controller is not None
        return len(self.controller.residency.free)

    def mode_line(self) -> str:
        """The one line that says what is in force."""
        assert self.budget is not None
        layout = self.layout
        lossy = ", ".join(self._losses())
        needs = self.budget.needs
        return (
            f"moe-gguf: {layout.path.name} ({layout.architecture}, {len(layout.layers)} MoE layers "
            f"x {layout.n_experts} experts, top-{self.n_used}); {format_size(self.budget.total)} = "
            f"trunk {format_size(needs.trunk)} + KV {format_size(needs.kv)} + compute "
            f"{format_size(needs.compute)} + experts {format_size(self.budget.experts)} "
            f"({self.budget.n_slots} slots, {self.budget.resident_share:.0%}) + process "
            f"{format_size(needs.process)}; reads {self.mode}; policy {self._policy()}; "
            f"device cpu{self._kernels()}{lossy and f', LOSSY: {lossy}'}"
        )

    def _policy(self) -> str:
        if self.is_blind:
            return (
                f"{self.options.policy} without guesses (this model's routers are not understood)"
            )
        return self.options.policy

    def _kernels(self) -> str:
        """What is to be said about kernel layouts; nothing where weights are plain."""
        if self.is_repacked:
            return ", repacked kernels"
        if not self.foreign_layouts:
            return ""
        table = self.layout.table
        source = table.source_name if table else "SRC"
        return (
            f"; its experts are laid out for another processor ({', '.join(self.foreign_layouts)}) "
            f"and each is converted after reading, which is slow: rebuild the bundle here with "
            f"moe-gguf convert {source} DST"
        )

    def _losses(self) -> Iterator[str]:
        layout, (share, on_miss) = self.layout, self.precision
        if self.n_used != layout.n_experts_used:
            yield f"{self.n_used} experts used instead of {layout.n_experts_used}"
        if self.precision.lossy:
            kinds = {
                GGML_TYPES[kind].name for layer in layout.layers for kind in layer.copies[1].types
            }
            uses = [f"for the least popular {share:.0%} of prefill"] if share else []
            uses += ["for misses of decode"] if on_miss else []
            yield f"low copies ({', '.join(sorted(kinds))}) {' and '.join(uses)}"

    def close(self) -> None:
        self.plugin.close()
        if self.gates is not None:
            self.gates.close()


def _experts_used(layout: ModelLayout, override: int | None) -> int:
    if override is None:
        return layout.n_experts_used
    if not 1 <= override <= layout.n_experts:
        raise UserError(
            f"{option('experts_used', override)} is out of range: this model has "
            f"{layout.n_experts} experts"
        )
    return override


def _precision(layout: ModelLayout, options: Options) -> Precision:
    precision = options.precision
    if precision.lossy and any(len(layer.copies) < 2 for layer in layout.layers):
        wanted = option("low_share" if precision.low_share else "low_on_miss")
        raise UserError(
            f"{layout.path} has no low copy for {wanted}: make a bundle with moe-gguf convert"
            " --low-quant TYPE"
        )
    return precision


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
    kinds = {kind for layer in layout.layers for copy in layer.copies for kind in copy.types}
    element = 4.0 if kinds & _FLOAT_TYPES else 1.2
    quantized = int(pairs * max(t.ne[0] for t in tensors) * element)
    return _WORK_BASE + 72 * n_all + max(whole, gathered + kept) + quantized
