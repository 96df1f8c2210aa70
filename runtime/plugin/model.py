"""The owner of one native model."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ExpertReadError, UserError, option
from .abi import ERROR_OTHER, ERROR_READ, ROUTE_FN, Call, Config, Event, Stats, Table, i32
from .library import load

if TYPE_CHECKING:  # a trial's child, which everybody waits for, needs no arrays
    import numpy as np
    from numpy.typing import NDArray


class PluginModel:
    """Owner of one native ``moe_model``; every method is one call of moe.h."""

    def __init__(self, config: Config) -> None:
        self._lib = load()
        error = ctypes.create_string_buffer(512)
        self._handle = self._lib.moe_model_new(ctypes.byref(config), error, len(error))
        if not self._handle:
            raise UserError(error.value.decode(errors="replace"))
        self._pid = os.getpid()
        self._bound: Any = None  # the ctypes thunks must outlive the binding
        self.n_slots = 0
        self._pools: list[int] = []
        self.call: Call = self._lib.moe_model_call(self._handle).contents

    @property
    def _open(self) -> int:
        if not self._handle:
            raise RuntimeError("the model is closed")
        if self._pid != os.getpid():  # its threads are the parent's
            raise UserError(
                "this model was opened before the process was forked: open it in this one"
            )
        return int(self._handle)

    def expert_buffer_type(self) -> int:
        return int(self._lib.moe_model_expert_buffer_type(self._open))

    def device_expert_buffer_type(self) -> int:
        """Only with a device, as the next two."""
        return int(self._lib.moe_model_device_expert_buffer_type(self._open))

    def device_buffer_type(self) -> int:
        return int(self._lib.moe_model_device_buffer_type(self._open))

    def device(self) -> int:
        """The ggml_backend_dev_t that llama.cpp is to compute on."""
        return int(self._lib.moe_model_device(self._open))

    def trunk_buffer_type(self) -> int:
        return int(self._lib.moe_model_trunk_buffer_type(self._open))

    def repack_buffer_type(self) -> int:
        """Only where ``moe_repack_supported`` said yes to something."""
        return int(self._lib.moe_model_repack_buffer_type(self._open))

    def table_buffer_type(self) -> int:
        return int(self._lib.moe_model_table_buffer_type(self._open))

    def hold_tables(self, tables: Sequence[Table], cache_bytes: int) -> None:
        """Leave these tensors on disk, with so much memory for rows of all of them; once."""
        array = (Table * len(tables))(*tables)
        if self._lib.moe_model_tables(self._open, array, len(tables), cache_bytes) != 0:
            raise UserError(
                f"the system refuses {cache_bytes} bytes for rows of tables; give a smaller "
                f"{option('memory')} or {option('table_rows', 'resident')}"
            )

    def fetch_rows(self, table: int, rows: NDArray[np.int32]) -> None:
        """Start reading rows of a table that the next steps will look up."""
        self._lib.moe_model_fetch_rows(self._open, table, rows.ctypes.data, len(rows))

    @contextlib.contextmanager
    def stream(self) -> Iterator[int]:
        """A ``FILE *`` that llama.cpp takes for the model, open while it loads."""
        stream = self._lib.moe_model_stream(self._open)
        if not stream:
            raise UserError("the system has no file descriptor left for the model's stream")
        try:
            yield int(stream)
        finally:
            self._lib.fclose(stream)

    def trunk_data(self, name: str) -> int | None:
        """The address of a trunk tensor in the loaded model; None if it is not kept plainly."""
        address: int | None = self._lib.moe_model_trunk_data(self._open, name.encode())
        return address

    def work_bytes(self, n_used: int, n_ubatch: int) -> int:
        """What a batch of so many tokens takes at most beside the slots, every expert in one."""
        return int(self._lib.moe_model_work_bytes(self._open, n_used, n_ubatch))

    def allocate(self, n_slots: int) -> None:
        if self._lib.moe_model_arena(self._open, n_slots) != 0:
            raise UserError(
                f"the system refused the memory for {n_slots} slots: lower {option('memory')}"
            )
        self.n_slots = n_slots

    @property
    def is_pinned(self) -> bool:
        """Whether the device copies from the slots directly."""
        return bool(self._lib.moe_model_is_pinned(self._open))

    def allocate_pools(self, n_slots: Sequence[int], n_windows: int) -> None:
        """Slots on the device, by layer from 0 on; 0 for a layer that is not computed there.

        ``n_windows``: with room besides for all experts of so many layers at a time, 0 to 2.
        """
        if self._lib.moe_model_pools(self._open, (i32 * len(n_slots))(*n_slots), n_windows) != 0:
            raise UserError(
                f"the device refused the memory for {sum(n_slots)} experts: lower "
                f"{option('device_memory')}"
            )
        self._pools = list(n_slots)

    def copy_ns(self, layer: int, n: int) -> int:
        """What copying the first n slots into a layer's pool takes; before the first step."""
        return int(self._lib.moe_model_copy_ns(self._open, layer, n))

    def join_copies(self, on: bool) -> None:
        """Whether copies to the device that lie evenly apart go in one call; between steps."""
        self._lib.moe_model_join_copies(self._open, on)

    def compute_on_cpu(self) -> None:
        """Plans for the device may leave experts to the processor from now on."""
        self._lib.moe_model_compute_on_cpu(self._open)

    def pool_keys(self, layer: int) -> list[int]:
        """Per slot of a layer's pool the key it holds, -1 for none."""
        keys = (i32 * self._pools[layer])()
        self._lib.moe_model_pool_keys(self._open, layer, keys)
        return list(keys)

    def upload(self, placed: Sequence[tuple[int, int]]) -> None:
        """Copy experts, as (slot, slot of the pool), to the device; between steps only."""
        n = len(placed)
        slots, pool_slots = (
            (i32 * n)(*(slot for slot, _ in placed)),
            (i32 * n)(*(slot for _, slot in placed)),
        )
        if self._lib.moe_model_upload(self._open, slots, pool_slots, n) != 0:
            raise self.take_error() or RuntimeError("experts could not be copied to the device")

    def bind(
        self, route: Callable[[], int], guess: Callable[[], int], tell: Callable[[], int]
    ) -> None:
        self._bound = ROUTE_FN(route), ROUTE_FN(guess), ROUTE_FN(tell)
        self._lib.moe_model_bind(self._open, *self._bound)

    def tell(self) -> bool:
        """Have an event told of that passed unasked; from any thread, and not from a callback.
        Whether that went well."""
        return bool(self._lib.moe_model_tell(self._open) == 1)

    def guess_with(self, gates: int) -> None:
        """Guess with these native gates, which must outlive the model's last step."""
        self._lib.moe_model_guess_with(self._open, gates)

    def step(self, phase: int, n_sequences: int) -> None:
        """Say what the next steps do (one of ``PHASES``) and for how many sequences."""
        self._lib.moe_model_step(self._open, phase, n_sequences)

    def stats(self) -> Stats:
        """Counters since the model was opened."""
        stats = Stats()
        self._lib.moe_model_stats(self._open, ctypes.byref(stats))
        return stats

    def take_error(self) -> Exception | None:
        """The reason of the last failed step, once."""
        text = ctypes.create_string_buffer(1024)
        kind = self._lib.moe_model_error(self._open, text, len(text))
        sentence = text.value.decode(errors="replace")
        if kind == ERROR_READ:
            return ExpertReadError(sentence)
        return RuntimeError(sentence) if kind == ERROR_OTHER else None

    def slot_keys(self) -> list[int]:
        """Per slot the key it holds or is reading, -1 for none."""
        keys = (i32 * self.n_slots)()
        self._lib.moe_model_slots(self._open, keys)
        return list(keys)

    def fill(self, placed: Sequence[tuple[int, int]]) -> None:
        """Read experts, as (key, slot), into empty slots; between steps only.

        After an exception each of these slots holds all of its expert or nothing.
        """
        n = len(placed)
        keys, slots = (
            (i32 * n)(*(key for key, _ in placed)),
            (i32 * n)(*(slot for _, slot in placed)),
        )
        if self._lib.moe_model_fill(self._open, keys, slots, n) != 0:
            raise self.take_error() or RuntimeError("experts could not be read")

    def cancel_guesses(self) -> None:
        self._lib.moe_model_cancel_guesses(self._open)

    def timeline(self, capacity: int) -> None:
        """Start recording events, keeping the newest ``capacity``; 0 stops and forgets."""
        self._lib.moe_model_timeline(self._open, capacity)

    def timeline_read(self, capacity: int) -> list[Event]:
        """Take the oldest recorded events, at most ``capacity``, in the order they ended in."""
        events = (Event * capacity)()
        n = self._lib.moe_model_timeline_read(self._open, events, capacity)
        return list(events[:n])

    def inject(self, skip: int, err: int) -> None:
        """Tests only: see moe.h."""
        self._lib.moe_model_inject(self._open, skip, err)

    def close(self) -> None:
        if self._handle and self._pid == os.getpid():
            self._lib.moe_model_free(self._handle)
            self._handle = None
