"""What a folder says about its model besides how to compute it: name, authors, licence, sampling.

Owns reading model cards and generation settings as people write them. gguf's Metadata knows which
of it becomes which key; it is shown text only where it expects text, since it stops at all else.
Nothing here can end a conversion: what is not understood is left out and noted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from gguf import Metadata

from ...runtime.errors import reason
from ...runtime.text import decoded, well_formed
from .checkpoint import read_optional
from .wants import Config

CARD, GENERATION = "README.md", "generation_config.json"
MAX_CARD_BYTES = 1 << 20  # of its front matter: yaml reads slowly

# Keys of a card that gguf takes lists of; all others are one text.
_LISTS = {"tags", "pipeline_tag", "languages", "language"}
_MODELS = {"base_model", "base_models", "base_model_sources"}
_MODELS |= {"datasets", "dataset", "dataset_sources"}
_NOTHING = ("", "~", "null", "Null", "NULL")

# gguf's name of each sampling setting, with a generation_config.json's, and the whole ones.
_SAMPLING = {
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "xtc_probability": "xtc_probability",
    "xtc_threshold": "xtc_threshold",
    "temp": "temperature",
    "penalty_last_n": "penalty_last_n",
    "penalty_repeat": "penalty_repeat",
    "mirostat": "mirostat",
    "mirostat_tau": "mirostat_tau",
    "mirostat_eta": "mirostat_eta",
}
_WHOLE = {"top_k", "penalty_last_n", "mirostat"}


def about(folder: Path, name: str, config: Config, n_weights: int, notes: list[str]) -> Metadata:
    """``name`` stands in where neither the card nor the configuration has one; it is not the
    folder's where that is a commit's, and then it is better than what the configuration has."""
    card = _card(folder / CARD, notes)
    path = config.get("_name_or_path")
    known = isinstance(path, str) and name == well_formed(folder.resolve().name)
    named = {"_name_or_path": well_formed(path)} if known else None
    out = Metadata.apply_metadata_heuristic(Metadata(), card, named, Path(name), n_weights)
    settings = read_optional(folder / GENERATION, notes)
    if isinstance(sequence := settings.get("sequence"), str):
        out.sampling_sequence = well_formed(sequence)
    for key, theirs in _SAMPLING.items():
        value = settings.get(theirs)
        if value is not None and (number := _number(value, key in _WHOLE)) is None:
            notes.append(f"{GENERATION}: {theirs} is no number that fits: it is left out")
        elif value is not None:
            setattr(out, f"sampling_{key}", number)
    return out


def _number(value: object, whole: bool) -> float | int | None:
    """As the key's 32 bits hold it."""
    if type(value) not in (int, float) or not abs(value) < 2**31:  # type: ignore[arg-type]
        return None
    number = float(value)  # type: ignore[arg-type]
    if not whole:
        return number
    return int(number) if number.is_integer() else None


def _card(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        text = _front_matter(path)
        # Every scalar as it is written: a version 1.10 is no number, and a language "no" no truth.
        card = yaml.load(text, Loader=yaml.BaseLoader) if text else {}
        return dict(_entries(card)) if isinstance(card, dict) else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        why = reason(error).splitlines()[0] if str(error) else type(error).__name__
        notes.append(f"{path.name}: its metadata cannot be read ({why}): it is left out")
        return {}


def _front_matter(path: Path) -> str:
    """The lines between the first two of ``---``."""
    with path.open("rb") as file:
        text = decoded(file.read(MAX_CARD_BYTES + 1))
    lines = text.splitlines()
    if not lines or lines[0].rstrip() != "---":
        return ""
    end = next((i for i, line in enumerate(lines) if i and line.rstrip() == "---"), None)
    if end is None and len(text) > MAX_CARD_BYTES:
        raise ValueError(f"it is longer than {MAX_CARD_BYTES} bytes")
    return "\n".join(lines[1:end]).replace("\t", "  ") + "\n"


def _entries(card: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    """What gguf understands of a card."""
    for key, value in card.items():
        if not isinstance(key, str):
            continue
        if key in _MODELS:
            entries = [entry for item in _items(value) if (entry := _model(item))]
            if entries:
                yield key, entries
        elif key in _LISTS:
            if texts := [text for item in _items(value) if (text := _text(item))]:
                yield key, texts
        else:
            # A licence may be several, and so may authors.
            texts = [text for item in _items(value) if (text := _text(item))]
            if texts:
                yield key, (",".join(texts) if key == "license" else ", ".join(texts))


def _items(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _text(value: object) -> str | None:
    return well_formed(value) if isinstance(value, str) and value not in _NOTHING else None


def _model(value: object) -> str | dict[str, str] | None:
    """A model or data set another one was made from: its name, or what is said about it."""
    if not isinstance(value, dict):
        return _text(value)
    return {key: text for key, item in value.items() if (text := _text(item))}
