"""A Hugging Face folder's tokenizer as llama.cpp's metadata keys.

Owns which of a folder's tokenizer files counts, and what tokens, scores and token types become of
it. Knows nothing of weights. Merges, special tokens and chat template are special.py's.

llama.cpp knows how text is split before byte-pair merging by name only; the name is found by the
splitting rule that tokenizer.json spells out. An unknown rule is refused: text would be cut in
other places than the model was trained on, and nobody would notice.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from ...runtime.errors import UserError
from ...runtime.text import shown, well_formed
from .checkpoint import read_json, read_optional
from .special import EXTRA_TEMPLATES, add_special, added_tokens, byte_level_merges
from .wants import OTHER_WAY, Config

# Patterns of the files that shape the result, where they exist.
FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    f"{EXTRA_TEMPLATES}/*.jinja",
)

# How a tokenizer.json cuts text before merging, and llama.cpp's name of that rule.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_RULES: dict[tuple[str | None, ...], str] = {
    ("ByteLevel",): "gpt-2",
    (QWEN2,): "qwen2",
    (O200K,): "gpt-4o",
}
# DeepSeek spells out every cased letter of Unicode; the start of that list is enough to know it.
_DEEPSEEK = (r"[\r\n]", r"\s?[A-Za-zµÀ-ÖØ-öø-", r"\s?[!-/:-~", r"\s+$", "[一-")

_UNUSED_SCORE = -10000.0
_ADDED_SCORE = -1000.0
_SPECIAL_LOOKS = re.compile(r"<\|.*\|>|<\uff5c.*\uff5c>|<pad>|<unused.*>", re.DOTALL)
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class _Vocab:
    """Tokens by id, padded to the model's vocabulary as llama.cpp's converter pads them."""

    def __init__(self, size: int) -> None:
        self.tokens: list[str] = [f"[PAD{i}]" for i in range(size)]
        self.scores: list[float] = [_UNUSED_SCORE] * size
        self.types: list[TokenType] = [TokenType.UNUSED] * size
        self.left_out = 0

    def put(self, i: object, token: object, score: float, kind: TokenType) -> None:
        """A token whose number the model has no embedding for has no place, and some models come
        with such."""
        if type(i) is int and 0 <= i < len(self.tokens) and isinstance(token, str):
            self.tokens[i], self.scores[i], self.types[i] = well_formed(token), score, kind
        else:
            self.left_out += 1

    def put_added(self, i: object, token: object, special: object) -> None:
        """A token that text is searched for before it is cut and merged."""
        text = token if isinstance(token, str) else ""
        if special is True or _SPECIAL_LOOKS.fullmatch(text):
            self.put(i, token, _ADDED_SCORE, TokenType.CONTROL)
        else:
            text = text.replace("▁", " ")
            self.put(i, text or token, _ADDED_SCORE, TokenType.USER_DEFINED)

    def _tell_apart(self) -> int:
        """Give every token a text of its own, as llama.cpp demands; the number that got another.

        It reads no further than a NUL. Of two alike the first stays; padding gives way to all.
        """
        seen: set[str] = set()
        changed = 0
        for i in sorted(range(len(self.tokens)), key=lambda i: self.types[i] is TokenType.UNUSED):
            token = self.tokens[i].partition("\0")[0]
            if token in seen:
                changed += self.types[i] is not TokenType.UNUSED
                token = f"[PAD{i}]"
                while token in seen:
                    token += "]"
                self.scores[i], self.types[i] = _UNUSED_SCORE, TokenType.UNUSED
            if token:  # one without text gets one from llama.cpp
                seen.add(token)
            self.tokens[i] = token
        return changed

    def add(self, writer: GGUFWriter, model: str, rule: str, notes: list[str]) -> None:
        if n := self.left_out:
            notes.append(f"{n} tokens have no place among the model's {len(self.tokens)}: left out")
        if n := self._tell_apart():
            notes.append(f"{n} tokens have the text of another one: they are left out")
        writer.add_tokenizer_model(model)
        writer.add_tokenizer_pre(rule)
        writer.add_token_list(self.tokens)
        if model == "llama":
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)


def add_tokenizer(folder: Path, config: Config, writer: GGUFWriter, notes: list[str]) -> None:
    """Add the keys of this folder's tokenizer; what of its files was left out goes to ``notes``."""
    vocab = _Vocab(config.count("vocab_size"))
    pieces, fast = folder / "tokenizer.model", folder / "tokenizer.json"
    if not pieces.exists() and not fast.exists():
        raise UserError(
            f"{folder} has neither tokenizer.json nor tokenizer.model; download the model's "
            "tokenizer files too"
        )
    settings = read_optional(folder / "tokenizer_config.json", notes)
    try:
        if pieces.exists() and _add_sentencepiece(folder, settings, vocab, writer, notes):
            tokenizer, merges = read_optional(fast, notes), []
        else:
            tokenizer = read_json(fast)
            merges = _add_fast(tokenizer, vocab, writer, notes)
        add_special(folder, config, tokenizer, settings, merges, writer, notes)
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        raise UserError(
            f"{folder}: its tokenizer files cannot be understood ({error}); download them again"
        ) from error


def _add_sentencepiece(
    folder: Path, settings: dict[str, Any], vocab: _Vocab, writer: GGUFWriter, notes: list[str]
) -> bool:
    """tokenizer.model, and the tokens that other files add to it; False if it is damaged, and
    tokenizer.json may stand in for it."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise UserError(
            "this model's tokenizer.model needs the sentencepiece package; "
            "pip install 'moe-gguf[convert]'"
        ) from error
    pieces = SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto((folder / "tokenizer.model").read_bytes())
    except RuntimeError as error:
        if not (folder / "tokenizer.json").exists():
            raise ValueError("tokenizer.model is damaged") from error
        notes.append("tokenizer.model is damaged: tokenizer.json is taken instead")
        return False
    kinds = (
        (pieces.IsUnknown, TokenType.UNKNOWN),
        (pieces.IsControl, TokenType.CONTROL),
        (pieces.IsUnused, TokenType.UNUSED),
        (pieces.IsByte, TokenType.BYTE),
    )
    for i in range(min(pieces.vocab_size(), len(vocab.tokens))):
        kind = next((kind for test, kind in kinds if test(i)), TokenType.NORMAL)
        vocab.put(i, pieces.IdToPiece(i), pieces.GetScore(i), kind)
    for token, i in read_optional(folder / "added_tokens.json", notes).items():
        vocab.put_added(i, token, special=False)
    decoder = settings.get("added_tokens_decoder")
    for i, entry in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(entry, dict):
            number = int(i) if i.isdecimal() and len(i) < 10 else None
            vocab.put_added(number, entry.get("content"), entry.get("special"))
    if isinstance(settings.get("add_prefix_space"), bool):
        writer.add_add_space_prefix(settings["add_prefix_space"])
    vocab.add(writer, "llama", "default", notes)
    return True


def _add_fast(
    tokenizer: dict[str, Any], vocab: _Vocab, writer: GGUFWriter, notes: list[str]
) -> list[str]:
    """tokenizer.json; the merges of one that is byte-level, which llama.cpp goes by."""
    model = tokenizer["model"]
    if model.get("type", "BPE") != "BPE":
        raise UserError(
            f"this converter knows byte-pair tokenizers, not {shown(model['type'])}; {OTHER_WAY}"
        )
    byte_level = not model.get("byte_fallback", False)
    rule = _rule(tokenizer) if byte_level else "default"
    merges = byte_level_merges(model, notes) if byte_level else []
    # Without byte level, llama.cpp merges by score: the earlier a merge, the higher.
    scores: dict[str, float] = {}
    for rank, pair in enumerate([] if byte_level else model["merges"]):
        parts = pair.split(" ", 1) if isinstance(pair, str) else pair
        if isinstance(parts, list) and all(isinstance(part, str) for part in parts):
            scores.setdefault("".join(parts), -float(rank))
    for token, i in model["vocab"].items():
        kind = TokenType.NORMAL
        if not byte_level and _BYTE.fullmatch(token):
            kind = TokenType.BYTE
        vocab.put(i, token, scores.get(token, _ADDED_SCORE - len(scores)), kind)
    for added in added_tokens(tokenizer):
        vocab.put_added(added["id"], added["content"], added.get("special"))
    if not byte_level and not _prepends_space(tokenizer):
        writer.add_add_space_prefix(False)
    vocab.add(writer, "gpt2" if byte_level else "llama", rule, notes)
    return merges


def _steps(part: dict[str, Any] | None, list_key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, whether one, several or none."""
    if part is None:
        return []
    return part[list_key] if part["type"] == "Sequence" else [part]


def _rule(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for how this byte-level tokenizer cuts text."""
    steps = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    rules: list[str | None] = []
    for step in steps:
        kind = step["type"]
        if kind == "Split":
            rules.append(step["pattern"].get("Regex"))
        elif kind == "Digits" and step["individual_digits"]:
            rules.append(kind)
        elif kind == "ByteLevel" and not step.get("add_prefix_space", False):
            rules += [kind] if step.get("use_regex", True) else []
        else:
            rules.append(None)
    if (
        len(rules) == 6
        and rules[5] == "Digits"
        and all(
            isinstance(rule, str) and rule.startswith(start)
            for rule, start in zip(rules, _DEEPSEEK, strict=False)
        )
    ):
        return "deepseek-llm"
    if tuple(rules) not in _RULES:
        raise UserError(
            "tokenizer.json cuts text by a rule that this converter cannot name to llama.cpp; "
            + OTHER_WAY
        )
    return _RULES[tuple(rules)]


def _prepends_space(tokenizer: dict[str, Any]) -> bool:
    normal = _steps(tokenizer.get("normalizer"), "normalizers")
    pre = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    return any(step["type"] == "Prepend" for step in normal) or any(
        step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        for step in pre
    )
