"""What people write into the files of a Hugging Face folder: converted, or left out with a note.

1. Absent keys of config.json mean what the installed transformers means by them.
2. Model cards, generation settings and tokenizer files never end a conversion, and llama.cpp opens
   what comes of it.
3. A conversion's bytes are the same in every process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import hf_files
import llama_cpp
import pytest
from hf_files import use_tokenizer
from hf_gguf import write_gguf

from moe_gguf.converters import convert
from moe_gguf.converters.choose import ConvertOptions
from moe_gguf.converters.hf import families, wants
from moe_gguf.converters.hf.defaults import DEFAULTS
from moe_gguf.converters.hf.source import open_hf
from moe_gguf.runtime import kernels
from moe_gguf.runtime.errors import UserError

CLASSES = {
    "mixtral": "MixtralConfig",
    "qwen2_moe": "Qwen2MoeConfig",
    "qwen3_moe": "Qwen3MoeConfig",
    "olmoe": "OlmoeConfig",
    "gpt_oss": "GptOssConfig",
    "deepseek_v2": "DeepseekV2Config",
}
# What a class says of itself: its fields, and how it names and fills rotary parameters.
ASK = """
import json, sys, transformers
out = {}
for family, name in json.load(sys.stdin).items():
    cls = getattr(transformers, name)
    fields = {k: f.default for k, f in cls.__dataclass_fields__.items()}
    plain = {k: v for k, v in fields.items() if v is None or isinstance(v, (int, float, str))}
    rope = dict(cls().rope_parameters)
    plain["rope_theta"] = rope.pop("rope_theta")
    out[family] = plain | ({"rope_parameters": rope} if len(rope) > 1 else {})
print(json.dumps(out))
"""


@pytest.fixture
def folder(hf_root: Path, tmp_path: Path) -> Path:
    return shutil.copytree(hf_root / "qwen3_moe", tmp_path / "model")


def edit_json(path: Path, **values: Any) -> None:
    """Set top-level values of a JSON file; None removes."""
    document = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in document.items() if v is not None}))


def keys_and_notes(folder: Path) -> tuple[dict[str, Any], list[str]]:
    with closing(open_hf(folder)) as source:
        return {key: pair.value for key, pair in source.metadata.items()}, source.notes


# --- 1. absent keys -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs() -> dict[str, dict[str, Any]]:
    """Each class's defaults, from a process of its own: transformers is larger than a budget."""
    run = subprocess.run(
        [sys.executable, "-c", ASK],
        input=json.dumps(CLASSES),
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    answer: dict[str, dict[str, Any]] = json.loads(run.stdout.splitlines()[-1])
    return answer


@pytest.mark.parametrize("family", CLASSES)
def test_absent_keys_mean_what_transformers_means(
    family: str,
    theirs: dict[str, dict[str, Any]],
    hf_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for key, value in DEFAULTS[family].items():
        assert theirs[family][key] == value, key
    asked: set[str] = set()
    get = wants.Config.get

    def recorded(config: wants.Config, key: str, default: Any = None) -> Any:
        asked.add(key)
        return get(config, key, default)

    monkeypatch.setattr(wants.Config, "get", recorded)
    name = "deepseek_v2_full" if family == "deepseek_v2" else family
    families.wants_of(wants.Config(hf_root / name))
    assert len(asked) > 15
    for key in asked - {
        "model_type"
    }:  # a default that is not None is in the table, whoever asks for it
        assert theirs[family].get(key) is None or key in DEFAULTS[family], key


def rope_base(folder: Path) -> Any:
    keys, _ = keys_and_notes(folder)
    return next(value for key, value in keys.items() if key.endswith(".rope.freq_base"))


@pytest.mark.parametrize(
    ("family", "base"), [("mixtral", 1e6), ("gpt_oss", 150000), ("olmoe", 1e4), ("deepseek", 1e4)]
)
def test_absent_rope_theta(family: str, base: float, hf_root: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(hf_root / family, tmp_path / "model")
    edit_json(folder / "config.json", rope_parameters=None, rope_theta=None)
    assert rope_base(folder) == base
    edit_json(folder / "config.json", rope_theta=1234.0)
    assert rope_base(folder) == 1234.0


def test_absent_rope_scaling_of_gpt_oss(hf_root: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(hf_root / "gpt_oss", tmp_path / "model")
    edit_json(folder / "config.json", rope_parameters=None)
    keys, _ = keys_and_notes(folder)
    assert keys["gpt-oss.rope.scaling.type"] == "yarn"
    assert keys["gpt-oss.rope.scaling.factor"] == 32
    assert keys["gpt-oss.rope.scaling.original_context_length"] == 4096


def test_groups_that_the_greedy_choice_ignores(hf_root: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(hf_root / "deepseek_v2_full", tmp_path / "model")
    edit_json(folder / "config.json", n_group=2, topk_group=1, topk_method=None)
    assert "deepseek2.expert_group_count" not in keys_and_notes(folder)[0]
    edit_json(folder / "config.json", topk_method="group_limited_greedy")
    assert keys_and_notes(folder)[0]["deepseek2.expert_group_count"] == 2


# --- 2. what people write -------------------------------------------------------------------------

CARD = """---
name: 4
version: 1.10
license:
- apache-2.0
- mit
language: [no, 42]
tags: [2024-05-01, [nested], ~, true]
author: {name: someone}
license_name: null
base_model: {name: 7, version: 1.0, extra: [1]}
datasets:
- 12
- name: 3
description: 2024-13-45
---
text
"""


def test_scalars_of_a_model_card_are_text(folder: Path) -> None:
    (folder / "README.md").write_text(CARD)
    keys, notes = keys_and_notes(folder)
    assert keys["general.name"] == "4"
    assert keys["general.version"] == "1.10"
    assert keys["general.license"] == "apache-2.0,mit"
    assert keys["general.languages"] == ["no", "42"]
    assert keys["general.tags"] == ["2024-05-01", "true"]
    assert keys["general.base_model.0.name"] == "7"
    assert keys["general.dataset.1.name"] == "3"
    assert keys["general.description"] == "2024-13-45"
    assert "general.author" not in keys and "general.license.name" not in keys
    assert notes == []


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text.encode("utf-8-sig"),
        lambda text: text.encode("utf-16"),
        lambda text: text.replace("\n", "\r\n").encode(),
    ],
)
def test_a_model_card_of_any_editor(encode: Callable[[str], bytes], folder: Path) -> None:
    (folder / "README.md").write_bytes(encode(CARD))
    assert keys_and_notes(folder)[0]["general.version"] == "1.10"


CARDS = {
    "no YAML": b"---\n: [\n---\n",
    "another encoding": b"---\nname: caf\xe9\n---\n",
    "a list": b"---\n- a\n---\n",
    "unhashable": b"---\n? [a]\n: b\n---\n",
    "too deep": b"---\na: " + b"[" * 30000 + b"\n---\n",
    "too long": b"---\n" + b"a: b\n" * 300000,
    "a tag": b"---\nname: !!python/object:os.system x\n---\n",
    "empty": b"",
    "only a beginning": b"---\n",
}


@pytest.mark.parametrize("what", CARDS)
def test_a_damaged_model_card_is_left_out(what: str, folder: Path) -> None:
    (folder / "README.md").write_bytes(CARDS[what])
    keys, notes = keys_and_notes(folder)
    assert keys["general.name"]
    assert len(notes) <= 1 and all("\n" not in note for note in notes)


def test_a_model_card_that_is_a_folder(folder: Path) -> None:
    (folder / "README.md").mkdir()
    assert len(keys_and_notes(folder)[1]) == 1


def test_odd_generation_settings(folder: Path) -> None:
    settings = {"top_k": "50", "top_p": True, "temperature": 1e300, "min_p": 0.1, "mirostat": 1.5}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    keys, notes = keys_and_notes(folder)
    assert keys["general.sampling.min_p"] == 0.1
    assert len([key for key in keys if key.startswith("general.sampling")]) == 1
    assert len(notes) == 4
    (folder / "generation_config.json").write_text("[1]")
    assert len(keys_and_notes(folder)[1]) == 1


def edit_tokenizer(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        document = json.loads((folder / "tokenizer.json").read_text())
        change(document)
        (folder / "tokenizer.json").write_text(json.dumps(document))

    return edit


def settings(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "tokenizer_config.json", **values)


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def rewrite(name: str, encoding: str) -> Callable[[Path], None]:
    """The same text in another encoding."""
    return lambda folder: (
        (folder / name).write_bytes((folder / name).read_text().encode(encoding)) and None
    )


def add(*entries: Any) -> Callable[[dict[str, Any]], object]:
    return lambda document: document["added_tokens"].extend(entries)


ODD: dict[str, Callable[[Path], None]] = {
    "two texts for one id": edit_tokenizer(
        add({"id": 509, "content": "<a>"}, {"id": 509, "content": "<b>"})
    ),
    "two ids for one text": edit_tokenizer(
        add({"id": 509, "content": "<a>"}, {"id": 510, "content": "<a>"})
    ),
    "padding's own text": edit_tokenizer(add({"id": 509, "content": "[PAD510]"})),
    "an added token of the vocabulary": edit_tokenizer(add({"id": 509, "content": "a"})),
    "texts alike up to a NUL": edit_tokenizer(
        add({"id": 509, "content": "x\0a"}, {"id": 510, "content": "x\0b"})
    ),
    "half a surrogate pair": edit_tokenizer(
        add({"id": 509, "content": "\ud800"}, {"id": 510, "content": "\udfff"})
    ),
    "no text": edit_tokenizer(add({"id": 509, "content": ""}, {"id": 510, "content": ""})),
    "entries that lack something": edit_tokenizer(
        add({"id": 509}, {"content": "x"}, {}, None, 7, "x", {"id": None, "content": None})
    ),
    "ids that are none": edit_tokenizer(
        add(
            *(
                {"id": i, "content": f"<{n}>"}
                for n, i in enumerate([-1, 10**400, 1.5, "4", True, [1]])
            )
        )
    ),
    "tokens beyond the model": edit_tokenizer(
        lambda document: document["model"]["vocab"].update({"<x>": 512, "<y>": -3, "<z>": "1"})
    ),
    "added tokens are no list": edit_tokenizer(lambda d: d.update(added_tokens={"a": 1})),
    "no type": edit_tokenizer(lambda document: document["model"].pop("type")),
    "merges that are none": edit_tokenizer(
        lambda document: document["model"]["merges"].extend([["a"], 7, "ab", " a", "a ", ["", "b"]])
    ),
    "post_processor is text": edit_tokenizer(lambda d: d.update(post_processor="x")),
    "post_processor lacks all": edit_tokenizer(
        lambda document: document.update(
            post_processor={"type": "TemplateProcessing", "single": [1, 2]}
        )
    ),
    "a byte order mark": rewrite("tokenizer.json", "utf-8-sig"),
    "UTF-16": rewrite("tokenizer.json", "utf-16"),
    "settings in Latin-1": write("tokenizer_config.json", b'{"bos_token": "\xe9"}'),
    "settings are no JSON": write("tokenizer_config.json", b"["),
    "settings are a list": write("tokenizer_config.json", b"[]"),
    "settings too deep": write("tokenizer_config.json", b"[" * 100_000),
    "tokens of odd kinds": settings(
        bos_token=7, eos_token={"content": 7}, unk_token=["a"], add_bos_token="yes", pad_token={}
    ),
    "ids of odd kinds": lambda folder: edit_json(
        folder / "config.json",
        pad_token_id=-1,
        eos_token_id=[2, 3],
        bos_token_id="0",
        sep_token_id=9e9,
    ),
    "text_config is text": lambda folder: edit_json(folder / "config.json", text_config="x"),
    "template is a number": settings(chat_template=7),
    "templates lack names": settings(chat_template=[{"template": "x"}, "y", {"name": 7}, {}]),
    "templates by name": settings(chat_template={"default": "x", "rag": "y"}),
    "names that become alike": settings(
        chat_template=[{"name": "tool use", "template": "a"}, {"name": "tool_use", "template": "b"}]
    ),
    "template in Latin-1": write("chat_template.jinja", b"\xe9"),
    "template with half a pair": settings(chat_template="\ud83d"),
    "a huge template": settings(chat_template="x" * 3_000_000),
    "damaged tokenizer.model": write("tokenizer.model", b"version https://git-lfs"),
}  # fmt: skip


@pytest.mark.parametrize("what", ODD)
def test_odd_tokenizer_files_convert(what: str, folder: Path) -> None:
    settings()(folder)
    ODD[what](folder)
    with closing(open_hf(folder)) as source:
        assert all("\n" not in note for note in source.notes)
        path = write_gguf(source, folder.parent / "vocab.gguf")
    llm = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    try:
        text = "the expert in the words"
        tokens = llm.tokenize(text.encode(), add_bos=False)
        assert bytes(llm.detokenize(tokens)).decode() == text
    finally:
        llm.close()


SENTENCEPIECE = {
    "added_tokens.json is a list": write("added_tokens.json", b"[1]"),
    "odd added tokens": write("added_tokens.json", b'{"<a>": "x", "<b>": -1, "": 509, "<c>": 510}'),
    "odd decoder": settings(
        added_tokens_decoder={"x": {"content": "y"}, "509": "z", "9" * 5000: {}, "511": {}}
    ),
    "decoder is a list": settings(added_tokens_decoder=["x"], add_prefix_space="no"),
}


@pytest.mark.parametrize("what", SENTENCEPIECE)
def test_odd_files_beside_sentencepiece_convert(what: str, hf_root: Path, folder: Path) -> None:
    use_tokenizer(hf_root, "sentencepiece", folder)
    SENTENCEPIECE[what](folder)
    with closing(open_hf(folder)) as source:
        path = write_gguf(source, folder.parent / "vocab.gguf")
    llama_cpp.Llama(str(path), vocab_only=True, verbose=False).close()


def test_the_first_of_several_end_tokens(folder: Path) -> None:
    settings(eos_token=None)(folder)
    edit_json(folder / "config.json", eos_token_id=[3, 1])
    assert keys_and_notes(folder)[0]["tokenizer.ggml.eos_token_id"] == 3


def test_what_is_left_out_is_said(folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").write_bytes(CARDS["no YAML"])
    said: list[str] = []
    with closing(open_hf(folder)) as source:
        convert.convert(
            source, tmp_path / "b", ConvertOptions(), kernels, lambda *_: None, said.append
        )
    assert any("README.md" in sentence for sentence in said)


def test_a_folder_named_by_odd_bytes(folder: Path) -> None:
    odd = folder.parent / os.fsdecode(b"mod\xffel")
    folder.rename(odd)
    keys, _ = keys_and_notes(odd)
    assert keys["general.name"].encode() == "Mod\ufffdEl".encode()


# --- 3. the same bytes ----------------------------------------------------------------------------

NAMES = ("default", "tool_use", "rag", "a", "b", "c", "d")


def in_process(seed: int, source: Path, folder: Path, *, kill: bool = False) -> str:
    """Convert in a process whose sets have an order of their own; returns what it says."""
    code = f"""
import sys
from pathlib import Path
from moe_gguf.converters import convert
from moe_gguf.converters.choose import ConvertOptions
from moe_gguf.runtime import kernels
from moe_gguf.converters.convert import open_source
from moe_gguf.converters.journal import Checkpoints
steps = []
def progress(done, total):
    steps.append(done)
    if {kill} and len(steps) == 20:
        raise KeyboardInterrupt
source = open_source(Path(sys.argv[1]))
try:
    convert.convert(source, Path(sys.argv[2]), ConvertOptions(), kernels, progress, print)
except KeyboardInterrupt:
    print("interrupted")
"""
    run = subprocess.run(
        [sys.executable, "-c", code, source, folder],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": str(seed)},
    )
    return run.stdout


def test_templates_have_an_order_in_every_process(folder: Path, tmp_path: Path) -> None:
    settings(chat_template=[{"name": n, "template": f"{{{{ '{n}' }}}}"} for n in NAMES])(folder)
    for seed in (1, 2):
        in_process(seed, folder, tmp_path / str(seed))
    one, two = ((tmp_path / seed / "trunk.gguf").read_bytes() for seed in "12")
    assert one == two
    assert keys_and_notes(folder)[0]["tokenizer.chat_templates"] == sorted(NAMES[1:])
    assert "interrupted" in in_process(1, folder, tmp_path / "3", kill=True)
    assert "going on behind" in in_process(2, folder, tmp_path / "3")
    assert (tmp_path / "3" / "trunk.gguf").read_bytes() == one


def test_templates_in_files_have_an_order(folder: Path) -> None:
    settings(chat_template=None)(folder)
    (folder / "chat_template.jinja").write_bytes("a\r\nb".encode("utf-16"))
    extra = folder / "additional_chat_templates"
    extra.mkdir()
    for name in NAMES[:0:-1]:
        (extra / f"{name}.jinja").write_text(name)
    keys, _ = keys_and_notes(folder)
    assert keys["tokenizer.chat_template"] == "a\nb"
    assert keys["tokenizer.chat_templates"] == sorted(NAMES[1:])
    with closing(open_hf(folder)) as source:
        before = source.sha256
    (extra / "rag.jinja").write_text("another")
    with closing(open_hf(folder)) as source:
        assert source.sha256 != before


def test_no_tokenizer_at_all_is_still_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match="is not JSON"):
        open_hf(folder)


def test_vocabulary_of_the_tests(folder: Path) -> None:
    """The ids that the cases above use are free, and one they call too large is."""
    tokens = keys_and_notes(folder)[0]["tokenizer.ggml.tokens"]
    assert tokens[509:512] == ["[PAD509]", "[PAD510]", "[PAD511]"]
    assert len(tokens) == hf_files.VOCAB
