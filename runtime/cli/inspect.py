"""``moe-gguf inspect``: what a model file holds, from its header alone.

Reads no weights and does not load llama.cpp, so that it answers at once for any size of file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from ..columns import columns
from ..errors import UserError
from ..formats.bundle import COPY, PLAIN, BundleTable
from ..formats.ggml_types import GGML_TYPES
from ..formats.layout import ModelLayout
from ..formats.open import read_layout
from ..formats.tables import tables_of
from ..sizes import format_size
from ..text import shown
from .model import resolve
from .terminal import note

# Where one of these is set, a token's KV entry is not simply every layer's key and value rows.
_UNUSUAL_KV = (
    ".attention.kv_lora_rank",
    ".attention.key_length_swa",
    ".attention.value_length_swa",
    ".attention.shared_kv_layers",
    ".full_attention_interval",
    ".ssm.state_size",
)


@click.command()
@click.argument("model", metavar="MODEL")
@click.option("--json", "as_json", is_flag=True)
@click.option("--verify", "verified", is_flag=True, help="read a bundle whole, compare checksums")
def inspect(model: str, as_json: bool, verified: bool) -> None:
    """Show what is in MODEL: architecture, experts, sizes, types.

    Exits with 1 when --verify finds a difference.
    """
    path = resolve(model)
    document = describe(path)
    if verified:
        document["damage"] = verify_bundle(path)
    click.echo(json.dumps(document) if as_json else describe_text(document))
    if document.get("damage"):
        sys.exit(1)


def verify_bundle(path: Path) -> list[str]:
    """Compare a bundle with its checksums and say on stderr what came of it; the findings."""
    from ...converters.verify import verify
    from ..formats.bundle import is_bundle
    from ..progress import bar

    if not is_bundle(path):
        raise UserError(f"{path} has no checksums to verify: only bundles do, see convert")
    with bar(f"verifying {path.name}", in_bytes=True) as progress:
        findings = verify(path, progress)
    for finding in findings:
        note(f"moe-gguf: error: {finding}; convert the model again")
    if not findings:
        note(f"moe-gguf: verified {path}: every byte is as it was written")
    return findings


def describe(path: Path) -> dict[str, Any]:
    """The document of ``inspect``; UserError for a file that cannot be run."""
    layout = read_layout(path)
    blobs = [layer.blob_bytes for layer in layout.layers]
    return {
        "path": str(path),
        "files": [{"path": str(path), "bytes": path.stat().st_size} for path in layout.files],
        "architecture": layout.architecture,
        "name": layout.name,
        "n_ctx_train": layout.n_ctx_train,
        "n_vocab": layout.n_vocab,
        "n_layers": layout.n_layers,
        "moe_layers": [layer.layer for layer in layout.layers],
        "n_experts": layout.n_experts,
        "n_experts_used": layout.n_experts_used,
        "n_experts_shared": max(layout.keys.integers(".expert_shared_count", default=(0,))),
        "chat_template": bool(layout.keys.text("tokenizer.chat_template", "")),
        "expert_tensors": _groups(layout),
        "blob_bytes": blobs,
        "expert_bytes": layout.expert_bytes,
        "trunk_bytes": layout.trunk_bytes,
        "tables": [{"name": t.name, "bytes": t.n_bytes} for t in tables_of(layout)],
        "working_set": len(blobs) * layout.n_experts_used,
        "working_set_bytes": layout.n_experts_used * sum(blobs),
        "kv_bytes_per_token": _kv_bytes(layout),
        "bundle": None if layout.table is None else _bundle(layout, layout.table),
    }


def _bundle(layout: ModelLayout, table: BundleTable) -> dict[str, Any]:
    """What only a bundle has: where it came from, kernel layouts, a second copy."""
    low = table.low
    return {
        "source": table.source_name,
        "source_bytes": table.source_bytes,
        "source_sha256": table.source_sha256,
        "quant": table.quant,
        "layouts": sorted({t.layout for t in table.experts.tensors} - {PLAIN}),
        "low_types": sorted({GGML_TYPES[t.ggml_type].name for t in low.tensors}) if low else [],
        "low_blob_bytes": [layer.copies[1].n_bytes for layer in layout.layers] if low else [],
    }


def _groups(layout: ModelLayout) -> list[dict[str, Any]]:
    """Expert tensors that look alike, with the layers that have them."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for layer in layout.layers:
        for t in layer.tensors:
            key = (t.role, GGML_TYPES[t.ggml_type].name, t.ne, t.expert_bytes)
            groups.setdefault(key, []).append(layer.layer)
    return [
        {"role": role, "type": kind, "shape": ne, "bytes_per_expert": n_bytes, "layers": layers}
        for (role, kind, ne, n_bytes), layers in groups.items()
    ]


def _kv_bytes(layout: ModelLayout) -> int | None:
    """Bytes of a token in an F16 KV cache; None where the architecture's is of its own kind."""
    keys = layout.keys
    if any(keys.value(key) for key in _UNUSUAL_KV):
        return None
    n_head = max(keys.integers(".attention.head_count"))
    n_embd = keys.integer(".embedding_length")
    key = keys.integer(".attention.key_length", default=n_embd // n_head)
    value = keys.integer(".attention.value_length", default=n_embd // n_head)
    alike = (n_head,) * layout.n_layers
    heads = keys.integers(".attention.head_count_kv", count=layout.n_layers, default=alike)
    return sum(heads) * (key + value) * 2


def describe_text(document: dict[str, Any]) -> str:
    d = document
    files = d["files"]
    total = sum(file["bytes"] for file in files)
    blobs = sorted(set(d["blob_bytes"]))
    blob = " to ".join(format_size(n) for n in dict.fromkeys((blobs[0], blobs[-1])))
    shared = f", {d['n_experts_shared']} shared" if d["n_experts_shared"] else ""
    kv = d["kv_bytes_per_token"]
    tensors = columns(
        [
            (
                g["role"],
                g["type"],
                " x ".join(map(str, g["shape"])),
                f"in layers {_ranges(g['layers'])}",
            )
            for g in d["expert_tensors"]
        ],
        "<",
    )
    rows = [
        ("model", shown(d["name"])),
        ("architecture", shown(d["architecture"])),
        ("size", format_size(total) + (f" in {len(files)} files" if len(files) > 1 else "")),
        ("context", f"{d['n_ctx_train']} tokens"),
        (
            "vocabulary",
            f"{d['n_vocab']} tokens, {'a' if d['chat_template'] else 'no'} chat template",
        ),
        ("layers", f"{d['n_layers']}, {len(d['moe_layers'])} of them with experts"),
        ("experts", f"{d['n_experts']} per layer, {d['n_experts_used']} used per token{shared}"),
        *zip(("tensors", *("" for _ in tensors[1:])), tensors, strict=True),
        ("one expert", blob),
        ("all experts", format_size(d["expert_bytes"])),
        ("trunk", f"{format_size(d['trunk_bytes'])} (everything else)"),
        *(
            ("" if i else "tables", f"{t['name']}, {format_size(t['bytes'])} of the trunk")
            for i, t in enumerate(d["tables"])
        ),
        (
            "working set",
            f"{d['working_set']} experts per token, {format_size(d['working_set_bytes'])}",
        ),
        ("KV cache", f"{format_size(kv)} per token" if kv is not None else "see plan"),
        *_bundle_rows(d["bundle"]),
    ]
    return "\n".join(columns(rows, "<"))


def _bundle_rows(bundle: dict[str, Any] | None) -> list[tuple[str, str]]:
    if bundle is None:
        return []
    made = "regrouped" if bundle["quant"] == COPY else f"quantized to {bundle['quant']}"
    layouts = ", ".join(bundle["layouts"])
    rows = [
        ("bundle of", f"{shown(bundle['source'])} ({format_size(bundle['source_bytes'])}), {made}"),
        ("layout", f"kernel-ready: {layouts}" if layouts else "plain"),
    ]
    if bundle["low_types"]:
        sizes = sorted(set(bundle["low_blob_bytes"]))
        size = " to ".join(format_size(n) for n in dict.fromkeys((sizes[0], sizes[-1])))
        rows.append(("low copy", f"{', '.join(bundle['low_types'])}, {size} per expert"))
    return rows


def _ranges(numbers: Iterable[int]) -> str:
    """``0-3, 7, 9-10`` of ascending numbers."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1][1:] = [n]
        else:
            runs.append([n])
    return ", ".join("-".join(map(str, run)) for run in runs)
