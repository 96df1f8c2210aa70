"""Models from the Hugging Face hub: `hf:owner/repo`, downloaded once into the hub's own cache.

Owns which of a repository's files are needed and what a failure means to the user. Resuming,
checksums, credentials and the progress bar are huggingface-hub's.
"""

from __future__ import annotations

import re
from pathlib import Path

from ...runtime.errors import UserError
from .checkpoint import INDEX, SINGLE
from .tokenizer import FILES as TOKENIZER_FILES

PREFIX = "hf:"
_REFERENCE = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>[\w./-]+\.gguf))?")
_SPLIT = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")

# Not consolidated.*.safetensors or pytorch_model*.bin: the same weights once more.
CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    "README.md",
    INDEX,
    SINGLE,
    "model-*-of-*.safetensors",
    *TOKENIZER_FILES,
)


def download(reference: str, cache: Path | None = None) -> Path:
    """What `hf:owner/repo` or `hf:owner/repo/file.gguf` names, on disk: a folder, or that file.

    Only needed files are fetched, the parts of a split GGUF together; what an earlier try got is
    kept. `cache` replaces the hub's cache folder.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise UserError(
            f"{reference!r} is not a hub reference; write hf:owner/repo or hf:owner/repo/file.gguf"
        )
    repo, file = match["repo"], match["file"]
    patterns = [*CHECKPOINT_FILES] if file is None else [_SPLIT.sub(r"-?????-of-\1.gguf", file)]
    folder = _snapshot(repo, patterns, cache)
    wanted = folder / (file or "config.json")
    if not wanted.exists():
        raise UserError(
            f"{PREFIX}{repo} has no {file or 'config.json'}; name a file of it, as "
            "hf:owner/repo/file.gguf"
        )
    return folder if file is None else wanted


def _snapshot(repo: str, patterns: list[str], cache: Path | None) -> Path:
    try:
        from huggingface_hub import errors as hub
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(
            "downloading needs the huggingface-hub package; pip install 'moe-gguf[convert]'"
        ) from error
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns, cache_dir=cache))
    except hub.GatedRepoError as error:
        raise UserError(
            f"{PREFIX}{repo} is gated; accept its terms on huggingface.co and log in with `hf auth "
            "login`"
        ) from error
    except (hub.RepositoryNotFoundError, hub.HFValidationError) as error:
        raise UserError(
            f"{PREFIX}{repo} does not exist, or is private; check the name, or log in with `hf "
            "auth login`"
        ) from error
    except (hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError) as error:
        raise UserError(
            f"{PREFIX}{repo} is not in the cache and the hub cannot be reached; go online, or give "
            "a folder"
        ) from error
    except Exception as error:  # the transport's exceptions are no part of the hub's interface
        first = str(error).strip().splitlines()[:1]
        raise UserError(
            f"{PREFIX}{repo}: the download broke off ({''.join(first)}); run it again to resume"
        ) from error
