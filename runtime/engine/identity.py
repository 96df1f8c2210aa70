"""What a kept state depends on: whose it is among models, versions and ways to compute.

Knows where a model's bytes lie and looks at few of them; knows nothing of states.
"""

from __future__ import annotations

import llama_cpp
import xxhash

from ..formats.layout import NOWHERE
from ..formats.stream import stream_of
from ..opening import Found
from ..params import ContextShape

_SAMPLE_BYTES = 512  # of each tensor: another model of the same shapes differs in nearly all


def identity_of(found: Found, shape: ContextShape) -> bytes:
    """The same for whoever would compute the same state: by a model's header and a sample of each
    of its tensors, llama.cpp, the processor's kernels, and what of a context changes a state."""
    stream = stream_of(found.layout)
    hashed = xxhash.xxh3_128(stream.header)
    files = [path.open("rb", buffering=0) for path in found.layout.files]
    try:
        for tensor in found.layout.tensors:
            if tensor.file != NOWHERE:
                file = files[tensor.file]
                file.seek(tensor.offset + max(0, tensor.n_bytes // 2 - _SAMPLE_BYTES))
                hashed.update(file.read(min(tensor.n_bytes, _SAMPLE_BYTES)))
    finally:
        for file in files:
            file.close()
    params = shape.params()
    depends = (
        hashed.hexdigest(),
        llama_cpp.__version__,
        llama_cpp.llama_print_system_info().decode(),
        found.n_used,
        sorted(found.options.losses().items()),
        found.options.device,
        found.kernels.is_repacked,
        params.type_k,
        params.type_v,
        params.flash_attn_type,
        params.kv_unified,
        params.swa_full,
        params.n_rs_seq,
    )
    return repr(depends).encode()
