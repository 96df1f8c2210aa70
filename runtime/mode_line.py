"""What is said on stderr when a model is open: what is in force, and what came of starting warm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .budget import Budget, DeviceBudget, Needs
from .formats.ggml_types import GGML_TYPES
from .formats.layout import PlacedTensor
from .opening import Found
from .sizes import format_size
from .text import shown


def mode_line(
    found: Found,
    budget: Budget,
    tables: Sequence[PlacedTensor],
    is_blind: bool,
    pools: DeviceBudget | None = None,
    is_pinned: bool = True,
) -> str:
    """One line: model, budget, reads, policy, device; ``tables`` are on disk; ``is_blind``: no
    guesses are made; ``pools`` are the device's, and whether it copies from memory directly."""
    layout, needs = found.layout, budget.needs
    lossy = ", ".join(_losses(found))
    named = f"{shown(layout.path.name)} ({shown(layout.architecture)}"
    return (
        f"moe-gguf: {named}, {len(layout.layers)} MoE layers "
        f"x {layout.n_experts} experts, top-{found.n_used}); {format_size(budget.total)} = "
        f"trunk {format_size(needs.trunk)}{_rows(needs)} + KV {format_size(needs.kv)} + compute "
        f"{format_size(needs.compute)} + experts {format_size(budget.experts)} "
        f"({budget.n_slots} slots, {budget.resident_share:.0%}) + process "
        f"{format_size(needs.process)}; reads {found.mode}; policy {_policy(found, is_blind)}; "
        f"device {found.device}{_pools(found, pools, is_pinned)}{_tables(tables)}{_kernels(found)}"
        f"{lossy and f', LOSSY: {lossy}'}"
    )


def _policy(found: Found, is_blind: bool) -> str:
    if is_blind:
        return f"{found.options.policy} without guesses (this model's routers are not understood)"
    return found.options.policy


def _tables(tables: Sequence[PlacedTensor]) -> str:
    if not tables:
        return ""
    names = ", ".join(f"{t.name} ({format_size(t.n_bytes)})" for t in tables)
    return f"; on disk: {names}"


def _pools(found: Found, pools: DeviceBudget | None, is_pinned: bool) -> str:
    """How a device's memory is divided, and what experts the processor computes nevertheless."""
    if pools is None:
        return ""
    needs, n = pools.needs, sum(pools.n_slots.values())
    pinned = "" if is_pinned else ", copied to from pageable memory, which is slow"
    on_cpu = f", cpu-experts {found.options.cpu_experts}"
    return (
        f": {format_size(pools.total)} = trunk {format_size(needs.trunk)} + KV "
        f"{format_size(needs.kv)} + compute {format_size(needs.compute)} + experts "
        f"{format_size(pools.experts)} ({n} slots, {pools.resident_share:.0%}){pinned}{on_cpu}"
    )


def _rows(needs: Needs) -> str:
    return f" + rows {format_size(needs.rows)}" if needs.rows else ""


def _kernels(found: Found) -> str:
    """What is to be said about kernel layouts; nothing where weights are plain."""
    if found.kernels.is_repacked:
        return ", repacked kernels" + (" (as it is read)" if found.kernels.at_reads else "")
    if not found.kernels.foreign:
        return ", nothing to repack" if found.options.repack == "on" else ""
    table = found.layout.table
    source = table.source_name if table else "SRC"
    return (
        f"; its experts are laid out for another processor ({', '.join(found.kernels.foreign)}) "
        f"and each is converted after reading, which is slow: rebuild the bundle here with "
        f"moe-gguf convert {shown(source)} DST"
    )


def _losses(found: Found) -> Iterator[str]:
    layout, (share, on_miss) = found.layout, found.precision
    if found.n_used != layout.n_experts_used:
        yield f"{found.n_used} experts used instead of {layout.n_experts_used}"
    if found.precision.lossy:
        kinds = {GGML_TYPES[kind].name for layer in layout.layers for kind in layer.copies[1].types}
        uses = [f"for the least popular {share:.0%} of prefill"] if share else []
        uses += ["for misses of decode"] if on_miss else []
        yield f"low copies ({', '.join(sorted(kinds))}) {' and '.join(uses)}"


def warm_line(found: Found, budget: Budget, n_warmed: int | None) -> str:
    """What came of starting warm; ``n_warmed`` None: there were no statistics."""
    if n_warmed is None:
        return (
            f"moe-gguf: nothing to start warm from: {found.history_path} does not exist; "
            "moe-gguf trace --save-routing makes it"
        )
    return (
        f"moe-gguf: started warm: {n_warmed} of {budget.n_slots} slots filled, by "
        f"{found.history_path}"
    )
