"""The fields that all of OpenAI's bodies share, and those that llama.cpp's server adds to them.

What is left out means what it means to llama.cpp's own tools (``engine.request.Sampling``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from ..engine.request import GBNF, Sampling, Schema
from .fields import Fields, is_number
from .refusal import Refusal

MOST_CHOICES = 128
MOST_STOPS = 64
MOST_TOP = 20
_LONGEST = 2**31 - 1
_SEEDS = 2**32 - 1  # the last one means random to llama.cpp


class _Number(NamedTuple):
    field: str  # of Sampling
    low: float
    high: float
    whole: bool = False


# By name; where a name of vLLM's means the same, that too.
_NUMBERS = {
    "temperature": _Number("temp", 0, 100),
    "top_p": _Number("top_p", 0, 1),
    "min_p": _Number("min_p", 0, 1),
    "typical_p": _Number("typical_p", 0, 1),
    "top_n_sigma": _Number("top_n_sigma", -1, 1000),
    "xtc_probability": _Number("xtc_probability", 0, 1),
    "xtc_threshold": _Number("xtc_threshold", 0, 1),
    "repeat_penalty": _Number("repeat_penalty", 0.01, 100),
    "repetition_penalty": _Number("repeat_penalty", 0.01, 100),
    "frequency_penalty": _Number("frequency_penalty", -2, 2),
    "presence_penalty": _Number("presence_penalty", -2, 2),
    "repeat_last_n": _Number("penalty_last_n", -1, _LONGEST, whole=True),
    "dry_multiplier": _Number("dry_multiplier", 0, 100),
    "dry_base": _Number("dry_base", 0, 100),
    "dry_allowed_length": _Number("dry_allowed_length", 0, _LONGEST, whole=True),
    "dry_penalty_last_n": _Number("dry_penalty_last_n", -1, _LONGEST, whole=True),
    "mirostat": _Number("mirostat", 0, 2, whole=True),
    "mirostat_tau": _Number("mirostat_tau", 0, 100),
    "mirostat_eta": _Number("mirostat_eta", 0, 1),
}


def sampling(fields: Fields, n_vocab: int) -> Sampling:
    found: dict[str, Any] = {}
    for name, (field, low, high, whole) in _NUMBERS.items():
        value = (
            fields.integer(name, int(low), int(high)) if whole else fields.number(name, low, high)
        )
        if value is not None:
            found[field] = value
    # -1 is how vLLM says all of them, where llama.cpp says 0.
    if (top_k := fields.integer("top_k", -1, _LONGEST)) is not None:
        found["top_k"] = max(0, top_k)
    # Below 0 is how llama.cpp says random; more than it takes is folded, since a seed is a name.
    seed = fields.integer("seed", -(2**63), 2**64 - 1)
    if seed is not None and seed >= 0:
        found["seed"] = seed % _SEEDS
    if breakers := fields.texts("dry_sequence_breakers", MOST_STOPS):
        found["dry_breakers"] = breakers
    found["logit_bias"] = _bias(fields, n_vocab)
    return Sampling(**found)


def choice(sampling: Sampling, k: int) -> Sampling:
    """The settings of the answer ``k`` of several to one prompt: the same seed would repeat it."""
    if sampling.seed is None or k == 0:
        return sampling
    return replace(sampling, seed=(sampling.seed + k) % _SEEDS)


def _bias(fields: Fields, n_vocab: int) -> Mapping[int, float]:
    """As OpenAI writes it, an object by token, or as llama.cpp does, a list of pairs."""
    value = fields.value("logit_bias")
    if value is None:
        return {}
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    wanted = f"numbers by tokens from 0 to {n_vocab - 1}"
    found = {}
    for pair in pairs if isinstance(pairs, list) else [None]:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise fields.wrong("logit_bias", wanted)
        token, bias = pair
        if isinstance(token, str) and token.isascii() and token.isdigit() and len(token) < 20:
            token = int(token)
        if bias is False:  # llama.cpp's way to say never
            bias = -math.inf
        elif not is_number(bias):
            raise fields.wrong("logit_bias", wanted)
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < n_vocab:
            raise fields.wrong("logit_bias", wanted)
        found[token] = float(bias)
    return found


def length(fields: Fields, default: int | None) -> int | None:
    """The most tokens of an answer; None: until the model ends, for which llama.cpp says -1."""
    for name in ("max_completion_tokens", "max_tokens"):
        if (value := fields.integer(name, -1, _LONGEST)) is not None:
            return None if value == -1 else value
    return default


def n_choices(fields: Fields) -> int:
    return fields.integer("n", 1, MOST_CHOICES) or 1


def include_usage(fields: Fields) -> bool:
    """Whether a stream is to end with what it took."""
    asked = fields.inner("stream_options")
    return asked is not None and asked.flag("include_usage")


def constraint(fields: Fields) -> GBNF | Schema | None:
    """What an answer must be: ``response_format``, or llama.cpp's ``grammar``, ``json_schema``."""
    found = {
        name: value
        for name, value in (
            ("response_format", _response_format(fields)),
            ("grammar", _grammar(fields)),
            ("json_schema", _schema(fields, "json_schema")),
        )
        if value is not None
    }
    if len(found) > 1:
        first, second, *_ = found
        raise Refusal(f"{first} and {second} exclude each other: give one of them", second)
    return next(iter(found.values()), None)


def output_format(fields: Fields) -> Schema | None:
    """What an answer must be, in Anthropic's bodies, by either of its names."""
    config = fields.inner("output_config") or fields
    for place, name in ((config, "format"), (fields, "output_format")):
        asked = place.inner(name)
        if asked is not None:
            if asked.text("type") != "json_schema":
                raise asked.wrong("type", "json_schema")
            schema = _schema(asked, "schema")
            if schema is None:
                raise asked.wrong("schema", "a JSON schema")
            return schema
    return None


def text_format(fields: Fields) -> Schema | None:
    """What an answer must be, in bodies of ``/v1/responses``."""
    text = fields.inner("text")
    return None if text is None else _response_format(text, "format")


def _grammar(fields: Fields) -> GBNF | None:
    text = fields.text("grammar")
    return GBNF(text=text) if text else None


def _response_format(fields: Fields, name: str = "response_format") -> Schema | None:
    asked = fields.inner(name)
    if asked is None:
        return None
    match asked.text("type"):
        case "text":
            return None
        case "json_object":
            return _schema(asked, "schema") or Schema(schema=True)
        case "json_schema":
            wrapped = asked.inner("json_schema") or asked  # llama.cpp's form has no wrapper
            schema = _schema(wrapped, "schema")
            if schema is None:
                raise wrapped.wrong("schema", "a JSON schema")
            return schema
    raise asked.wrong("type", "text, json_object or json_schema")


def _schema(fields: Fields, name: str) -> Schema | None:
    schema = fields.value(name)
    if schema is None:
        return None
    if not isinstance(schema, Mapping):
        raise fields.wrong(name, "a JSON schema")
    return Schema(schema=schema)
