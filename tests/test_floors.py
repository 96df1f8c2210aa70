"""The sentence of ARCHITECTURE.md on dependencies, held against the imports there are.

Every room of the package has a floor; it imports from floors below, and on its own floor only what
stands before it. So there is no circle, and no arrow points up.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("runtime", "converters", "policies", "moe_gguf")


def floors() -> dict[str, tuple[int, int]]:
    """Per room its floor and its place on it, as ARCHITECTURE.md draws them."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    block = text[text.index("<!-- floors -->") : text.index("<!-- /floors -->")]
    rooms: dict[str, tuple[int, int]] = {}
    for line in block.splitlines():
        match = re.match(r"(\d) +(.*)", line)
        if match:
            for place, room in enumerate(re.findall(r"[\w/]+", match[2])):
                assert room not in rooms, f"{room} stands twice"
                rooms[room] = (int(match[1]), place)
    return rooms


def modules() -> Iterator[Path]:
    for folder in FOLDERS:
        yield from sorted((ROOT / folder).rglob("*.py"))


def room_of(module: str, rooms: dict[str, tuple[int, int]]) -> str | None:
    """The room that a module, like ``runtime/formats/layout``, lies in."""
    parts = module.split("/")
    names = ("/".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((name for name in names if name in rooms), None)


def imports(path: Path) -> Iterator[str]:
    """What a file imports from the package, as paths without endings; under TYPE_CHECKING too."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        base = package[: len(package) - node.level + 1]
        target = (*base, *(node.module.split(".") if node.module else ()))
        is_folder = ROOT.joinpath(*target).is_dir()
        for alias in node.names:
            inner = ROOT.joinpath(*target, alias.name)
            is_module = is_folder and (inner.is_dir() or inner.with_suffix(".py").exists())
            yield "/".join((*target, alias.name) if is_module else target)


def test_every_module_has_a_floor() -> None:
    rooms = floors()
    for path in modules():
        if path.parent.name == "moe_gguf" or path.name == "__init__.py":
            continue
        module = str(path.relative_to(ROOT).with_suffix(""))
        assert room_of(module, rooms), f"{module} has no floor in ARCHITECTURE.md"


def test_every_room_exists() -> None:
    for room in floors():
        path = ROOT / room
        assert path.is_dir() or path.with_suffix(".py").exists(), f"there is no {room}"


def arrows() -> list[tuple[str, str]]:
    """(importing module, imported module) of the whole package, the face left out."""
    found = []
    for path in modules():
        if path.parent.name == "moe_gguf":
            continue
        module = str(path.relative_to(ROOT).with_suffix(""))
        found += [(module, target) for target in imports(path)]
    return found


def test_no_arrow_points_up() -> None:
    rooms = floors()
    wrong = []
    for module, target in arrows():
        mine, its = room_of(module, rooms), room_of(target, rooms)
        if mine is not None and its is not None and mine != its and rooms[its] >= rooms[mine]:
            wrong.append(f"{module} -> {target}")
    assert not wrong


def test_there_is_no_circle() -> None:
    """Also inside a room; imports that only types need count as any other."""
    graph: dict[str, set[str]] = {}
    for module, target in arrows():
        graph.setdefault(module, set()).add(target)
    done: set[str] = set()

    def visit(module: str, way: list[str]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for target in sorted(graph.get(module, ())):
                visit(target, [*way, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])


@pytest.mark.parametrize("folder", FOLDERS[:3])
def test_imports_inside_the_package_are_relative(folder: str) -> None:
    """So that every editor resolves them in the checkout, where no folder is called moe_gguf."""
    for path in (ROOT / folder).rglob("*.py"):
        assert not re.search(r"^\s*(from|import) moe_gguf", path.read_text(), re.MULTILINE), path


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("policies", {"numpy"}),
        ("runtime/formats", {"numpy", "xxhash"}),
    ],
)
def test_what_a_low_room_may_know(folder: str, allowed: set[str]) -> None:
    """Policies know numbers only; formats know nothing of llama.cpp or of this machine."""
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                root = name.split(".")[0]
                assert root in sys.stdlib_module_names | allowed, f"{path} imports {name}"
