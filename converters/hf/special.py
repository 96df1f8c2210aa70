"""A tokenizer's merges, special tokens and chat templates, by gguf's SpecialVocab.

Owns what SpecialVocab is shown: it reads a folder's files, and would stop at much that people write
into them, so it is given files that hold what can be understood. What cannot is left out and noted:
a tokenizer without a template is still one. Knows nothing of tokens' texts, scores and types.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import ascii_letters, digits
from typing import Any

from gguf import GGUFWriter, Keys, SpecialVocab

from ...runtime.text import decoded, well_formed
from .checkpoint import read_optional
from .wants import Config

EXTRA_TEMPLATES = "additional_chat_templates"

_KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_NAME_CHARACTERS = frozenset(ascii_letters + digits)


def add_special(
    folder: Path,
    config: Config,
    tokenizer: dict[str, Any],
    settings: dict[str, Any],
    merges: Sequence[str],
    writer: GGUFWriter,
    notes: list[str],
) -> None:
    """``tokenizer`` and ``settings`` are tokenizer.json and tokenizer_config.json, or empty."""
    shown: dict[str, dict[str, Any]] = {
        "tokenizer.json": {"added_tokens": list(_added(tokenizer))},
        "tokenizer_config.json": dict(_settings(settings)),
        "config.json": dict(_ids(config)),
    }
    processor = tokenizer.get("post_processor")
    if processor is not None:
        shown["tokenizer.json"]["post_processor"] = processor
    try:
        special = _read(shown, config.count("vocab_size"))
    except (AttributeError, TypeError, LookupError, ValueError):
        notes.append("tokenizer.json's post_processor cannot be understood: it is left out")
        del shown["tokenizer.json"]["post_processor"]
        special = _read(shown, config.count("vocab_size"))
    special.merges = list(merges)
    special.chat_template = _templates(folder, settings, notes)
    special.add_to_gguf(writer, quiet=True)
    # Out of a set, whose order changes from process to process.
    if named := writer.kv_data[0].get(Keys.Tokenizer.CHAT_TEMPLATES):
        named.value.sort()


def byte_level_merges(model: dict[str, Any], notes: list[str]) -> list[str]:
    """The merges of tokenizer.json, each two parts with a space between them."""
    given = model.get("merges")
    entries = given if isinstance(given, list) else []
    merges = [merge for entry in entries if (merge := _merge(entry))]
    if not merges:
        raise ValueError("its tokenizer.json has no merges")
    if n := len(entries) - len(merges):
        notes.append(f"{n} merges of tokenizer.json are none: they are left out")
    return merges


def _merge(entry: object) -> str | None:
    if isinstance(entry, str):
        return well_formed(entry) if 0 < entry.find(" ", 1) < len(entry) - 1 else None
    if isinstance(entry, list) and len(entry) == 2 and all(isinstance(e, str) and e for e in entry):
        # Byte level has a letter for the space.
        return " ".join(well_formed(part).replace(" ", "\u0120") for part in entry)
    return None


def _read(files: dict[str, dict[str, Any]], n_vocab: int) -> SpecialVocab:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_text(json.dumps(content))
        return SpecialVocab(folder, n_vocab=n_vocab)


def added_tokens(tokenizer: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The entries of tokenizer.json's list that say a token and its number."""
    given = tokenizer.get("added_tokens")
    for entry in given if isinstance(given, list) else ():
        known = isinstance(entry, dict) and isinstance(entry.get("content"), str)
        if known and is_id(entry.get("id")):
            yield entry


def is_id(value: object) -> bool:
    return type(value) is int and value >= 0


def _added(tokenizer: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for entry in added_tokens(tokenizer):
        yield {"id": entry["id"], "content": entry["content"]}


def _settings(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for kind in _KINDS:
        token = settings.get(f"{kind}_token")
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            yield f"{kind}_token", content
        if isinstance(flag := settings.get(f"add_{kind}_token"), bool):
            yield f"add_{kind}_token", flag


def _ids(config: Config) -> Iterator[tuple[str, int]]:
    """Of several end tokens the first; people write -1 where there is none."""
    for kind in _KINDS:
        given = config.get(f"{kind}_token_id")
        for value in given if isinstance(given, list) else [given]:
            if is_id(value):
                yield f"{kind}_token_id", value
                break


# --- templates ----------------------------------------------------------------------------------


def template_files(folder: Path) -> list[Path]:
    """Further templates, in the order of their names."""
    return sorted((folder / EXTRA_TEMPLATES).glob("*.jinja"))


def _templates(
    folder: Path, settings: dict[str, Any], notes: list[str]
) -> str | list[dict[str, str]] | None:
    """The one template, or several by name."""
    given = settings.get("chat_template")
    if given is None:
        given = _from_files(folder, notes)
    if given is None or isinstance(given, str):
        return given and well_formed(given)
    if isinstance(given, dict):
        given = [{"name": name, "template": text} for name, text in given.items()]
    named: dict[str, str] = {}
    for entry in given if isinstance(given, list) else [given]:
        fields = entry if isinstance(entry, dict) else {}
        name, text = fields.get("name"), fields.get("template")
        if isinstance(name, str) and name and isinstance(text, str):
            key = "".join(c if c in _NAME_CHARACTERS else "_" for c in name)
            named[key] = well_formed(text)
        else:
            notes.append("a chat template without a name or a text is left out")
    return [{"name": name, "template": named[name]} for name in sorted(named)] or None


def _from_files(folder: Path, notes: list[str]) -> Any:
    main = folder / "chat_template.jinja"
    if not main.is_file():
        return read_optional(folder / "chat_template.json", notes).get("chat_template")
    texts = {"default": main} | {path.stem: path for path in template_files(folder)}
    found = []
    for name, path in texts.items():
        try:
            found.append({"name": name, "template": decoded(path.read_bytes())})
        except (OSError, ValueError):
            notes.append(f"{path.name} cannot be read as text: it is left out")
    if len(texts) == 1:
        return found[0]["template"] if found else None
    return found
