"""The layout: who may import whom and how, how large folders are, and that nothing goes in circles."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("swarm", "node", "client")
FORBIDDEN = {"swarm": ("swarm.node", "swarm.client"), "node": ("swarm.client",), "client": ("swarm.node",)}
LARGEST_FOLDER = 14


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts if parts[0] == "swarm" else ("swarm", *parts))
    return name.removesuffix(".__init__")


MODULES = {module_name(file): file for room in ROOMS for file in (ROOT / room).rglob("*.py")}


def imports(name: str) -> Iterator[tuple[int, str, bool]]:
    """What a module imports: how many levels up (0: absolute), the full name, and whether only for the type checker."""
    file = MODULES[name]
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(file.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        only_types = id(node) in for_types
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, only_types) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: -node.level + 1 or None] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.level, f"{base}.{alias.name}", only_types) for alias in node.names)


def room_of(name: str) -> str:
    parts = name.split(".")
    return parts[1] if parts[0] == "swarm" and parts[1:2] in (["node"], ["client"]) else parts[0]


def home_of(imported: str) -> str | None:
    """The module of ours that an imported name is, or is in."""
    while imported and imported not in MODULES:
        imported = imported.rpartition(".")[0]
    return imported or None


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_keep_to_themselves(room: str) -> None:
    names = [name for name in MODULES if room_of(name) == room]
    assert names
    for name in names:
        wrong = [found for _, found, _ in imports(name) if found.startswith(FORBIDDEN[room])]
        assert not wrong, f"{name} imports {wrong}"


def test_imports_are_relative_inside_a_room_and_only_there() -> None:
    """So the checkout itself is what editors and type checkers follow, whatever is installed."""
    for name in MODULES:
        for levels, found, _ in imports(name):
            home = home_of(found)
            if home is not None:
                inside = room_of(home) == room_of(name)
                assert inside == bool(levels), f"{name} imports {found} {'absolutely' if inside else 'relatively'}"


def test_nothing_imports_in_circles() -> None:
    graph = {
        name: {home for _, found, types in imports(name) if not types and (home := home_of(found)) and home != name}
        for name in MODULES
    }
    for name, homes in graph.items():  # a package's own __init__ runs before its modules: that is no arrow of theirs
        graph[name] = {home for home in homes if not name.startswith(f"{home}.")}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("room", ROOMS)
def test_folders_are_small(room: str) -> None:
    for folder in {file.parent for file in (ROOT / room).rglob("*.py")}:
        files = [file.name for file in folder.glob("*.py") if file.name != "__init__.py"]
        assert len(files) <= LARGEST_FOLDER, f"{folder.relative_to(ROOT)} has {len(files)} files"


def test_every_package_is_installed() -> None:
    text = (ROOT / "pyproject.toml").read_text()  # Python 3.10 has no tomllib
    listed = re.search(r"^packages = \[(.*?)\]", text, flags=re.M | re.S)
    assert listed is not None
    packages = {name for name, file in MODULES.items() if file.name == "__init__.py"}
    assert set(re.findall(r'"([^"]+)"', listed[1])) == packages
