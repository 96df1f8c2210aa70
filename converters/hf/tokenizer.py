"""A Hugging Face folder's tokenizer as llama.cpp's metadata keys.

Owns which of a folder's tokenizer files counts, and what tokens, scores and token types become of
it. Knows nothing of weights. Merges, special tokens and chat template are gguf's SpecialVocab's.

llama.cpp knows how text is split before byte-pair merging by name only; the name is found by the
splitting rule that tokenizer.json spells out. An unknown rule is refused: text would be cut in
other places than the model was trained on, and nobody would notice.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType

from ...runtime.errors import UserError
from .checkpoint import read_json
from .wants import OTHER_WAY, Config

# Files that shape the result, where they exist.
FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
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

    def put(self, i: int, token: str, score: float, kind: TokenType) -> None:
        if not 0 <= i < len(self.tokens):
            raise ValueError(f"token {i} is outside the model's {len(self.tokens)}")
        self.tokens[i], self.scores[i], self.types[i] = token, score, kind

    def put_added(self, i: int, token: str, special: bool) -> None:
        """A token that text is searched for before it is cut and merged.

        One beyond the vocabulary has no embedding, and some models come with such.
        """
        if i >= len(self.tokens):
            return
        if special or _SPECIAL_LOOKS.fullmatch(token):
            self.put(i, token, _ADDED_SCORE, TokenType.CONTROL)
        else:
            self.put(i, token.replace("▁", " "), _ADDED_SCORE, TokenType.USER_DEFINED)

    def add(self, writer: GGUFWriter, model: str, rule: str) -> None:
        writer.add_tokenizer_model(model)
        writer.add_tokenizer_pre(rule)
        writer.add_token_list(self.tokens)
        if model == "llama":
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)


def add_tokenizer(folder: Path, config: Config, writer: GGUFWriter) -> None:
    """Add the keys of this folder's tokenizer."""
    vocab = _Vocab(config.count("vocab_size"))
    has_model, fast = (folder / "tokenizer.model").exists(), folder / "tokenizer.json"
    if not has_model and not fast.exists():
        raise UserError(
            f"{folder} has neither tokenizer.json nor tokenizer.model; download the model's "
            "tokenizer files too"
        )
    try:
        byte_level = not has_model and _add_fast(read_json(fast), vocab, writer)
        if has_model:
            _add_sentencepiece(folder, vocab, writer)
        special = SpecialVocab(folder, load_merges=byte_level, n_vocab=len(vocab.tokens))
        special.add_to_gguf(writer, quiet=True)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError) as error:
        raise UserError(
            f"{folder}: its tokenizer files cannot be understood ({error}); download them again"
        ) from error


def _add_sentencepiece(folder: Path, vocab: _Vocab, writer: GGUFWriter) -> None:
    """tokenizer.model, and the tokens that other files add to it."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise UserError(
            "this model's tokenizer.model needs the sentencepiece package; "
            "pip install 'moe-gguf[convert]'"
        ) from error
    pieces = SentencePieceProcessor()
    try:
        pieces.LoadFromFile(str(folder / "tokenizer.model"))
    except RuntimeError as error:
        raise ValueError("tokenizer.model is damaged") from error
    kinds = (
        (pieces.IsUnknown, TokenType.UNKNOWN),
        (pieces.IsControl, TokenType.CONTROL),
        (pieces.IsUnused, TokenType.UNUSED),
        (pieces.IsByte, TokenType.BYTE),
    )
    for i in range(min(pieces.vocab_size(), len(vocab.tokens))):
        kind = next((kind for test, kind in kinds if test(i)), TokenType.NORMAL)
        vocab.put(i, pieces.IdToPiece(i), pieces.GetScore(i), kind)
    settings = _optional(folder / "tokenizer_config.json")
    for token, i in _optional(folder / "added_tokens.json").items():
        vocab.put_added(i, token, special=False)
    for i, token in settings.get("added_tokens_decoder", {}).items():
        vocab.put_added(int(i), token["content"], token.get("special", False))
    if settings.get("add_prefix_space") is not None:
        writer.add_add_space_prefix(settings["add_prefix_space"])
    vocab.add(writer, "llama", "default")


def _add_fast(tokenizer: dict[str, Any], vocab: _Vocab, writer: GGUFWriter) -> bool:
    """tokenizer.json; True if it is byte-level, which llama.cpp merges by its list of merges."""
    model = tokenizer["model"]
    if model["type"] != "BPE":
        raise UserError(
            f"this converter knows byte-pair tokenizers, not {model['type']}; {OTHER_WAY}"
        )
    byte_level = not model.get("byte_fallback", False)
    rule = _rule(tokenizer) if byte_level else "default"
    # Without byte level, llama.cpp merges by score: the earlier a merge, the higher.
    scores: dict[str, float] = {}
    for rank, pair in enumerate([] if byte_level else model["merges"]):
        merged = "".join(pair) if isinstance(pair, list) else pair.replace(" ", "", 1)
        scores.setdefault(merged, -float(rank))
    for token, i in model["vocab"].items():
        kind = TokenType.NORMAL
        if not byte_level and _BYTE.fullmatch(token):
            kind = TokenType.BYTE
        vocab.put(i, token, scores.get(token, _ADDED_SCORE - len(scores)), kind)
    for added in tokenizer.get("added_tokens", []):
        vocab.put_added(added["id"], added["content"], added.get("special", False))
    if not byte_level and not _prepends_space(tokenizer):
        writer.add_add_space_prefix(False)
    vocab.add(writer, "gpt2" if byte_level else "llama", rule)
    return byte_level


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


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
