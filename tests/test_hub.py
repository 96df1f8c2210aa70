"""`hf:` references: what is asked of the hub, and what its failures say."""

from __future__ import annotations

import fnmatch
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from moe_gguf.converters.hf.hub import download
from moe_gguf.runtime.errors import UserError

REPO_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "chat_template.jinja",
    "README.md",
    "consolidated.00.safetensors",
    "pytorch_model-00001-of-00002.bin",
    "original/config.json",
    "original/model--00001-of-00002.safetensors",
    "metal/model.bin",
    "q/big-00001-of-00002.gguf",
    "q/big-00002-of-00002.gguf",
    "q/small.gguf",
]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A hub with one repository; the calls made to it."""
    calls: list[dict[str, Any]] = []

    def snapshot(repo: str, *, allow_patterns: list[str], cache_dir: Path | None) -> str:
        calls.append({"repo": repo, "cache": cache_dir})
        for name in REPO_FILES:
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (tmp_path / name).parent.mkdir(exist_ok=True)
                (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return calls


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_checkpoint_without_its_duplicates(hub: list[dict[str, Any]], tmp_path: Path) -> None:
    assert download("hf:me/tiny-1.5_B", tmp_path / "cache") == tmp_path
    assert hub == [{"repo": "me/tiny-1.5_B", "cache": tmp_path / "cache"}]
    assert files(tmp_path) == sorted(REPO_FILES[:10])


def test_one_file(hub: list[dict[str, Any]], tmp_path: Path) -> None:
    assert download("hf:me/tiny/q/small.gguf") == tmp_path / "q/small.gguf"
    assert files(tmp_path) == ["q/small.gguf"]


def test_a_split_file_comes_with_its_siblings(hub: list[dict[str, Any]], tmp_path: Path) -> None:
    assert download("hf:me/tiny/q/big-00001-of-00002.gguf") == tmp_path / REPO_FILES[15]
    assert files(tmp_path) == REPO_FILES[15:17]


def test_a_file_that_is_not_there(hub: list[dict[str, Any]]) -> None:
    with pytest.raises(UserError, match=r"hf:me/tiny has no q/none\.gguf"):
        download("hf:me/tiny/q/none.gguf")


@pytest.mark.parametrize(
    "reference", ["hf:me", "hf:", "hf:me/tiny/file.bin", "hf:../x/y z", "me/x"]
)
def test_no_reference(reference: str, hub: list[dict[str, Any]]) -> None:
    with pytest.raises(UserError, match="is not a hub reference"):
        download(reference)
    assert not hub


def refused(kind: type[Exception], text: str = "") -> Exception:
    """A hub error without the response that real ones carry."""
    error = kind.__new__(kind)
    error.args = (text,)
    return error


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (refused(errors.GatedRepoError), "is gated"),
        (refused(errors.RepositoryNotFoundError), "does not exist, or is private"),
        (errors.HFValidationError("bad name"), "does not exist, or is private"),
        (errors.OfflineModeIsEnabled("offline"), "cannot be reached"),
        (errors.LocalEntryNotFoundError("not cached"), "cannot be reached"),
        (TimeoutError("read timed out\nand more"), "broke off (read timed out)"),
        (OSError(28, "No space left on device"), "No space left"),
    ],
)
def test_failures_are_one_sentence(
    error: Exception, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError) as caught:
        download("hf:me/tiny")
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"moe-gguf\[convert\]"):
        download("hf:me/tiny")


def test_offline_for_real(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\n"
        "from moe_gguf.converters.hf.hub import download\n"
        "from moe_gguf.runtime.errors import UserError\n"
        "try: download('hf:me/tiny', Path(__import__('sys').argv[1]))\n"
        "except UserError as error: print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "hub cannot be reached; go online" in run.stdout and run.stdout.count("\n") == 1
