"""How a model is opened: found on disk, measured, loaded. Each step is a value the next one takes.

A caller cannot take the steps in another order, and a plan is the same way cut short. Knows how
llama.cpp is asked to load from our stream; does not know slots in use, generation, or the command
line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import llama_cpp
import psutil

from ..policies.precision import Precision
from . import budget as budgets
from . import disk, history, logs, sizes, system, trial
from .binding import Binding
from .budget import Budget, DeviceBudget, DeviceNeeds, Needs
from .errors import UserError, option
from .formats.gguf_header import read_header
from .formats.layout import ModelLayout, PlacedTensor
from .formats.open import read_layout
from .formats.slots import SlotLayout, slot_layout
from .formats.tables import tables_of
from .history import Identity, Routing
from .kernels import Kernels, kernels_of
from .options import Options
from .placement import Placement, expert_bytes, place
from .plugin.devices import choose
from .progress import Report

# A smaller table stays in memory, unless it is asked to go.
_LARGE_TABLE_BYTES = 64 << 20
# Repacking what is read costs more than its kernels save, unless few are read again (LOG.md).
_REPACK_SHARE = 0.9
# For rows of all tables on disk: the tokens of a text repeat, and this holds thousands of them.
_ROW_CACHE_BYTES = 32 << 20


@dataclass(frozen=True, eq=False)
class Found:
    """A model on disk, checked, and how it will be held and read; nothing of it is loaded."""

    options: Options
    layout: ModelLayout  # as llama.cpp will see it
    n_used: int  # experts per token
    total: int  # the budget, in bytes
    slots: SlotLayout
    mode: disk.ReadMode
    kernels: Kernels
    statistics: Routing | None  # of earlier runs, to start warm from
    tables: tuple[PlacedTensor, ...]  # what may stay on disk
    placement: Placement | None = None  # None: the processor computes all of it

    @property
    def working_set(self) -> int:
        """Experts that one token uses, over all layers."""
        return len(self.layout.layers) * self.n_used

    @property
    def n_all(self) -> int:
        """Slots that would hold every expert."""
        return len(self.layout.layers) * self.layout.n_experts

    @property
    def precision(self) -> Precision:
        return self.options.precision

    @property
    def history_path(self) -> Path:
        return history.routing_path(self.layout.path)

    @property
    def identity(self) -> Identity:
        return _identity(self.layout, self.n_used)

    def warm_bytes(self, n_slots: int) -> int:
        """What starting warm reads."""
        n = 0 if self.statistics is None else (self.statistics.popularity > 0).sum()
        return min(int(n), n_slots) * self.slots.slot_bytes

    def bind(self) -> Binding:
        """The native model for it, the caller's to close."""
        return Binding(self.layout, self.slots, self.mode, self.kernels, self.placement)

    @property
    def device(self) -> str:
        """The name of what computes it."""
        return "cpu" if self.placement is None else self.placement.device.name.lower()


def find(path: Path, options: Options) -> Found:
    """Read a model's headers and choose how it is held; UserError for what cannot be opened."""
    layout = read_layout(path)
    trial.check(layout)
    n_used = _experts_used(layout, options.experts_used)
    statistics = None
    if options.warm:
        statistics = history.load(history.routing_path(path), _identity(layout, n_used))
    _check_low_copies(layout, options)
    system.check_room(_reserved(layout))
    total = (
        system.auto_size(reserved=_reserved(layout))
        if options.memory == "auto"
        else options.memory
        if isinstance(options.memory, int)
        else sizes.parse_size(options.memory)
    )
    probe = disk.probe_all(layout.files)
    spare = system.auto_size() - total
    mode = disk.choose(layout, probe, options.reads, options.lanes, spare)
    placement = place(
        layout, choose(options.device), options.gpu_layers, options.cpu_experts != "all"
    )
    if placement is not None and options.precision.lossy:
        raise UserError(
            f"a device holds no low copies: leave out {option('low_share')} and "
            f"{option('low_on_miss')}, or use {option('device', 'cpu')}"
        )
    if placement is not None and options.repack == "on":
        raise UserError(
            f"a device computes with weights as the file has them: leave out {option('repack')}, "
            f"or use {option('device', 'cpu')}"
        )
    slots = slot_layout(layout, probe.offset_align)
    repack = options.repack == "on" or (
        options.repack == "auto" and _may_hold_most(layout, slots, total)
    )
    layout, kernels = kernels_of(layout, placement is not None, repack)
    tables = () if options.table_rows == "resident" else tables_of(layout)
    return Found(
        options, layout, n_used, total, slots, mode, kernels, statistics, tables, placement
    )


def _may_hold_most(layout: ModelLayout, slots: SlotLayout, total: int) -> bool:
    """Whether nearly all experts find a slot in the budget, if contexts take nothing."""
    n_all = len(layout.layers) * layout.n_experts
    process = int(psutil.Process().memory_info().rss) + budgets.MARGIN_BYTES
    room = total - layout.trunk_bytes - process
    return room >= _REPACK_SHARE * n_all * slots.slot_bytes


@dataclass(frozen=True, eq=False)
class Measured:
    """What a found model needs besides slots, in a context of ``n_ctx`` tokens."""

    found: Found
    needs: Needs
    n_ctx: int
    tables: tuple[PlacedTensor, ...] = ()  # that stay on disk
    on_device: DeviceNeeds = budgets.NOTHING

    @property
    def holds_most(self) -> bool:
        """Whether nearly all experts find a slot."""
        found = self.found
        room = found.total - self.needs.total
        return room >= _REPACK_SHARE * found.n_all * found.slots.slot_bytes

    def divide_device(self) -> DeviceBudget | None:
        """Give the pools what a device's needs leave of its memory as it is now, nothing of the
        model being there; UserError when that is too little. None without a device."""
        return self._divide_device(None)

    def divide_rest(self) -> DeviceBudget | None:
        """Likewise, once all but the pools is there."""
        placement = self.found.placement
        device = placement and choose(placement.device.name)
        return self._divide_device(device.free + self.on_device.total if device else None)

    def _divide_device(self, free: int | None) -> DeviceBudget | None:
        found, placement = self.found, self.found.placement
        if placement is None:
            return None
        asked = found.options.device_memory
        if asked == "auto":
            total = budgets.device_auto(placement.device.free if free is None else free)
        else:
            total = asked if isinstance(asked, int) else sizes.parse_size(asked)
        layers = {n.layer: expert_bytes(n) for n in placement.layers(found.layout)}
        return budgets.fit_pools(
            total, self.on_device, layers, found.layout.n_experts, found.n_used
        )

    def divide(self) -> Budget:
        """Give the slots what the needs leave of the budget; UserError when that is too little."""
        found = self.found
        return budgets.fit(
            found.total, self.needs, found.slots.slot_bytes, found.n_all, found.working_set
        )

    def with_process(self, rss: int) -> Measured:
        """What is needed, now that trunk, KV cache and context exist in a process of this size.

        A wrong estimate costs slots and never the limit.
        """
        surplus = max(0, rss - (self.needs.trunk + self.needs.kv + self.needs.process))
        needs = self.needs._replace(process=self.needs.process + surplus)
        return replace(self, needs=needs)


def bound(
    found: Found,
    model_params: llama_cpp.llama_model_params,
    context_params: llama_cpp.llama_context_params,
    n_outputs: int = 1,
) -> tuple[Binding, Measured]:
    """The native model, the caller's to close, and what it needs (``measure``).

    What was to be repacked as it is read, since nearly all of it seemed to fit, stays plain if a
    context of this size does not leave the room.
    """
    binding = found.bind()
    try:
        measured = measure(found, binding, model_params, context_params, n_outputs)
        is_sure = found.options.repack != "auto" or not found.kernels.at_reads
        if is_sure or measured.holds_most:
            return binding, measured
    except BaseException:
        binding.close()
        raise
    binding.close()
    plain = find(found.layout.path, replace(found.options, repack="off"))
    return bound(replace(plain, total=found.total), model_params, context_params, n_outputs)


def measure(
    found: Found,
    binding: Binding,
    model_params: llama_cpp.llama_model_params,
    context_params: llama_cpp.llama_context_params,
    n_outputs: int = 1,
) -> Measured:
    """Simulate loading (no weight is read) to learn what everything but experts takes.

    ``n_outputs``: rows of logits that are kept outside llama.cpp.
    """
    dry = binding.model_params(model_params, found.tables, no_alloc=True)
    with logs.capture() as log, binding.plugin.stream() as stream:
        model = llama_cpp.llama_model_load_from_file_ptr(stream, dry)
        if not model:
            raise UserError(f"llama.cpp cannot load {found.layout.path}: {log.reason()}")
        context = llama_cpp.llama_init_from_model(model, context_params)
        rss = int(psutil.Process().memory_info().rss)
        if context:
            llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)
    if not context:
        raise UserError(f"llama.cpp cannot make a context for this model: {log.reason()}")
    placement = found.placement
    announced = logs.context_sizes(log, None if placement is None else placement.device.name)
    n_ubatch = min(context_params.n_ubatch, context_params.n_ctx)
    logits = n_outputs * found.layout.n_vocab * 4
    work = binding.plugin.work_bytes(found.n_used, n_ubatch)
    on_device, shared = DeviceNeeds(), 0
    if placement is not None:
        if found.options.cpu_experts == "auto":
            shared = sum(t.n_bytes for t in placement.expert_trunk(found.layout))
        on_device = DeviceNeeds(
            trunk=sum(t.n_bytes for t in placement.trunk(found.layout)),
            kv=int(announced.kv * placement.share(found.layout)),
            compute=announced.on_device,
        )
    needs = Needs(
        trunk=found.layout.trunk_bytes - on_device.trunk + shared,
        kv=announced.kv - on_device.kv,
        compute=announced.compute + logits + work,
        process=rss + budgets.MARGIN_BYTES,
    )
    measured = Measured(found, needs, int(context_params.n_ctx), on_device=on_device)
    return place_tables(measured)


def place_tables(measured: Measured) -> Measured:
    """Leave the model's tables on disk, where that is asked for or does some good.

    Left to itself it does so where not every expert would find a slot beside them: a token needs a
    few rows of a table and all of its experts, so that the same memory saves far more reads as
    slots. Below ``_LARGE_TABLE_BYTES`` it is not worth a read.
    """
    found, needs = measured.found, measured.needs
    tables = found.tables
    if found.options.table_rows == "auto":
        plenty = needs.with_slots(found.n_all, found.slots.slot_bytes) <= found.total
        tables = () if plenty else tuple(t for t in tables if t.n_bytes > _LARGE_TABLE_BYTES)
    n_bytes = sum(t.n_bytes for t in tables)
    rows = min(_ROW_CACHE_BYTES, n_bytes)
    needs = needs._replace(trunk=needs.trunk - n_bytes, rows=rows)
    return replace(measured, needs=needs, tables=tables)


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model whose trunk is in memory; its experts have no slots yet (``arena.start``).

    ``model`` is a llama_model, the caller's to free before ``binding`` is closed.
    """

    measured: Measured
    binding: Binding
    model: Any


def load(
    measured: Measured,
    binding: Binding,
    model_params: llama_cpp.llama_model_params,
    progress: Report | None = None,
) -> Loaded:
    """Read the trunk through our stream; UserError with llama.cpp's reason, or that too little
    memory would be left for slots.

    ``progress`` counts bytes.
    """
    found = measured.found
    budget = measured.divide()
    needs, trunk = budget.needs, budget.needs.trunk
    rows = needs.rows
    ours = needs.total - needs.process - needs.beside  # that this process will grow by
    growth = ours + budget.experts + budgets.MARGIN_BYTES
    system.check_room(_reserved(found.layout, measured.tables), growth)
    of_all = trunk + found.warm_bytes(budget.n_slots)
    binding.hold_tables(measured.tables, rows)
    params = binding.model_params(model_params, measured.tables)

    @llama_cpp.llama_progress_callback
    def report(done: float, _: Any) -> bool:
        if progress is not None:
            progress(done * trunk, of_all)
        return True

    params.progress_callback = report
    with logs.capture() as log, binding.plugin.stream() as stream:
        model = llama_cpp.llama_model_load_from_file_ptr(stream, params)
    if not model:
        raise UserError(f"llama.cpp cannot load {found.layout.path}: {log.reason()}")
    if error := binding.plugin.take_error():
        llama_cpp.llama_model_free(model)
        raise error
    return Loaded(measured, binding, model)


def _reserved(layout: ModelLayout, tables: Sequence[PlacedTensor] = ()) -> int:
    """Bytes of addresses without memory: llama.cpp's mapping of our stream, the experts' and those
    of tables on disk."""
    return layout.trunk_bytes + 2 * layout.expert_bytes + sum(t.n_bytes for t in tables)


def _identity(layout: ModelLayout, n_used: int) -> Identity:
    layers = tuple(layer.layer for layer in layout.layers)
    return Identity(layout.architecture, layers, layout.n_experts, n_used)


def _experts_used(layout: ModelLayout, override: int | None) -> int:
    if override is None:
        return layout.n_experts_used
    if not 1 <= override <= layout.n_experts:
        raise UserError(
            f"{option('experts_used', override)} is out of range: this model has "
            f"{layout.n_experts} experts"
        )
    return override


def check_adapter(path: Path, layout: ModelLayout) -> None:
    """UserError for a LoRA adapter that changes routed experts, whose weights llama.cpp never
    sees."""
    experts = {t.name for layer in layout.layers for t in layer.tensors}
    for info in read_header(path).tensors:
        if info.name.rpartition(".lora_")[0] in experts:
            raise UserError(
                f"{path} changes routed experts ({info.name}), which only llama.cpp itself can: "
                "merge it into the model, or use an adapter of other tensors"
            )


def _check_low_copies(layout: ModelLayout, options: Options) -> None:
    precision = options.precision
    if precision.lossy and any(len(layer.copies) < 2 for layer in layout.layers):
        wanted = option("low_share" if precision.low_share else "low_on_miss")
        raise UserError(
            f"{layout.path} has no low copy for {wanted}: make a bundle with moe-gguf convert"
            " --low-quant TYPE"
        )
