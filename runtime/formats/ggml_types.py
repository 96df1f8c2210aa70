"""ggml's tensor types: how many items a block has and how many bytes it takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GgmlType:
    """How a row is stored: blocks of `block` items, each `block_bytes` long."""

    name: str
    block: int
    block_bytes: int


# From ggml.h and ggml-common.h. Kept here, not taken from the gguf package: importing that takes
# longer than reading a header, and it does not list every type of the pinned llama.cpp.
GGML_TYPES: dict[int, GgmlType] = {
    number: GgmlType(name, block, block_bytes)
    for number, name, block, block_bytes in (
        (0, "F32", 1, 4),
        (1, "F16", 1, 2),
        (2, "Q4_0", 32, 18),
        (3, "Q4_1", 32, 20),
        (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24),
        (8, "Q8_0", 32, 34),
        (9, "Q8_1", 32, 36),
        (10, "Q2_K", 256, 84),
        (11, "Q3_K", 256, 110),
        (12, "Q4_K", 256, 144),
        (13, "Q5_K", 256, 176),
        (14, "Q6_K", 256, 210),
        (15, "Q8_K", 256, 292),
        (16, "IQ2_XXS", 256, 66),
        (17, "IQ2_XS", 256, 74),
        (18, "IQ3_XXS", 256, 98),
        (19, "IQ1_S", 256, 50),
        (20, "IQ4_NL", 32, 18),
        (21, "IQ3_S", 256, 110),
        (22, "IQ2_S", 256, 82),
        (23, "IQ4_XS", 256, 136),
        (24, "I8", 1, 1),
        (25, "I16", 1, 2),
        (26, "I32", 1, 4),
        (27, "I64", 1, 8),
        (28, "F64", 1, 8),
        (29, "IQ1_M", 256, 56),
        (30, "BF16", 1, 2),
        (34, "TQ1_0", 256, 54),
        (35, "TQ2_0", 256, 66),
        (39, "MXFP4", 32, 17),
        (40, "NVFP4", 64, 36),
        (41, "Q1_0", 128, 18),
        (42, "Q2_0", 64, 18),
    )
}


def type_bytes(ggml_type: int, n_items: int) -> int:
    """Bytes of whole rows with this many items."""
    kind = GGML_TYPES[ggml_type]
    assert n_items % kind.block == 0
    return n_items // kind.block * kind.block_bytes


def pad_up(n_bytes: int, alignment: int) -> int:
    """The next multiple of a power of two."""
    return (n_bytes + alignment - 1) & -alignment
